"""Files: run folders."""
