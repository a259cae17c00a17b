"""Transforms and roundings of a whole model, block by block, in a folder that can be gone on with."""
