"""Observations: what a model's matrices read on a text, summed by llama.cpp while it runs (docs/observe.md).

``run.observe`` fills a folder, ``reader.Observation`` reads it.
"""
