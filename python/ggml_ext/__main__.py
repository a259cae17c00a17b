"""``python -m ggml_ext``: the command line."""

from ggml_ext.cli.entry import main

main()
