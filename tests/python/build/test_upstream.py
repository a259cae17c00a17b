"""The pinned source: verification, safe unpacking, idempotence."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ggml_ext.build import upstream
from ggml_ext.build.upstream import UpstreamError
from ggml_ext.core.files import cache_dir

TOP = "llama_cpp_python-9.9.9"
ROOT = f"{TOP}/vendor/llama.cpp"
FILES = {
    "CMakeLists.txt": "project(llama.cpp)\n",
    "include/llama.h": "// llama\n",
    "ggml/CMakeLists.txt": "project(ggml)\n",
    "ggml/src/ggml.c": "one\ntwo\nthree\nfour\nfive\n",
    "src/llama.cpp": "alpha\nbeta\ngamma\n",
    "docs/large.md": "not wanted\n",
}
PATCH = """Purpose.

--- a/ggml/src/ggml.c
+++ b/ggml/src/ggml.c
@@ -12,2 +12,3 @@
 two
+hook
 three
"""


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o644
    return info


def write_archive(path: Path, *extra: tarfile.TarInfo, root: str = ROOT) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in FILES.items():
            info = member(f"{root}/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
        for info in extra:
            tar.addfile(info, io.BytesIO())
    return path


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pinned release that is already in the cache."""
    cache = tmp_path / "cache"
    cache.mkdir()
    archive = write_archive(cache / "llama_cpp_python-9.9.9.tar.gz")
    monkeypatch.setenv("GGML_EXT_CACHE", str(cache))
    monkeypatch.setitem(upstream.PINNED, "9.9.9", hashlib.sha256(archive.read_bytes()).hexdigest())
    return "9.9.9"


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    folder = tmp_path / "patches"
    folder.mkdir()
    (folder / "series").write_text("# order of application\n0001-hook.patch\n")
    (folder / "0001-hook.patch").write_text(PATCH)
    return folder


def state(tree: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file."""
    files = (path for path in tree.rglob("*") if path.is_file())
    return {str(path.relative_to(tree)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_fetch_rejects_a_cached_file_with_a_wrong_hash(release: str) -> None:
    archive = upstream.fetch(release)
    archive.write_bytes(b"tampered")
    with pytest.raises(UpstreamError) as error:
        upstream.fetch(release)
    message = str(error.value)
    actual = hashlib.sha256(b"tampered").hexdigest()
    assert all(part in message for part in (str(archive), upstream.PINNED[release], actual, "try again"))
    assert "\n" not in message
    assert archive.read_bytes() == b"tampered", "not ours to remove"


def test_a_download_with_a_wrong_hash_does_not_get_into_the_cache(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = upstream.fetch(release)
    archive.unlink()

    def download(_version: str, folder: Path) -> Path:
        (folder / archive.name).write_bytes(b"tampered")
        return folder / archive.name

    monkeypatch.setattr(upstream, "_pip_download", download)
    with pytest.raises(UpstreamError, match=r"SHA-256 is .*check the package index"):
        upstream.fetch(release)
    assert not list(cache_dir().iterdir())


def test_fetch_names_the_known_versions() -> None:
    with pytest.raises(UpstreamError, match=r"0\.0\.1; known: .*0\.3\.36"):
        upstream.fetch("0.0.1")


def test_fetch_reports_a_failed_download_in_one_line(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream.fetch(release).unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        UpstreamError, match=r"pip cannot download llama-cpp-python==9\.9\.9: ERROR.*put "
    ) as error:
        upstream.fetch(release)
    assert "\n" not in str(error.value)
    assert not list(cache_dir().iterdir())


def test_fetch_reports_an_unwritable_cache(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UpstreamError, match=r"cannot write .*set GGML_EXT_CACHE"):
        upstream.fetch(release)


HOSTILE = {
    "absolute": member("/etc/passwd"),
    "parent": member(f"{TOP}/../../outside"),
    "parent in an unwanted part": member(f"{TOP}/docs/../../outside"),
    "backslash": member(f"{ROOT}/src\\..\\x"),
    "symbolic link out": member(f"{ROOT}/src/link", tarfile.SYMTYPE, "../../../../../etc/passwd"),
    "absolute symbolic link": member(f"{ROOT}/src/link", tarfile.SYMTYPE, "/etc/passwd"),
    "symbolic link to another top folder": member(f"{TOP}/link", tarfile.SYMTYPE, "../other/file"),
    "hard link out": member(f"{ROOT}/src/link", tarfile.LNKTYPE, "../secret"),
    "absolute hard link": member(f"{ROOT}/src/link", tarfile.LNKTYPE, "/etc/passwd"),
    "link to a folder": member(f"{ROOT}/src/link", tarfile.SYMTYPE, "../ggml"),
    "character device": member(f"{ROOT}/src/null", tarfile.CHRTYPE),
    "block device": member(f"{ROOT}/src/disk", tarfile.BLKTYPE),
    "pipe": member(f"{TOP}/pipe", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("info", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_members_are_refused(info: tarfile.TarInfo, tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "hostile.tar.gz", info)
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with pytest.raises(
        UpstreamError, match=r"hostile\.tar\.gz: .*(do not use this file|use a plain source tree)"
    ):
        upstream.unpack(archive, inside)
    assert {path.name for path in tmp_path.iterdir()} == {"hostile.tar.gz", "a"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_a_link_to_a_file_inside_becomes_a_copy(tmp_path: Path) -> None:
    archive = write_archive(
        tmp_path / "a.tar.gz", member(f"{ROOT}/src/same.c", tarfile.SYMTYPE, "../ggml/src/ggml.c")
    )
    upstream.unpack(archive, tmp_path / "out")
    copy = tmp_path / "out" / "src" / "same.c"
    assert not copy.is_symlink()
    assert copy.read_text() == FILES["ggml/src/ggml.c"]


@pytest.mark.parametrize("content", [b"", b"no archive", None], ids=["empty", "text", "truncated"])
def test_broken_archives_give_one_line(content: bytes | None, tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tar.gz")
    archive.write_bytes(archive.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UpstreamError, match=r"a\.tar\.gz: cannot unpack") as error:
        upstream.unpack(archive, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_an_archive_without_llama_cpp_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", root=f"{TOP}/elsewhere/deep")
    with pytest.raises(UpstreamError, match=r"holds no llama\.cpp source"):
        upstream.unpack(archive, tmp_path / "out")


def test_prepare_is_idempotent_and_touches_only_what_changes(
    release: str, patches: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "build" / "llama.cpp"
    assert upstream.prepare(dest, patches=patches, version=release)
    assert (dest / "ggml/src/ggml.c").read_text() == "one\ntwo\nhook\nthree\nfour\nfive\n"
    assert not (dest / "docs").exists()
    first = state(dest)
    assert not upstream.prepare(dest, patches=patches, version=release)
    assert state(dest) == first

    (patches / "0001-hook.patch").write_text(PATCH.replace("+hook", "+other hook"))
    assert upstream.prepare(dest, patches=patches, version=release)
    second = state(dest)
    assert {name for name in first if first[name] != second[name]} == {"ggml/src/ggml.c", upstream.STAMP}
    assert [path.name for path in dest.parent.iterdir()] == ["llama.cpp"]

    assert upstream.prepare(dest, version=release)
    assert (dest / "ggml/src/ggml.c").read_text() == FILES["ggml/src/ggml.c"]


def test_prepare_works_inside_another_repository(release: str, patches: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path / "repo"], check=True)
    dest = tmp_path / "repo" / "build" / "llama.cpp"
    upstream.prepare(dest, patches=patches, version=release)
    assert "hook" in (dest / "ggml/src/ggml.c").read_text()


def test_a_patch_that_does_not_fit_is_named_and_tried_again(
    release: str, patches: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "llama.cpp"
    (patches / "0001-hook.patch").write_text(PATCH.replace(" two", " deux"))
    for _ in range(2):
        with pytest.raises(UpstreamError, match=r"0001-hook\.patch: does not apply: .*docs/upstream\.md"):
            upstream.prepare(dest, patches=patches, version=release)
    (patches / "0001-hook.patch").write_text(PATCH)
    assert upstream.prepare(dest, patches=patches, version=release)


@pytest.mark.parametrize(("text", "applied"), [("two", True), ("deux", False)])
def test_a_patch_for_some_releases(
    text: str, applied: bool, release: str, patches: Path, tmp_path: Path
) -> None:
    (patches / "0001-hook.patch").write_text(f"Where ggml/src/ggml.c has {text}\n{PATCH}")
    upstream.prepare(tmp_path / "llama.cpp", patches=patches, version=release)
    assert ("hook" in (tmp_path / "llama.cpp" / "ggml/src/ggml.c").read_text()) == applied


def test_a_patch_missing_from_the_folder_is_named(release: str, patches: Path, tmp_path: Path) -> None:
    (patches / "0001-hook.patch").unlink()
    with pytest.raises(UpstreamError, match=r"series: no such patch: 0001-hook\.patch"):
        upstream.prepare(tmp_path / "llama.cpp", patches=patches, version=release)


def test_a_users_tree_is_copied_and_not_changed(release: str, patches: Path, tmp_path: Path) -> None:
    tree = tmp_path / "mine"
    upstream.unpack(upstream.fetch(release), tree)
    (tree / "src" / "notes.txt").write_text("mine")
    before = state(tree)
    dest = tree / "build" / "llama.cpp"
    assert upstream.prepare(dest, source=tree, patches=patches)
    assert not upstream.prepare(dest, source=tree, patches=patches)
    assert "hook" in (dest / "ggml/src/ggml.c").read_text()
    assert {name: value for name, value in state(tree).items() if not name.startswith("build/")} == before

    (tree / "src" / "llama.cpp").write_text("edited\n")
    assert upstream.prepare(dest, source=tree, patches=patches)
    assert (dest / "src" / "llama.cpp").read_text() == "edited\n"


@pytest.mark.parametrize("root", [ROOT, "llama.cpp-b1234"], ids=["llama-cpp-python", "llama.cpp"])
def test_a_users_archive(root: str, patches: Path, tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "mine.tar.gz", root=root)
    dest = tmp_path / "llama.cpp"
    assert upstream.prepare(dest, source=archive, patches=patches)
    assert "hook" in (dest / "ggml/src/ggml.c").read_text()
    assert not upstream.prepare(dest, source=archive, patches=patches)


def test_folders_with_other_files_are_left_alone(release: str, tmp_path: Path) -> None:
    other = tmp_path / "home"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(UpstreamError, match="holds other files"):
        upstream.prepare(other, version=release)
    tree = tmp_path / "mine"
    upstream.unpack(upstream.fetch(release), tree)
    with pytest.raises(UpstreamError, match="overlaps the source tree"):
        upstream.prepare(tree / "src" / "new", source=tree)
    with pytest.raises(UpstreamError, match="no such file or folder"):
        upstream.prepare(tmp_path / "new", source=tmp_path / "absent")


def test_script_runs_without_the_package(release: str, patches: Path, tmp_path: Path) -> None:
    archive = upstream.fetch(release)
    script = [
        sys.executable,
        "-I",
        "-S",
        str(Path(upstream.__file__)),
        "prepare",
        "--dest",
        str(tmp_path / "out"),
    ]
    arguments = ["--source", str(archive), "--patches", str(patches)]
    done = subprocess.run([*script, *arguments], capture_output=True, text=True, check=True)
    assert "updated" in done.stdout
    assert (tmp_path / "out" / "src" / "llama.cpp").is_file()
    done = subprocess.run([*script, "--source", os.devnull], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("ggml-ext: error: ")
    assert done.stderr.count("\n") == 1
