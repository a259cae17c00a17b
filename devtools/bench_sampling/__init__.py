"""Speed of the fused sampler beside llama.cpp's sampler chain: scripts/bench-sampling.

What is measured (``plan``), a context that holds given logits and the calls that draw from them
(``measure``), ratios and the lines that they have to reach (``report``). docs/sampling.md explains the
figures.
"""
