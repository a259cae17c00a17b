"""scripts/gpu-check: everything that only a CUDA device can show, in one command.

``pack`` gathers source and models in a folder that needs nothing else; the other modules run there too, so
they use the standard library only and import each other relatively.
"""
