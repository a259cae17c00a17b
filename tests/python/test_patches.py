"""The patch set: how much of upstream it changes, and that it fits every pinned release."""

from __future__ import annotations

from pathlib import Path

import pytest

from ggml_ext import upstream

MAX_LINES = 120
MAX_FILES = 16


@pytest.fixture(scope="module")
def patches(repo_root: Path) -> Path:
    return repo_root / "ggml_ext" / "patches"


def changed_lines(patch: Path) -> dict[str, int]:
    """Lines added and removed per upstream file; one that is replaced counts twice."""
    counts: dict[str, int] = {}
    name = ""
    for line in patch.read_text().splitlines():
        if line.startswith("+++ "):
            name = line.removeprefix("+++ b/").split("\t")[0]
            counts.setdefault(name, 0)
        elif line.startswith(("+", "-")) and not line.startswith("--- "):
            counts[name] += 1
    return counts


def test_every_patch_is_in_the_series(patches: Path) -> None:
    assert [patch.name for patch in upstream.patch_files(patches)] == sorted(
        path.name for path in patches.glob("*.patch")
    )


def test_patches_stay_small(patches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total: dict[str, int] = {}
    for patch in upstream.patch_files(patches):
        for name, count in changed_lines(patch).items():
            assert count > 0, f"{patch.name} names {name} without changing it"
            total[name] = total.get(name, 0) + count
    lines, files = sum(total.values()), len(total)
    with capsys.disabled():
        releases = ", ".join(upstream.PINNED)
        print(f"\npatches: {lines} changed upstream lines (at most {MAX_LINES}) in {files} files", end=" ")
        print(f"(at most {MAX_FILES}), for llama-cpp-python {releases}")
    assert lines <= MAX_LINES
    assert files <= MAX_FILES


@pytest.mark.parametrize("version", upstream.PINNED)
def test_patches_apply_to_every_pinned_release(version: str, patches: Path, tmp_path: Path) -> None:
    tree = tmp_path / "llama.cpp"
    upstream.prepare(tree, patches=patches, version=version)
    assert not [*tree.rglob("*.rej"), *tree.rglob("*.orig")]
    for patch in upstream.patch_files(patches):
        patched = "".join((tree / name).read_text() for name in upstream.patched_names(patch)).splitlines()
        added = [line[1:] for line in patch.read_text().splitlines() if line.startswith("+")]
        assert set(added) - set(patched) <= {line for line in added if line.startswith("++ b/")}
