"""The patched llama.cpp as it is installed: libraries, tools, bindings, and the check of all of them."""
