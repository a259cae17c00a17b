"""Programs for those who change ggml-ext, run from the repository by the scripts of the same names.

No part of the wheel.
"""
