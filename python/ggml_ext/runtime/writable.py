"""A loaded model whose weights can be exchanged: what a change of one matrix does to the logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.runtime.llama import Model
from ggml_ext.runtime.native import llama_library


class WritableModel(Model):
    """A model whose file is read into memory as a whole, and whose rows stay as the file has them."""

    def _parameters(self, weights: bool) -> Any:
        params = super()._parameters(weights)
        params.load_mode, params.use_extra_bufts = self._api.LLAMA_LOAD_MODE_NONE, False
        return params

    def __enter__(self) -> WritableModel:
        return self

    def put(self, tensor: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Bytes of the tensor, in its own type, from ``offset`` on. Raises GgmlExtError where the model has
        no such tensor."""
        ffi, library = llama_library()
        model = ffi.cast("struct llama_model *", self._model)
        status = library.ggml_ext_model_set_tensor(
            model, tensor.encode(), ffi.from_buffer("char[]", data), offset, data.nbytes
        )
        if status < 0:
            raise GgmlExtError(f"{self.path}: llama.cpp has no {tensor} of this size that can be written to")
