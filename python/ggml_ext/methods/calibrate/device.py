"""Where PyTorch computes: checked before any work."""

from __future__ import annotations

import warnings

from ggml_ext import recipes
from ggml_ext.core.cpus import threads_or_cores
from ggml_ext.core.errors import GgmlExtError


def require_device(name: str) -> None:
    """Raises GgmlExtError unless PyTorch can compute on the device "cpu" or "cuda"."""
    if name == "cpu":
        return
    recipes.require_packages()
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what the error below says
        available = torch.cuda.is_available()
    if not available:
        built = torch.version.cuda is not None or torch.version.hip is not None
        reason = "finds no device with a working driver" if built else "is built without CUDA"
        raise GgmlExtError(f"--device {name}: PyTorch {torch.__version__} {reason}; use --device cpu")


def bound_threads(threads: int) -> None:
    """Lets PyTorch use so many threads, 0 for one per core that this process may use. Raises
    GgmlExtError as threads_or_cores."""
    import torch

    torch.set_num_threads(threads_or_cores(threads))
