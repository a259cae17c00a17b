"""The pinned llama.cpp source: fetch, verify, unpack, patch.

The source comes from the llama-cpp-python source distribution, which vendors the llama.cpp that its
bindings were made for. This module, and all that it imports, uses the standard library only and also runs
as a plain script, so that CMake can call it at configure time, before the package is installed. Then -I is
needed: without it Python would take the modules beside this file for those of the standard library::

    python -I upstream.py fetch
    python -I upstream.py prepare --dest DIR [--source TREE_OR_TARBALL] [--stock] [--patches DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:  # as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ggml_ext.build.archive import DROP, KEEP, UpstreamError, tree_files, tree_root, unpack, wanted
from ggml_ext.core import paths
from ggml_ext.core.files import cache_dir, sha256_of

# Releases that the patches are made for: version -> SHA-256 of llama_cpp_python-VERSION.tar.gz.
PINNED = {
    "0.3.34": "d849d286d808284f1d3ec1bd6875572430d29d1f9574a010232caa4e9cef0e35",
    "0.3.35": "1139dbb54509074b70893fab8554e3b079aa9f4d312058ce4018ef0019e3de12",
    "0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
}
DEFAULT_VERSION = "0.3.36"

STAMP = ".ggml-ext-stamp"


def fetch(version: str = DEFAULT_VERSION, cache: Path | None = None) -> Path:
    """Path of the verified llama-cpp-python source distribution, downloaded with pip unless cached.

    Raises UpstreamError for an unknown version, a failed download or a wrong SHA-256; a download with a
    wrong SHA-256 does not get into the cache.
    """
    if version not in PINNED:
        raise UpstreamError(f"no pinned source llama-cpp-python {version}; known: {', '.join(PINNED)}")
    cache = cache or cache_dir()
    final = cache / f"llama_cpp_python-{version}.tar.gz"
    if not final.is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
                download = _pip_download(version, Path(folder))
                _check_sha256(download, version, "try again, and check the package index if it happens twice")
                download.replace(final)
        except OSError as error:
            raise UpstreamError(f"cannot write {cache}: {error.strerror}; set GGML_EXT_CACHE") from error
    _check_sha256(final, version, "delete it and try again")
    return final


def _check_sha256(path: Path, version: str, remedy: str) -> None:
    actual = sha256_of(path)
    if actual != PINNED[version]:
        raise UpstreamError(f"{path}: SHA-256 is {actual}, expected {PINNED[version]}; {remedy}")


def _pip_download(version: str, folder: Path) -> Path:
    name = f"llama-cpp-python=={version}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "llama-cpp-python", "--dest", str(folder.absolute()), name]
    # An outer pip (this code runs inside `pip install .`) shares its build tracker through this variable.
    env = {key: value for key, value in os.environ.items() if key != "PIP_BUILD_TRACKER"}
    print(f"downloading the source of {name}", file=sys.stderr, flush=True)
    done = subprocess.run(
        command,
        cwd=folder,  # -m puts the current folder in front of the standard library
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = sorted(folder.glob("*.tar.gz"))
    if done.returncode != 0 or not found:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise UpstreamError(
            f"pip cannot download {name}: {errors[-1]}; check the network and pip, or put "
            f"llama_cpp_python-{version}.tar.gz into {cache_dir()}"
        )
    return found[0]


def _identity(source: Path | None, version: str) -> str:
    if source is None:
        return f"llama-cpp-python {version} {PINNED.get(version)}"
    if source.is_file():
        return f"archive {sha256_of(source)}"
    digest = hashlib.sha256()
    for relative, path in tree_files(tree_root(source)):
        digest.update(f"{relative}\0{sha256_of(path)}\n".encode())
    return f"tree {digest.hexdigest()}"


def patch_files(patches: Path) -> list[Path]:
    """Patches named in the folder's series file (one name a line, # starts a comment), in order."""
    series = patches / "series"
    try:
        lines = series.read_text().splitlines()
    except OSError as error:
        raise UpstreamError(f"{series}: {error.strerror}; check the patch folder") from error
    names = [name for line in lines if (name := line.split("#", 1)[0].strip())]
    if missing := [name for name in names if not (patches / name).is_file()]:
        raise UpstreamError(f"{series}: no such patch: {missing[0]}")
    return [patches / name for name in names]


def patched_names(patch: Path) -> list[str]:
    """Files that a patch changes, relative to the llama.cpp root."""
    return re.findall(r"^\+\+\+ b/([^\t\n]+)", patch.read_text(), flags=re.MULTILINE)


def applies(tree: Path, patch: Path) -> bool:
    """Whether a patch is for this release: "Where FILE has TEXT" as its first line says for which it is."""
    where = re.match(r"Where (\S+) has (.+)\n", patch.read_text())
    return where is None or where[2].encode() in (_bytes_of(tree / where[1]) or b"")


def apply_patch(tree: Path, patch: Path) -> None:
    """Applies one patch to an unpacked tree; UpstreamError when a hunk does not fit or has no effect."""
    names = patched_names(patch)
    before = {name: _bytes_of(tree / name) for name in names}
    # Inside another repository `git apply` takes paths as relative to that repository's root and skips what
    # lies elsewhere without an error, so it must not find one. The user's settings must not matter either.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env |= {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent), "GIT_CONFIG_NOSYSTEM": "1"}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C"}
    command = ["git", "apply", "-p1", "--whitespace=nowarn", str(patch.resolve())]
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UpstreamError("git is not on the PATH; install git") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["git apply failed"])[0]
        raise UpstreamError(f"{patch.name}: does not apply: {reason}; see docs/upstream.md")
    for name in names:
        if _bytes_of(tree / name) == before[name]:
            raise UpstreamError(f"{patch.name}: had no effect on {name}; see docs/upstream.md")


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _sync(staging: Path, dest: Path) -> None:
    """Makes dest equal to staging; equal files keep their time, so that nothing is rebuilt for them."""
    wanted = set()
    for path in staging.rglob("*"):
        if not path.is_file():
            continue
        relative = path.relative_to(staging)
        wanted.add(relative)
        target = dest / relative
        if _bytes_of(target) != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    for path in list(dest.rglob("*")):
        if path.is_file() and path.relative_to(dest) not in wanted and "__pycache__" not in path.parts:
            path.unlink()


def default_patches() -> Path:
    """Patch folder of the repository, or the one in the installed package's sdk."""
    packaged = paths.PACKAGE / "sdk" / "ggml_ext" / "patches"
    return packaged if packaged.is_dir() else paths.PACKAGE.parents[1] / "ggml_ext" / "patches"


def prepare(
    dest: Path,
    *,
    source: Path | None = None,
    patches: Path | None = None,
    version: str = DEFAULT_VERSION,
    cache: Path | None = None,
) -> bool:
    """Makes dest the (patched) llama.cpp tree; returns whether anything had to be done.

    source: a llama.cpp or llama-cpp-python tree or tar archive, read only; None takes the pinned release.
    patches: folder with a series file; None leaves the source as it is.
    A stamp in dest holds the hashes of source and patches; while they match, no file is touched.
    Raises UpstreamError; dest is then made anew next time.
    """
    if source is not None and not source.exists():
        raise UpstreamError(f"{source}: no such file or folder; give a llama.cpp source tree or archive")
    _check_dest(dest, source)
    series = patch_files(patches) if patches else []
    lines = [_identity(source, version), hashlib.sha256(repr((KEEP, DROP)).encode()).hexdigest()]
    lines += [f"{patch.name} {sha256_of(patch)}" for patch in series]
    state = "\n".join(lines) + "\n"
    stamp = dest / STAMP
    if _bytes_of(stamp) == state.encode():
        return False
    try:
        dest.mkdir(parents=True, exist_ok=True)
        stamp.write_text("incomplete\n")
        with tempfile.TemporaryDirectory(prefix=".llama.cpp-", dir=dest.parent) as folder:
            staging = Path(folder) / "llama.cpp"
            staging.mkdir()
            if source is not None and source.is_dir():
                for relative, path in tree_files(tree_root(source)):
                    target = staging / relative
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
                    shutil.copymode(path, target)
            else:
                unpack(source or fetch(version, cache), staging)
            for patch in series:
                if applies(staging, patch):
                    apply_patch(staging, patch)
            _sync(staging, dest)
        stamp.write_text(state)
    except OSError as error:
        raise UpstreamError(
            f"{error.filename or dest}: {error.strerror}; check free space and permissions"
        ) from error
    return True


def _check_dest(dest: Path, source: Path | None) -> None:
    """Refuses a folder whose files would be lost or mixed with the source."""
    if dest.is_dir() and any(dest.iterdir()) and not (dest / STAMP).is_file():
        raise UpstreamError(f"{dest}: holds other files; choose an empty folder")
    if source is not None and source.is_dir():
        root, target = tree_root(source).resolve(), dest.resolve()
        inside = target.is_relative_to(root) and wanted(target.relative_to(root).as_posix())
        if inside or root.is_relative_to(target):
            raise UpstreamError(f"{dest}: overlaps the source tree {source}; choose another folder")


def main(argv: list[str] | None = None) -> int:
    """Command line; errors are one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(prog="upstream.py", description="The pinned llama.cpp source.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("fetch", help="download and verify the source; prints its path")
    command.add_argument("--version", default=DEFAULT_VERSION)
    command = commands.add_parser("prepare", help="unpack and patch the source")
    command.add_argument("--dest", type=Path, required=True)
    command.add_argument("--source", type=Path)
    command.add_argument("--stock", action="store_true", help="apply no patches")
    command.add_argument("--patches", type=Path, default=default_patches())
    args = parser.parse_args(argv)
    try:
        if args.command == "fetch":
            print(fetch(args.version))
        else:
            done = prepare(args.dest, source=args.source, patches=None if args.stock else args.patches)
            print(f"llama.cpp source in {args.dest}: {'updated' if done else 'up to date'}")
    except (UpstreamError, OSError) as error:
        print(f"ggml-ext: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ggml-ext: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
