"""Hugging Face folders: what is in them, and their way to a float GGUF file."""
