"""Perplexity, divergence, speed and errors of files."""
