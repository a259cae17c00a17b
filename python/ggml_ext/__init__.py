"""ggml-ext: new GGML ops and quant types for llama.cpp, as a small patch set.

Importing this package points the llama-cpp-python bindings at the patched library. Import it before
``llama_cpp``.
"""

import sys

_COMMAND = sys.argv[:1] == ["-m"] and "ggml_ext" in " ".join(sys.orig_argv)
if _COMMAND and not getattr(sys.flags, "safe_path", False):
    # For -m Python puts the current folder in front of the standard library, and a command of ours may be
    # started in a folder of a stranger's files. So this comes before all other imports (E402), of which
    # "from __future__" would be one.
    del sys.path[0]

import os  # noqa: E402
from pathlib import Path  # noqa: E402

from ggml_ext.core import paths  # noqa: E402
from ggml_ext.core.errors import GgmlExtError  # noqa: E402

__version__ = "0.1.0"

__all__ = ["GgmlExtError", "__version__"]


def _loaded_bindings_dir() -> Path | None:
    """Folder that an already imported llama_cpp took its library from, or None."""
    module = sys.modules.get("llama_cpp.llama_cpp")
    base = getattr(module, "_base_path", None)
    return Path(base).resolve() if base is not None else None


def _point_bindings_at_patched_library() -> None:
    try:
        lib = paths.lib_dir()
    except GgmlExtError:
        # A source checkout without a build: pure Python parts still work, the others say what is missing.
        return
    loaded = _loaded_bindings_dir()
    if loaded is not None and loaded != lib.resolve():
        raise GgmlExtError(
            f"llama_cpp is already loaded with another llama.cpp: {loaded}; import ggml_ext before llama_cpp"
        )
    os.environ["LLAMA_CPP_LIB_PATH"] = str(lib)
    os.environ["MTMD_CPP_LIB"] = str(lib)


_point_bindings_at_patched_library()
