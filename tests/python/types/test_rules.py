"""Which tensors are quantised, to what, on names and shapes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.source import Shape
from ggml_ext.types.rules import (
    Choice,
    allows_quantization,
    choose,
    compile_rules,
    fallback,
    overrides,
    without_effect,
)

_BLOCKS = {
    "fq4_64": 64,
    "fq3_64": 64,
    "f32": 1,
    "f16": 1,
    "bf16": 1,
    "q4_0": 32,
    "q5_0": 32,
    "q8_0": 32,
    "mxfp4": 32,
    "nvfp4": 64,
}


def block_size(name: str) -> int:
    return _BLOCKS.get(name, 256)


def bf16(name: str, *dims: int) -> Shape:
    return Shape(name, dims, "bf16")


LAYER = [
    Shape("blk.0.attn_norm.weight", (256,), "f32"),
    bf16("blk.0.attn_q.weight", 256, 256),
    bf16("blk.0.ffn_down.weight", 512, 256),
]
EMBEDDING = bf16("token_embd.weight", 256, 320)
HEAD = bf16("output.weight", 256, 320)


def targets(shapes: list[Shape], base: str = "fq4", arch: str = "llama", **options: object) -> dict[str, str]:
    rules = compile_rules(base, options.get("type_for", ()), options.get("keep", ()))  # type: ignore[arg-type]
    return {choice.name: choice.target for choice in choose(shapes, arch, rules, block_size)}


@pytest.mark.parametrize(
    ("name", "dims", "allowed"),
    [
        ("blk.0.attn_q.weight", (256, 256), True),
        ("blk.0.ffn_up_exps.weight", (256, 512, 8), True),
        ("token_embd.weight", (256, 320), True),
        ("output.weight", (256, 320), True),
        ("output_norm.weight", (256,), False),
        ("blk.0.attn_q.bias", (256, 2), False),
        ("blk.0.attn_q_norm.weight", (64, 4), False),
        ("blk.0.ffn_gate_inp.weight", (256, 8), False),
        ("blk.0.ssm_conv1d.weight", (4, 256), False),
        ("position_embd.weight", (256, 512), False),
        ("token_types.weight", (256, 2), False),
        ("v.patch_embd.weight", (16, 16, 3, 256), False),
        ("blk.0.column.weight", (256, 1, 1), False),
    ],
)
def test_which_tensors_are_quantised(name: str, dims: tuple[int, ...], allowed: bool) -> None:
    assert allows_quantization(Shape(name, dims, "f16"), "llama") is allowed


def test_one_architecture_has_names_of_its_own() -> None:
    tensor = bf16("blk.0.attn_k_b.weight", 256, 256)
    assert allows_quantization(tensor, "deepseek2")
    assert not allows_quantization(tensor, "glm5-next")


@pytest.mark.parametrize(
    ("wanted", "row", "used"),
    [
        ("fq4", 512, "fq4"),
        ("fq4", 576, "fq4_64"),
        ("fq4", 288, "q5_0"),
        ("fq4_64", 288, "q5_0"),
        ("fq3", 512, "fq3"),
        ("fq3", 576, "fq3_64"),
        ("fq3", 288, "q4_0"),
        ("fq3_64", 288, "q4_0"),
        ("q4_k", 288, "q5_0"),
        ("q6_k", 288, "q8_0"),
        ("iq4_xs", 96, "iq4_nl"),
        ("fq4", 40, "f16"),
        ("q4_0", 40, "f16"),
        ("f16", 7, "f16"),
    ],
)
def test_rows_that_do_not_fit_fall_back(wanted: str, row: int, used: str) -> None:
    assert fallback(wanted, row, lambda name: 32 if name == "iq4_nl" else block_size(name)) == used


def test_a_type_without_smaller_relative_is_an_error() -> None:
    with pytest.raises(GgmlExtError, match=r"rows of 96 weights do not fit type nvfp4.*--type-for"):
        fallback("nvfp4", 96, block_size)


def test_matrices_get_the_type_and_the_head_six_bits() -> None:
    assert targets([*LAYER, EMBEDDING, HEAD]) == {
        "blk.0.attn_norm.weight": "f32",
        "blk.0.attn_q.weight": "fq4",
        "blk.0.ffn_down.weight": "fq4",
        "token_embd.weight": "fq4",
        "output.weight": "q6_k",
    }


def test_embeddings_that_are_the_head_too_get_six_bits() -> None:
    assert targets([*LAYER, EMBEDDING])["token_embd.weight"] == "q6_k"


def test_the_head_of_falcon_and_of_odd_widths_gets_eight_bits() -> None:
    assert targets([EMBEDDING, HEAD], arch="falcon")["output.weight"] == "q8_0"
    assert targets([EMBEDDING, bf16("output.weight", 288, 320)])["output.weight"] == "q8_0"


def test_float_files_are_uniform_and_keep_f32() -> None:
    small = bf16("blk.0.altup_proj.weight", 256, 4)
    assert targets([*LAYER, small], base="f16") == {
        "blk.0.attn_norm.weight": "f32",
        "blk.0.attn_q.weight": "f16",
        "blk.0.ffn_down.weight": "f16",
        "blk.0.altup_proj.weight": "f16",
    }
    assert targets([*LAYER, small])["blk.0.altup_proj.weight"] == "bf16"


def test_keep_comes_before_type_for_and_the_first_match_wins() -> None:
    found = targets(
        [*LAYER, EMBEDDING, HEAD],
        type_for=[("attn_", "Q8_0"), ("attn_q", "q4_0"), ("output", "fq4"), ("ffn", "q8_0")],
        keep=["ffn_down"],
    )
    assert found["blk.0.attn_q.weight"] == "q8_0"
    assert found["output.weight"] == "fq4"
    assert found["blk.0.ffn_down.weight"] == "bf16"


def test_overrides_fall_back_too() -> None:
    rules = compile_rules("q8_0", [("attn_q", "fq4")], [])
    (choice,) = choose([bf16("blk.0.attn_q.weight", 288, 4)], "llama", rules, block_size)
    assert choice == Choice("blk.0.attn_q.weight", "q5_0", fallback_from="fq4")


def test_what_no_product_reads_keeps_its_type() -> None:
    """The graph tells where it has been looked at, names where not."""
    gain, named = bf16("blk.0.gain.weight", 256, 4), bf16("blk.0.ple_conv1d.weight", 256, 4)
    shapes = [gain, named, HEAD]
    plain = compile_rules("q4_0", [("blk", "q8_0")], [])
    seen = replace(plain, no_matrices=frozenset({gain.name, "blk.0.gain.bias"}))
    for rules, kept, rounded in ((plain, named, gain), (seen, gain, named)):
        found = {choice.name: choice.target for choice in choose(shapes, "llama", rules, block_size)}
        assert found == {kept.name: "bf16", rounded.name: "q8_0", HEAD.name: "q6_k"}
        assert overrides(shapes, "llama", rules) == {kept.name: "bf16", rounded.name: "q8_0"}
        assert without_effect(shapes, "llama", rules) == [kept.name]


def test_overrides_for_llama_quantize_are_the_asked_ones_only() -> None:
    rules = compile_rules("q4_k_m", [("attn", "q8_0")], ["output"])
    assert overrides([*LAYER, HEAD], "llama", rules) == {
        "blk.0.attn_q.weight": "q8_0",
        "output.weight": "bf16",
    }
    assert without_effect([*LAYER, HEAD], "llama", rules) == ["blk.0.attn_norm.weight"]


def test_quantised_sources_are_copied_or_refused() -> None:
    tensor = Shape("blk.0.ffn_up_exps.weight", (256, 512, 4), "mxfp4")
    assert targets([tensor], keep=["exps"]) == {tensor.name: "mxfp4"}
    with pytest.raises(GgmlExtError, match=r"ffn_up_exps.weight is already mxfp4.*--keep"):
        targets([tensor])


@pytest.mark.parametrize("option", ["type_for", "keep"])
def test_a_pattern_without_match_is_an_error(option: str) -> None:
    value = [("atn_q", "q8_0")] if option == "type_for" else ["atn_q"]
    with pytest.raises(GgmlExtError, match=r"atn_q: no tensor's name matches; names look like blk\.0"):
        targets(LAYER, **{option: value})


def test_a_bad_pattern_is_an_error() -> None:
    with pytest.raises(GgmlExtError, match=r"--keep \*bad: not a regular expression"):
        compile_rules("fq4", [], ["*bad"])
    with pytest.raises(GgmlExtError, match=r"--type-for a\(: not a regular expression"):
        compile_rules("fq4", [("a(", "q8_0")], [])
