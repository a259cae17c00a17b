"""The cffi binding: shapes, dtypes, threads, and every error with its reason.

What would break these: a chunk written to the wrong place, a pointer to a temporary copy, a length that C
trusts, a stock library taken for a patched one.
"""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from ggml_ext.core import paths
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf import ext as gguf_ext
from ggml_ext.runtime import native

RANDOM = np.random.default_rng(7)
ROWS = RANDOM.standard_normal((37, 512), np.float32)


def test_types_are_known_by_name_and_number() -> None:
    assert native.type_id("fq4") == native.type_id("FQ4") == gguf_ext.FQ4
    assert native.type_name(200) == "fq4"
    assert native.type_name(native.type_id("q4_k")) == "q4_K"
    assert native.block_size("fq4") == 256
    assert native.row_size("fq4", 1024) == 4 * 138
    assert native.format_version() == gguf_ext.FORMAT_VERSION
    assert not native.needs_imatrix("fq4")
    assert native.needs_imatrix("iq2_xxs")


def test_generic_path_is_always_there() -> None:
    assert native.cpu_paths()[-1] == "generic"


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_other_types_agree_with_the_gguf_package(type_name: str) -> None:
    data = native.quantize(type_name, ROWS)
    number = gguf.GGMLQuantizationType[type_name]
    assert data.shape == (37, native.row_size(type_name, 512))
    packed = data.view(np.float16) if type_name == "F16" else data
    np.testing.assert_array_equal(
        native.dequantize(type_name, data, 512), gguf.quants.dequantize(packed, number)
    )


def test_f32_passes_through() -> None:
    data = native.quantize("f32", ROWS)
    assert data.tobytes() == ROWS.tobytes()
    assert native.dequantize("f32", data, 512).tobytes() == ROWS.tobytes()


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("type_name", ["fq4", "q4_K", "iq4_xs"])
def test_bytes_do_not_depend_on_threads_or_chunks(
    type_name: str, importance: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = RANDOM.random(512, np.float32) if importance else None
    whole = native.quantize(type_name, ROWS, weights, threads=1)
    monkeypatch.setattr(native, "_CHUNK_WEIGHTS", 3 * 512)
    for threads in (0, 1, 2, 5):
        assert native.quantize(type_name, ROWS, weights, threads=threads).tobytes() == whole.tobytes()


def test_progress_adds_up_to_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_CHUNK_WEIGHTS", 5 * 512)
    done: list[int] = []
    native.quantize("fq4", ROWS, progress=done.append)
    assert len(done) > 1
    assert sum(done) == 37


@pytest.mark.parametrize(
    "rows",
    [ROWS.astype(np.float64), ROWS[::-1][::-1], np.asfortranarray(ROWS), np.repeat(ROWS, 2, 0)[::2]],
    ids=["float64", "view", "fortran", "strided"],
)
def test_any_dtype_and_layout_gives_the_same_bytes(rows: NDArray[np.float32]) -> None:
    assert native.quantize("fq4", rows).tobytes() == native.quantize("fq4", ROWS).tobytes()


def test_empty_and_read_only_arrays() -> None:
    assert native.quantize("fq4", np.empty((0, 256), np.float32)).shape == (0, 138)
    frozen = ROWS.copy()
    frozen.flags.writeable = False
    data = native.quantize("fq4", frozen)
    data.flags.writeable = False
    assert native.dequantize("fq4", data, 512).shape == (37, 512)


def test_interrupt_stops_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_CHUNK_WEIGHTS", 512)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        native.quantize("fq4", np.tile(ROWS, (20, 1)), threads=2, progress=interrupt)
    assert threading.active_count() == before


def test_dot_of_another_type() -> None:
    data = native.quantize("q8_0", ROWS[:1])
    expected = float(native.dequantize("q8_0", data, 512)[0] @ ROWS[1])
    assert native.dot("q8_0", data[0], ROWS[1]) == pytest.approx(expected, abs=0.5)


def bad_rows(row: int, value: float) -> NDArray[np.float32]:
    rows = ROWS.copy()
    rows[row, 100] = value
    return rows


DATA = np.zeros((1, 276), np.uint8)
ERRORS = {
    "unknown type": (lambda: native.type_id("q4_x"), "unknown tensor type: q4_x; there are: f32, "),
    "unknown id": (lambda: native.type_name(199), "unknown tensor type: id 199"),
    "negative id": (lambda: native.type_name(-1), "unknown tensor type: id -1"),
    "row length": (lambda: native.quantize("fq4", ROWS[:, :300]), "row length 300 does not fit type fq4"),
    "negative length": (lambda: native.row_size("fq4", -256), "row length -256"),
    "activation type": (lambda: native.quantize("q8_K", ROWS), "cannot be quantised to type q8_K"),
    "integer type": (lambda: native.quantize("i32", ROWS), "cannot be quantised to type i32"),
    "one dimension": (lambda: native.quantize("fq4", ROWS[0]), "wrong shape of weights: [512]"),
    "no imatrix": (lambda: native.quantize("iq2_xxs", ROWS), "iq2_xxs needs an importance matrix"),
    "imatrix length": (lambda: native.quantize("fq4", ROWS, ROWS[0, :256]), "importance matrix does not fit"),
    "imatrix sign": (lambda: native.quantize("fq4", ROWS, ROWS[0]), "importance matrix holds a negative"),
    "NaN": (lambda: native.quantize("fq4", bad_rows(11, np.nan)), "NaN or Inf in row 11"),
    "Inf": (lambda: native.quantize("q4_0", bad_rows(36, -np.inf)), "NaN or Inf in row 36"),
    "too large": (lambda: native.quantize("fq4", bad_rows(5, 1e9)), "values too large for the type in row 5"),
    "fp16": (lambda: native.quantize("f16", bad_rows(5, 1e5)), "values too large for the type in row 5"),
    "data shape": (lambda: native.dequantize("fq4", DATA, 256), "wrong data for type fq4: uint8 [1, 276]"),
    "data dtype": (
        lambda: native.dequantize("fq4", DATA.view(np.int8), 512),
        "wrong data for type fq4: int8",
    ),
    "dot shape": (lambda: native.dot("fq4", DATA[0], ROWS[0, :256]), "wrong shapes for a dot product"),
    "dot path": (lambda: native.dot("fq4", DATA[0], ROWS[0], "sse9"), "no dot-product path sse9"),
    "dot type": (
        lambda: native.dot("q4_0", np.zeros(288, np.uint8), ROWS[0], "generic"),
        "no dot product for",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_CHUNK_WEIGHTS", 4 * 512)
    call, message = ERRORS[case]
    with pytest.raises(GgmlExtError) as caught:
        call()
    assert message in str(caught.value)
    assert ";" in str(caught.value), "no remedy"


def header() -> Path:
    return paths.include_dir() / "ggml-ext.h"


def test_stock_library_is_recognised(stock_build: Path) -> None:
    base, cpu = stock_build / "libggml-base.so", stock_build / "libggml-cpu.so"
    with pytest.raises(GgmlExtError, match=r"stock llama.cpp: .*lacks ggml_ext_format_version"):
        native._open(header(), base, cpu)


def test_missing_library_and_header(tmp_path: Path) -> None:
    with pytest.raises(GgmlExtError, match=r"cannot load: .*nowhere.so"):
        native._open(header(), tmp_path / "nowhere.so", tmp_path / "nowhere.so")
    with pytest.raises(GgmlExtError, match=r"cannot read: .*nowhere.h"):
        native._open(tmp_path / "nowhere.h", paths.library("ggml-base"), paths.library("ggml-cpu"))
    (tmp_path / "empty.h").write_text("")
    with pytest.raises(GgmlExtError, match="damaged header"):
        native._open(tmp_path / "empty.h", paths.library("ggml-base"), paths.library("ggml-cpu"))


def test_header_of_another_version_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "ggml-ext.h"
    other.write_text(header().read_text().replace("GGML_EXT_FORMAT_VERSION 2", "GGML_EXT_FORMAT_VERSION 3"))
    with pytest.raises(GgmlExtError, match="versions differ"):
        native._open(other, paths.library("ggml-base"), paths.library("ggml-cpu"))


VARIANT = "int ggml_backend_score(void); int ggml_backend_score(void) { return %d; }\n"


def variants(folder: Path, monkeypatch: pytest.MonkeyPatch, **scores: int) -> None:
    """A folder like that of a build with GGML_CPU_ALL_VARIANTS, in the place of the installed libraries."""
    for name, score in scores.items():
        source, library = folder / f"{name}.c", folder / f"libggml-cpu-{name}.so"
        source.write_text(VARIANT % score)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("GGML_EXT_LIB_DIR", str(folder))


def test_the_best_variant_of_the_cpu_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants(tmp_path, monkeypatch, haswell=64, x64=1, zen4=0)
    assert native._cpu_library() == tmp_path / "libggml-cpu-haswell.so"


def test_variants_for_other_processors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants(tmp_path, monkeypatch, skylakex=0, zen4=0)
    with pytest.raises(GgmlExtError, match=r"no CPU library in .* is for this processor; build"):
        native._cpu_library()
