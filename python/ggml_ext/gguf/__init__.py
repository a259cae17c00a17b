"""GGUF files: read, written, described. No decisions."""
