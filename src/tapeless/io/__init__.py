"""Files: run folders, and the formats of other programs."""
