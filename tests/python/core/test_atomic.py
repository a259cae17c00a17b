"""Files that appear whole or not at all, and what killed runs leave of them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ggml_ext.core import atomic, owner
from ggml_ext.core.errors import GgmlExtError

_BEGUN = """
import os, signal, sys, time
from pathlib import Path
from ggml_ext.core import atomic
folder = Path(sys.argv[1])
with atomic.atomic_path(folder / "m.gguf") as file, atomic.work_folder(folder / "m.gguf") as work:
    file.write_bytes(b"half")
    (work / "source.gguf").write_bytes(b"as large as the model")
    print("begun", flush=True)
    time.sleep(60)
"""

_KILLED = """
import os, signal, sys
from pathlib import Path
from ggml_ext.core import atomic
real = os.open
def killing(path, *arguments, **options):
    handle = real(path, *arguments, **options)
    if str(path).endswith(".run"):
        os.kill(os.getpid(), signal.SIGKILL)
    return handle
os.open = killing
atomic.write_text(Path(sys.argv[1]) / "a", "text")
"""


def begun(folder: Path) -> subprocess.Popen[str]:
    """A process in the middle of its work in ``folder``."""
    child = subprocess.Popen([sys.executable, "-c", _BEGUN, folder], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    return child


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def leftovers(tmp_path: Path) -> Path:
    """A folder in which a run was killed."""
    child = begun(tmp_path)
    child.kill()
    child.communicate()
    assert len(names(tmp_path)) == 4
    return tmp_path


def record_of(folder: Path, suffix: str = ".part") -> tuple[Path, dict[str, object]]:
    for path in folder.glob(".ggml-ext-*.run"):
        facts = json.loads(path.read_text())
        if facts["name"].endswith(suffix):
            return path, facts
    raise AssertionError("no record")


def test_the_next_run_removes_what_a_killed_one_left(leftovers: Path) -> None:
    atomic.write_text(leftovers / "other.txt", "text")
    assert names(leftovers) == ["other.txt"]


def test_a_living_runs_files_stay(tmp_path: Path) -> None:
    child = begun(tmp_path)
    try:
        before = names(tmp_path)
        atomic.sweep(tmp_path)
        atomic.write_text(tmp_path / "m.gguf", "whole")
        assert names(tmp_path) == sorted([*before, "m.gguf"])
    finally:
        child.kill()
        child.communicate()


@pytest.fixture
def unwritten(tmp_path: Path) -> Path:
    """The empty record of a run that was killed as soon as it had made it."""
    child = subprocess.run([sys.executable, "-c", _KILLED, tmp_path], check=False)
    assert child.returncode == -signal.SIGKILL
    (record,) = tmp_path.iterdir()
    assert record.stat().st_size == 0
    return record


def test_an_empty_record_goes_unless_its_lock_is_held(unwritten: Path) -> None:
    """A run holds it while it writes its record, so the record is its own until then."""
    with unwritten.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        atomic.write_text(unwritten.with_name("a"), "text")
        assert names(unwritten.parent) == sorted([unwritten.name, "a"])
    atomic.write_text(unwritten.with_name("a"), "text")
    assert names(unwritten.parent) == ["a"]


def test_without_locks_an_empty_record_stays(unwritten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "lock", lambda _file: False)
    atomic.write_text(unwritten.with_name("a"), "text")
    assert names(unwritten.parent) == sorted([unwritten.name, "a"])


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_run_whose_empty_record_was_swept_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The sweep comes before the record is locked, holds the lock, or meets a run without locks."""
    real, met = owner.lock, []

    def lock(file: owner.HasFileno) -> bool:
        if met:
            return real(file)
        met.extend(tmp_path.iterdir())
        if when == "before":
            atomic.sweep(tmp_path)
            return real(file)
        if when == "during":
            raise BlockingIOError
        met[0].unlink()
        return False

    monkeypatch.setattr(owner, "lock", lock)
    with atomic.atomic_path(tmp_path / "a") as temporary:
        record, facts = record_of(tmp_path)
        assert record not in met
        assert facts["name"] == temporary.name
        assert names(tmp_path) == sorted([record.name, temporary.name])
        temporary.write_text("text")
    assert names(tmp_path) == ["a"]


def test_files_that_only_look_alike_stay(leftovers: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies of a leftover, names of our form, records that name other files: nothing that no run made."""
    copy = tmp_path_factory.mktemp("copies") / "c"
    shutil.copytree(leftovers, copy)
    (copy / ".m.gguf.0123456789abcdef.part").write_text("mine")
    (copy / ".backup.part").write_text("mine")
    (copy / ".ggml-ext-0123456789abcdef.run").write_text("mine")
    (copy / ".ggml-ext-1123456789abcdef.run").write_text("[]")
    (copy / ".ggml-ext-mine.run").touch()
    (copy / "precious").write_text("mine")
    _, facts = record_of(leftovers)
    (copy / "precious.1.part").write_text("mine")
    for number, name in enumerate(("precious", "../precious", ".", "..", ".backup.part", "precious.1.part")):
        record = copy / f".ggml-ext-{number}.run"
        record.touch()
        inode = (copy / "precious").stat().st_ino
        record.write_text(json.dumps({**facts, "record": record.stat().st_ino, "name": name, "inode": inode}))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    atomic.sweep(copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_replaced_leftover_stays(leftovers: Path) -> None:
    """The name is the dead run's, the file another one."""
    _, facts = record_of(leftovers)
    path = leftovers / str(facts["name"])
    (leftovers / "new").write_text("the user's")
    (leftovers / "new").replace(path)
    atomic.sweep(leftovers)
    assert names(leftovers) == [path.name]
    assert path.read_text() == "the user's"


def owned_by(folder: Path, change: Callable[[owner.Owner], owner.Owner]) -> None:
    for path in folder.glob(".ggml-ext-*.run"):
        facts = json.loads(path.read_text())
        facts["owner"] = asdict(change(owner.parse(facts["owner"])))
        path.write_text(json.dumps(facts))


def test_a_process_id_that_is_used_again_does_not_keep_leftovers(leftovers: Path) -> None:
    owned_by(leftovers, lambda it: replace(it, pid=os.getpid()))
    atomic.sweep(leftovers)
    assert names(leftovers) == []


def test_after_a_boot_all_runs_are_dead(leftovers: Path) -> None:
    me = owner.current()
    owned_by(leftovers, lambda _: replace(me, boot="another"))
    atomic.sweep(leftovers)
    assert names(leftovers) == []


def test_runs_on_other_machines_count_as_dead_after_weeks(leftovers: Path) -> None:
    owned_by(leftovers, lambda it: replace(it, boot="another", host="another"))
    before = names(leftovers)
    atomic.sweep(leftovers)
    assert names(leftovers) == before
    for path in leftovers.iterdir():
        os.utime(path, (1, time.time() - 15 * 86400))
    atomic.sweep(leftovers)
    assert names(leftovers) == []


def test_runs_in_other_containers_are_known_by_their_lock(leftovers: Path) -> None:
    owned_by(leftovers, lambda it: replace(it, namespace="another"))
    record, _ = record_of(leftovers)
    with record.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        atomic.sweep(leftovers)
        assert len(names(leftovers)) == 2
    atomic.sweep(leftovers)
    assert names(leftovers) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EPERM])
def test_without_locks_the_process_tells(
    leftovers: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    busy = tmp_path_factory.mktemp("busy")
    child = begun(busy)
    try:
        before = names(busy)
        atomic.sweep(busy)
        assert names(busy) == before
    finally:
        child.kill()
        child.communicate()
    atomic.write_text(leftovers / "a", "text")
    assert names(leftovers) == ["a"]


def test_through_a_symbolic_link_its_target_is_written(tmp_path: Path) -> None:
    big, small = tmp_path / "big", tmp_path / "small"
    big.mkdir()
    small.mkdir()
    for target in ("new", "old"):
        (big / "old").write_text("old")
        link = small / target
        link.symlink_to(Path("..") / "big" / target)
        with atomic.atomic_path(link) as temporary:
            assert temporary.parent == big
            temporary.write_text("text")
            assert names(small) == [target], "nothing of the model's size on the link's disk"
        assert link.is_symlink()
        assert (big / target).read_text() == "text"
        with atomic.work_folder(link) as folder:
            assert folder.parent == big
        link.unlink()
    assert names(big) == ["new", "old"]
    (small / "a").symlink_to("b")
    (small / "b").symlink_to("a")
    with pytest.raises(GgmlExtError, match=r"cannot write: .*a "):
        atomic.write_text(small / "a", "text")


def test_a_refused_mode_does_not_cost_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    atomic.write_text(tmp_path / "a", "hours of work")
    assert (tmp_path / "a").read_text() == "hours of work"


def test_files_get_the_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic.write_text(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC])
def test_what_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A file system without fsync is none of our business; one that is full is."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.ENOSPC:
        with pytest.raises(GgmlExtError, match="No space left"):
            atomic.write_text(tmp_path / "a", "new")
    else:
        atomic.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == ("old" if number == errno.ENOSPC else "new")
    assert names(tmp_path) == ["a"]


def test_what_cannot_be_removed_now_is_removed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        atomic.write_text(tmp_path / "a", "text")
    assert len(names(tmp_path)) == 2
    atomic.tidy()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, os.fsdecode(b"b\xe9.gguf"), "a\nb"])
def test_names_of_every_kind(tmp_path: Path, name: str) -> None:
    try:
        (tmp_path / name).touch()
    except OSError:
        pytest.skip("this file system does not know such names")
    atomic.write_text(tmp_path / name, "text with \udce9")
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "text with \\udce9"
