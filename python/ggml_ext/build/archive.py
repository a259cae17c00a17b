"""What of a llama.cpp source is used, and how it gets out of a tar archive that nobody has checked."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ggml_ext.core.errors import GgmlExtError

# What the build and the converter need of a llama.cpp tree; the rest (docs, examples, models) is left out.
KEEP = (
    "CMakeLists.txt",
    "LICENSE",
    "cmake",
    "common",
    "conversion",
    "convert_hf_to_gguf.py",
    "ggml",
    "gguf-py",
    "include",
    "licenses",
    "scripts/ui-assets.cmake",
    "src",
    "tests",
    "tools",
    "vendor",
)
DROP = ("tests/snapshots", "tools/ui/src", "tools/ui/static", "tools/ui/tests", "tools/server/tests")
MARKERS = ("CMakeLists.txt", "include/llama.h", "ggml/CMakeLists.txt")


class UpstreamError(GgmlExtError):
    """The llama.cpp source cannot be had, is not what it should be, or a patch does not apply."""


def wanted(path: str) -> bool:
    """Whether a path, relative to the llama.cpp root, is part of what is kept."""
    return _under(path, KEEP) and not _under(path, DROP)


def _under(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)


def _safe_name(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UpstreamError(f"{archive}: unsafe member {name!r}; do not use this file")
    return path


def _link_target(member: tarfile.TarInfo, archive: Path) -> str:
    """Name of the member that a link points to; UpstreamError when that is outside the top folder."""
    name = PurePosixPath(member.name)
    base = name.parent if member.issym() else PurePosixPath()
    parts: list[str] = []
    for part in (base / member.linkname).parts:
        if part == "..":
            parts = parts[:-1] if parts else [".."]
        else:
            parts.append(part)
    if PurePosixPath(member.linkname).is_absolute() or len(parts) < 2 or parts[0] != name.parts[0]:
        link = f"{member.name!r} links to {member.linkname!r}"
        raise UpstreamError(f"{archive}: {link}; do not use this file")
    return "/".join(parts)


def unpack(archive: Path, dest: Path) -> None:
    """Unpacks the needed part of the llama.cpp in a tar archive into dest.

    The archive holds llama.cpp in its top folder or in vendor/llama.cpp below it. Every member is checked,
    wanted or not: absolute names, "..", devices and links that leave the top folder are refused. Links are
    never created: one to a file becomes a copy of it. Raises UpstreamError.
    """
    try:
        with tarfile.open(archive) as tar:
            members = {str(_safe_name(member.name, archive)): member for member in tar.getmembers()}
            root = _archive_root(list(members), archive)
            for name, member in members.items():
                if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
                    raise UpstreamError(f"{archive}: {name!r} is a device or pipe; do not use this file")
                source: tarfile.TarInfo | None = member
                if member.issym() or member.islnk():
                    source = members.get(_link_target(member, archive))
                relative = name[len(root) :]
                if not name.startswith(root) or not wanted(relative) or member.isdir():
                    continue
                if source is None or not source.isfile():
                    raise UpstreamError(f"{archive}: {name!r} links to no file; use a plain source tree")
                content = tar.extractfile(source)
                assert content is not None  # isfile() holds
                target = dest / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as file:
                    shutil.copyfileobj(content, file)
                target.chmod(0o755 if source.mode & 0o100 else 0o644)
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UpstreamError(f"{archive}: cannot unpack: {reason}; get the file again") from error


def _archive_root(names: list[str], archive: Path) -> str:
    known = set(names)
    for name in names:
        top = name.split("/", 1)[0]
        for root in (f"{top}/vendor/llama.cpp/", f"{top}/"):
            if all(root + marker in known for marker in MARKERS):
                return root
    raise UpstreamError(f"{archive}: holds no llama.cpp source ({', '.join(MARKERS)})")


def tree_root(source: Path) -> Path:
    for root in (source / "vendor" / "llama.cpp", source):
        if all((root / marker).is_file() for marker in MARKERS):
            return root
    raise UpstreamError(f"{source}: no llama.cpp source tree ({', '.join(MARKERS)})")


def tree_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Wanted files of a tree as (path relative to root, path), sorted."""
    for keep in KEEP:
        start = root / keep
        for path in [start] if start.is_file() else sorted(start.rglob("*")):
            relative = path.relative_to(root).as_posix()
            if path.is_file() and not _under(relative, DROP):
                yield relative, path
