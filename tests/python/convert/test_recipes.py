"""Recipes, options beside them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ggml_ext import recipes
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.recipes import Method, Options, check, load, remarks, resolve
from ggml_ext.runtime import native


def checked(method: Method, **options: Any) -> None:
    defaults: dict[str, Any] = {"text": True, "imatrix": False}
    check(method, options.pop("type_for", []), **{**defaults, **options})


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_can_be_carried_out(name: str) -> None:
    recipe = load(name)
    assert recipe.description
    checked(recipe.method)
    assert recipe.method.blockwise


def test_the_recipes_are_the_documented_ones() -> None:
    assert recipes.names() == ["best", "flat4", "flat4-m", "stock4", "w4a4"]
    assert not load("stock4").method.online
    assert load("w4a4").method.activation == "a4"


def test_a_size_alone_is_the_recipe_best() -> None:
    best = load("best").method
    assert best.bpw is not None
    assert resolve("best", Options(), importances=True) == best
    sized = resolve(None, Options(size=10**8), importances=True)
    assert (sized.size, sized.bpw) == (10**8, None)
    assert sized.allocates
    assert (sized.transform, sized.rounding) == (best.transform, best.rounding)
    assert resolve(None, Options(bpw=5.0), importances=True).bpw == 5.0
    stock = resolve(None, Options(stock=True), importances=True)
    assert stock.bpw == best.bpw
    assert not stock.online
    assert not resolve("best", Options(type_name="q4_k"), importances=True).allocates
    named = resolve("stock4", Options(size=10**8, transform="hadamard"), importances=True)
    assert named.transform_bits == best.transform_bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(type_name="q4_k", size=10**8), "--type q4_k beside --size, which chooses types"),
        (Options(size=10**8, bpw=4.5), "--size beside --bpw: two sizes"),
        (Options(stock=True, transform="flatquant"), "--stock with type q4_k, transform flatquant"),
        (Options(stock=True, activation="a4"), "--stock with .* activations a4: unpatched"),
    ],
)
def test_what_does_not_go_with_a_size(options: Options, message: str) -> None:
    with pytest.raises(GgmlExtError, match=message) as caught:
        resolve(None, options, importances=True)
    assert ";" in str(caught.value), "no remedy"


def test_options_beside_a_recipe_win() -> None:
    method = resolve("flat4", Options(type_name="Q4_K", rounding="rtn"), importances=True)
    assert (method.type_name, method.rounding, method.transform) == ("q4_k", "rtn", "flatquant")
    assert method.transform_bits == load("flat4").method.transform_bits


@pytest.mark.parametrize(
    ("options", "importances", "rounding"),
    [
        (Options(), False, "rtn"),
        (Options(), True, "imatrix"),
        (Options(transform="awq"), True, "gptq"),
        (Options(rounding="gptq"), True, "gptq"),
    ],
)
def test_the_rounding_follows_from_what_is_given(options: Options, importances: bool, rounding: str) -> None:
    assert resolve(None, options, importances=importances).rounding == rounding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(transform="quarot"), "--transform quarot: unknown; there are: none, smoothquant"),
        (Options(rounding="awq"), "--rounding awq: unknown; there are: rtn"),
        (Options(activation="a2"), "--activation a2: unknown; there are: a8, a4"),
    ],
)
def test_unknown_names(options: Options, message: str) -> None:
    with pytest.raises(GgmlExtError, match=message):
        resolve(None, options, importances=False)


def test_unknown_recipe() -> None:
    with pytest.raises(
        GgmlExtError, match=r"--recipe flat5: no such recipe; there are: best, flat4, flat4-m"
    ):
        load("flat5")


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (Method(transform="awq"), {"text": False, "imatrix": True}, "instead of --imatrix"),
        (Method(), {"imatrix": True}, "give one of the two"),
        (Method(), {}, "--rounding rtn: without a transform it uses no calibration"),
        (Method(activation="a4"), {"text": False}, "--activation a4: nothing prepares this model"),
        (Method("f32", "flatquant", "gptq"), {}, "type f32 leaves nothing to round"),
        (
            Method("fq4", "none", "rtn", bpw=5.0),
            {},
            "--rounding rtn: types are chosen by what they cost",
        ),
        (Method("q5_k_m", "awq", "gptq"), {}, "only llama-quantize knows this mix"),
        (Method("q5_z", rounding="imatrix"), {}, "unknown type q5_z; use fq4"),
        (Method(rounding="imatrix"), {"type_for": [("attn", "q4_k_m")]}, "unknown type q4_k_m"),
        (Method("i32", rounding="imatrix"), {}, "^weights cannot be quantised to type i32; choose"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(method: Method, given: Any, message: str) -> None:
    with pytest.raises(GgmlExtError, match=message) as caught:
        checked(method, **given)
    assert ";" in str(caught.value), "no remedy"


@pytest.mark.parametrize("method", [Method("f16", rounding="imatrix"), Method("q5_k_m", "awq", "gptq")])
def test_what_is_wrong_with_the_library_is_not_blamed_on_the_type(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> object:
        raise GgmlExtError("cannot load: libggml-base.so; reinstall ggml-ext with pip")

    monkeypatch.setattr(native, "_native", broken)
    with pytest.raises(GgmlExtError, match=r"^cannot load: libggml-base"):
        checked(method)


def test_what_may_surprise_is_said() -> None:
    assert remarks(Method(transform="flatquant"), ["fq4", "q6_k"]) == []
    assert "hurt nvfp4" in remarks(Method("nvfp4", "awq"), ["nvfp4"])[0]
    assert remarks(Method("mxfp4", "hadamard"), ["mxfp4"])[0].startswith("the transform is left for run time")
    assert "stock llama.cpp" in remarks(Method("q4_k_m", "flatquant"), ["q4_k", "q6_k"])[0]
    assert remarks(Method("q4_k_m", "awq"), ["q4_k", "q6_k"]) == []
