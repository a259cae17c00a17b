"""Speed of the patched llama.cpp beside stock on this machine's processor: scripts/bench-cpu.

Random-weight models (``models``), the machine's two limits (``limits``), llama-bench runs of both builds in
turns (``runs``), ratios and the lines they have to reach (``results``), and their tables (``report``).
docs/performance.md explains the figures.
"""
