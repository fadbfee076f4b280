"""Text in, tokens out: tokenizers, documents, and the built-in names."""
