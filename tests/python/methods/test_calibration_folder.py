"""Whose a calibration's folder is: what is refused, what goes on, and what is removed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from ggml_ext import convert
from ggml_ext.core import owner
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.methods.calibrate import folder as calibration_folder
from ggml_ext.methods.calibrate import run as calibrate
from ggml_ext.methods.calibrate.block_file import block_path
from ggml_ext.methods.calibrate.plan import Plan


def plan() -> Plan:
    return Plan(
        source={}, text="", samples=1, ctx=16, seed=0, parse_special=False, base="fq4", types={},
        fallbacks={}, without_effect=[], transform="none", transform_bits=None, matrices=None,
        rounding="gptq", activation=None, blocks=2, device="cpu",
    )  # fmt: skip


def finish(folder: Path, *, temporary: bool) -> None:
    """What a calibration of two blocks leaves."""
    with calibration_folder.held(folder, temporary=temporary) as mine:
        (folder / "source.gguf").write_text("float model")
        mine.note_source(folder / "source.gguf")
        plan().save(folder)
        for index in range(2):
            block_path(folder, index).write_text("block")


def fail(folder: Path, error: BaseException, *, noted: bool = True) -> None:
    """A calibration that fails with its float model made, but no plan; ``noted``: it made it itself."""
    with calibration_folder.held(folder, temporary=False) as mine:
        (folder / "source.gguf").write_text("float model")
        if noted:
            mine.note_source(folder / "source.gguf")
        os.link(folder / "source.gguf", folder.with_name("source"))
        shutil.copyfile(folder / "lock", folder.with_name("lock"))
        raise error


@pytest.mark.parametrize(
    "files",
    [
        {"source.gguf": "my only float model", ".backup.part": "mine"},
        {"mytext.txt": "my text"},
        {"lock": "my lock"},
        {"plan.json": '{"my": "plan"}'},
        {"plan.json": '{"my": "plan"}', "lock": ""},
        {"source.gguf": "mine", "lock": ""},
        {"block-000.safetensors": "mine"},
    ],
)
def test_a_folder_with_other_files_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    for temporary in (False, True):
        with (
            pytest.raises(
                GgmlExtError, match=r"c: holds \S+, which no calibration made; choose an empty folder"
            ),
            calibration_folder.held(folder, temporary=temporary),
        ):
            raise AssertionError
        calibrate.discard(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == files


def test_nothing_stays_of_what_failed_before_its_plan(tmp_path: Path) -> None:
    """But for a folder that was there before."""
    (tmp_path / "b" / "users").mkdir(parents=True)
    for folder in (tmp_path / "a" / "new", tmp_path / "b" / "users"):
        with pytest.raises(KeyboardInterrupt):
            fail(folder, KeyboardInterrupt())
    assert not (tmp_path / "a" / "new").exists()
    assert list((tmp_path / "b" / "users").iterdir()) == []


def test_a_file_of_the_users_in_a_begun_folder_stays(tmp_path: Path) -> None:
    """source.gguf that somebody put there while the run went on."""
    folder = tmp_path / "c"
    with pytest.raises(GgmlExtError, match="too short"):
        fail(folder, GgmlExtError("the text is too short"), noted=False)
    assert [path.name for path in folder.iterdir()] == ["source.gguf"]


def test_a_begun_folder_goes_on(tmp_path: Path) -> None:
    """As a run leaves it that was killed before it had a plan."""
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        fail(folder, KeyboardInterrupt())
    folder.mkdir()
    for name, made in (("lock", "lock"), ("source.gguf", "source")):
        folder.with_name(made).replace(folder / name)
    with calibration_folder.held(folder, temporary=False):
        pass
    (folder / "new").write_text("the user's")
    (folder / "new").replace(folder / "source.gguf")
    with (
        pytest.raises(GgmlExtError, match="which no calibration made"),
        calibration_folder.held(folder, temporary=False),
    ):
        raise AssertionError


def test_a_folder_that_convert_made_goes_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "m.gguf.calibration"
    finish(folder, temporary=True)
    calibrate.discard(folder)
    assert not folder.exists()


def test_files_of_the_users_in_a_folder_that_convert_made_stay(tmp_path: Path) -> None:
    folder = tmp_path / "m.gguf.calibration"
    finish(folder, temporary=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "block-002.safetensors").write_text("mine")
    (folder / "observation").mkdir()
    (folder / "observation" / "sums-0.bin").write_text("mine")
    calibrate.discard(folder)
    left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert sorted(left) == ["block-002.safetensors", "notes.txt", "observation/sums-0.bin"]


def test_a_finished_calibration_stays(tmp_path: Path) -> None:
    """Made by calibrate -o, or by convert and then gone on with by calibrate -o, or copied."""
    made, gone_on, copied = (tmp_path / name for name in ("made", "gone_on", "copied"))
    finish(made, temporary=False)
    finish(made, temporary=True)
    finish(gone_on, temporary=True)
    shutil.copytree(gone_on, copied)
    finish(gone_on, temporary=False)
    finish(gone_on, temporary=True)
    for folder in (made, gone_on, copied):
        before = sorted(folder.iterdir())
        calibrate.discard(folder)
        assert sorted(folder.iterdir()) == before


def test_a_calibration_of_an_older_version_goes_on_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    for lock in ("", "\0" * 300):  # none, or lost in a power failure
        finish(folder, temporary=True)
        (folder / "lock").write_text(lock)
        finish(folder, temporary=True)
        calibrate.discard(folder)
        assert (folder / "plan.json").exists()


def test_a_folder_in_use(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    finish(folder, temporary=True)
    with calibration_folder.held(folder, temporary=True):
        with (
            pytest.raises(GgmlExtError, match="another run is using it"),
            calibration_folder.held(folder, temporary=True),
        ):
            raise AssertionError
        calibrate.discard(folder)
    assert (folder / "plan.json").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EPERM])
def test_without_locks_one_can_calibrate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Lustre without -o flock, 9p, NFS without lockd; the process in the lock file keeps two runs apart."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = tmp_path / "c"
    finish(folder, temporary=False)
    monkeypatch.setattr(owner, "lives", lambda _owner: True)
    finish(folder, temporary=False)  # by the same process
    lock = folder / "lock"
    lock.write_text(lock.read_text().replace(f'"pid": {os.getpid()}', '"pid": 1'))
    with pytest.raises(GgmlExtError, match="another run is using it"):
        finish(folder, temporary=False)
    monkeypatch.setattr(owner, "lives", lambda _owner: False)
    finish(folder, temporary=False)


def test_convert_uses_a_folder_beside_the_real_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says that it may be removed."""
    (tmp_path / "big").mkdir()
    (tmp_path / "m.gguf").symlink_to(tmp_path / "big" / "m.gguf")
    (tmp_path / "text").write_text("text")
    seen: list[object] = []

    def stop(_request: object, folder: Path, **options: object) -> None:
        seen.extend((folder, options["temporary"]))
        raise GgmlExtError("enough")

    monkeypatch.setattr(calibrate, "calibrate", stop)
    monkeypatch.setattr(convert.recipes, "check", lambda *_, **__: None)
    with pytest.raises(GgmlExtError, match="enough"):
        convert.convert(tmp_path, tmp_path / "m.gguf", recipe="flat4", calibration=tmp_path / "text")
    assert seen == [tmp_path / "big" / "m.gguf.calibration", True]
