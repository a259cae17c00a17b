"""Models on the Hugging Face Hub, by their names: what conversion needs is downloaded into the Hub's cache.

What lies there comes from strangers, as any folder does (folder.py). Nothing here touches the network unless
the user names a model that is no path.
"""

from __future__ import annotations

import glob
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.files import cache_dir
from ggml_ext.hf.files import SMALL, SMALL_IN_FOLDERS, shown

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^@:]+?))?(?::(?P<file>[^@:]+\.gguf))?", re.IGNORECASE
)

_WEIGHTS, _PICKLED = "model*.safetensors", "pytorch_model*.bin"
_SPLIT = re.compile(r"-\d{5}-of-(\d{5}\.gguf)$", re.IGNORECASE)
_FOLDERS = "*/*"  # but for SMALL_IN_FOLDERS other forms of the same model


@dataclass(frozen=True)
class Name:
    """``repo``: "org/name". ``revision``: branch, tag or commit, None for the main branch. ``file``: a GGUF
    file in it, None for the model in Hugging Face's form."""

    repo: str
    revision: str | None
    file: str | None


def parse(source: Path) -> Name | None:
    """The name of a model on the Hub, org/name[@revision][:file.gguf], None for a path.

    A path is what exists, and what would lie in a folder that exists.
    """
    match = _NAME.fullmatch(str(source))
    if match is None or source.exists() or Path(source.parts[0]).exists():
        return None
    if match["file"] is None and match["repo"].lower().endswith(".gguf"):
        return None
    return Name(match["repo"], match["revision"], match["file"])


def fetch(source: Path) -> Path:
    """The file or folder ``source``, downloaded first where it is the name of a model on the Hub.

    Raises GgmlExtError for one that is not there, and for one that is neither there nor within reach.
    """
    name = parse(source)
    if name is None:
        return source
    try:
        from huggingface_hub import snapshot_download
    except ImportError as exc:
        raise GgmlExtError(
            f"{source}: no such file or directory, and to download a model of that name the package "
            "huggingface_hub is missing; pip install 'ggml-ext[hub]'"
        ) from exc

    def get(allowed: list[str], ignored: str | None = None, *, commit: str | None = name.revision) -> Path:
        return Path(
            snapshot_download(name.repo, revision=commit, allow_patterns=allowed, ignore_patterns=ignored)
        )

    try:
        if name.file is not None:
            found = get([_SPLIT.sub(r"-*-of-\1", glob.escape(name.file))]) / name.file
            if not found.is_file():
                raise GgmlExtError(f"{source}: the model has no file {shown(name.file)}; check its name")
            return found
        folder = get([*SMALL, _WEIGHTS], _FOLDERS)
        get([*SMALL_IN_FOLDERS], commit=folder.name)
        if not any(folder.glob(_WEIGHTS)):
            get([_PICKLED], _FOLDERS, commit=folder.name)
    except GgmlExtError:
        raise
    except Exception as exc:  # of the Hub's library, of its HTTP library, of the system
        raise GgmlExtError(_reason(source, name, exc)) from exc
    return _named(folder, name)


def _named(folder: Path, name: Name) -> Path:
    """The folder under the model's name, which the converter takes from there; the cache has the commit's."""
    with suppress(OSError, GgmlExtError):
        link = cache_dir() / "hub" / folder.name[:16] / name.repo.partition("/")[2]
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(folder, target_is_directory=True)
        if link.resolve() == folder.resolve():
            return link
    return folder


def _reason(source: Path, name: Name, exc: Exception) -> str:
    """What went wrong, where, and what to do about it."""
    from huggingface_hub import constants, errors

    if isinstance(exc, errors.GatedRepoError):
        return (
            f"{source}: gated; accept its terms at {constants.ENDPOINT}/{name.repo} and log in with "
            "'hf auth login' or HF_TOKEN"
        )
    if isinstance(exc, errors.RevisionNotFoundError):
        return f"{source}: the model has no revision {name.revision}; check the name behind the @"
    if isinstance(exc, errors.RepositoryNotFoundError):
        return (
            f"{source}: no such file or directory, and no such model at {constants.ENDPOINT}; check the "
            "name, and log in with 'hf auth login' if it is private"
        )
    last = shown(" ".join(str(exc).split()) or type(exc).__name__, most=200)
    if constants.HF_HUB_OFFLINE:
        return (
            f"{source}: no such file or directory, and of that model the Hub's cache has not all that is "
            "needed; unset HF_HUB_OFFLINE to download it"
        )
    return (
        f"{source}: cannot be downloaded from {constants.ENDPOINT} ({last}); check the network and the disk"
    )
