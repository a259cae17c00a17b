"""What is checked and measured: one entry per kernel. The list of the tests that need a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class CheckError(Exception):
    """Something that the user can mend, in one line."""


@dataclass(frozen=True)
class Ops:
    """Cases of upstream's test-backend-ops, CPU against CUDA. ``params``: a regular expression over a case's
    parameters; ``attention``: value of GGML_EXT_ATTN."""

    op: str
    params: str = ""
    attention: str = ""

    def __str__(self) -> str:
        parts = [self.op, self.params, f"GGML_EXT_ATTN={self.attention}" if self.attention else ""]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Kernel:
    """``first``: its smallest cases, which say whether it runs at all. ``ops``: all its cases. ``sanitize``:
    a few of them, for compute-sanitizer. ``bench``: parts of bench_device. ``profile``: device functions that
    ncu looks at, by regular expressions, while the first of these parts runs."""

    name: str
    first: tuple[Ops, ...]
    ops: tuple[Ops, ...]
    sanitize: tuple[Ops, ...]
    bench: tuple[str, ...] = ()
    profile: tuple[str, ...] = ()


_HEADS = r"hsk=(64|96|128|256),"
_CACHES = "type_K=(q8_0|q4_0),type_V=(q8_0|q4_0)"
# Of a product, by the kernel that takes them: one column, a few, tiles of 16, 32, 64 and 128.
_COLUMNS = (
    "1",
    "[2-8]",
    "9|1[0-6]",
    "1[7-9]|2[0-9]|3[0-2]",
    "3[3-9]|[45][0-9]|6[0-4]",
    "6[5-9]|[7-9][0-9]|[0-9]{3,}",
)

KERNELS = (
    Kernel(
        "scale_add",
        (Ops("EXT_SCALE_ADD", r"ne=\[1,"),),
        (Ops("EXT_SCALE_ADD"),),
        (Ops("EXT_SCALE_ADD", r"ne=\[33"),),
    ),
    Kernel(
        "act_round",
        (Ops("EXT_ACT_ROUND", r"ne=\[333.*bits=4,group=100"),),
        (Ops("EXT_ACT_ROUND"),),
        (Ops("EXT_ACT_ROUND", r"ne=\[333.*bits=4,group=100"),),
    ),
    Kernel(
        "kron",
        (Ops("EXT_KRON", "n1=(7|64),"),),
        (Ops("EXT_KRON"), Ops("EXT_KRON_MUL_MAT")),
        (Ops("EXT_KRON", r"n1=(7|64),"), Ops("EXT_KRON_MUL_MAT")),
        ("kron",),
        ("ggml_ext_kron_kernel",),
    ),
    Kernel(
        "sample",
        (Ops("EXT_SAMPLE", r"n_vocab=333,.*padded=1"),),
        (Ops("EXT_SAMPLE"),),
        (Ops("EXT_SAMPLE", r"n_vocab=(333|32000),.*padded=1"),),
        ("sample",),
        ("ggml_ext_sample_kernel",),
    ),
    Kernel(
        "fq4_get_rows",
        (Ops("GET_ROWS", "type=fq4,n=256"),),
        (Ops("GET_ROWS", "type=fq4"), Ops("CPY", "type_src=fq4")),
        (Ops("GET_ROWS", "type=fq4"),),
    ),
    Kernel(
        "fq4_mul_mat",
        tuple(
            Ops("MUL_MAT", rf"type_a={name},.*m=33,n={n},k={k},")
            for name, k in (("fq4", 256), ("fq4_64", 576))
            for n in (1, 2, 9, 33)
        ),
        (
            *(Ops("MUL_MAT", rf"type_a=fq4.*,n=({columns}),k") for columns in _COLUMNS),
            Ops("MUL_MAT_ID", "type_a=fq4"),
            Ops("MUL_MAT_VEC_FUSION", "type=fq4"),
        ),
        (Ops("MUL_MAT", r"type_a=fq4.*m=33,n=(1|7|33),k=512"), Ops("MUL_MAT_ID", r"type_a=fq4.*n=(2|33),")),
        ("fq4_mul_mat", "fq4_mul_mat_id"),
        ("ggml_ext_fq4_vec_kernel", "ggml_ext_fq4_tiles_kernel"),
    ),
    Kernel(
        "attention_prefill",
        (Ops("FLASH_ATTN_EXT", rf"hsk=64,.*kv=512,nb=64,.*{_CACHES}", "half"),),
        (
            *(
                Ops("FLASH_ATTN_EXT", rf"{_HEADS}.*nb=(32|75|350),.*type_K=f16,type_V=f16", mode)
                for mode in ("half/f16", "full/f16", "half/f16/smooth")
            ),
            *(
                Ops("FLASH_ATTN_EXT", rf"{_HEADS}.*nb=(32|33|40|64|65|70|75|129),.*{_CACHES}", mode)
                for mode in ("half", "full")
            ),
        ),
        (Ops("FLASH_ATTN_EXT", rf"hsk=128,.*kv=(512|577),nb=(33|64),.*{_CACHES}", "half"),),
        ("attention_prefill",),
        ("attention_prefill_kernel",),
    ),
    Kernel(
        "attention_decode",
        (Ops("FLASH_ATTN_EXT", rf"hsk=64,.*kv=129,nb=8,.*{_CACHES}", "half"),),
        (Ops("FLASH_ATTN_EXT", rf"{_HEADS}.*nb=(1|2|3|4|8),.*{_CACHES}", "half"),),
        (Ops("FLASH_ATTN_EXT", rf"hsk=128,.*kv=(129|300),nb=(1|8),.*{_CACHES}", "half"),),
        ("attention_decode",),
        ("ggml_ext_attention_decode_kernel",),
    ),
)

STEPS = ("first", "bench", "models", "ops", "perplexity", "profile", "memcheck", "racecheck")
"""What a run does with the kernels, in the order of its worth; ``bench`` and ``models`` come once more at the
end with more rounds."""

MODELS = ("fq4", "fq4 transforms", "q4_K", "q4_0")
"""Random-weight models of the 8B shape that llama-bench runs, by their type; all but the last are in the
first round."""

LAYERS = 8


def chosen(names: Sequence[str]) -> tuple[tuple[Kernel, ...], tuple[str, ...]]:
    """The kernels and the steps of these names; all kernels where none is named, all steps likewise. Raises
    CheckError for an unknown name."""
    known = [kernel.name for kernel in KERNELS]
    if unknown := [name for name in names if name not in known and name not in STEPS]:
        raise CheckError(f"--only: no {unknown[0]}; choose from {', '.join([*known, *STEPS])}")
    kernels = tuple(kernel for kernel in KERNELS if kernel.name in names)
    return kernels or KERNELS, tuple(step for step in STEPS if step in names) or STEPS


def device_tests(kernels: Sequence[Kernel] = KERNELS) -> list[str]:
    """Names of everything that only a device can run, in the order of a run."""
    found = [f"first {kernel.name}: {ops}" for kernel in kernels for ops in kernel.first]
    found += [f"bench {part}" for kernel in kernels for part in kernel.bench]
    found += ["models of the 8B shape"]
    found += [f"ops {kernel.name}: {ops}" for kernel in kernels for ops in kernel.ops]
    found += ["perplexity: CUDA against CPU"]
    found += [f"profile {kernel.name}: {name}" for kernel in kernels for name in kernel.profile]
    for tool in ("memcheck", "racecheck"):
        found += [f"{tool} {kernel.name}: {ops}" for kernel in kernels for ops in kernel.sanitize]
    return found


@dataclass(frozen=True)
class Target:
    """A ratio that has to be reached: speed of ``contender`` over that of ``over``, or with ``over`` empty
    the bytes that it moves per second over those of the copy. Names as bench_device prints them."""

    part: str
    shape: str
    contender: str
    over: str
    least: float

    @property
    def text(self) -> str:
        """What is compared, for the table."""
        return f"{self.part} {self.shape}: {self.contender} / {self.over or 'copy, bytes'}"


TARGETS = (
    Target("fq4_mul_mat", "m=14336 k=4096 n=1", "fq4", "", 0.80),
    Target("fq4_mul_mat", "m=4096 k=14336 n=1", "fq4", "", 0.80),
    Target("models", "tg128", "fq4", "q4_0", 1.05),
    Target("models", "tg128", "fq4", "q4_K", 1.10),
    Target("models", "pp512", "fq4", "q4_0", 1.2),
    Target("models", "pp512", "fq4", "q4_K", 1.3),
    Target("models", "pp4096", "fq4", "q4_0", 1.2),
    Target("models", "pp4096", "fq4", "q4_K", 1.3),
    Target("models", "tg128", "fq4 transforms", "fq4", 1 / 1.03),
    Target("models", "pp512", "fq4 transforms", "fq4", 1 / 1.05),
    Target("attention_prefill", "n_q=2048 n_kv=32768", "f16 cache, half/f16", "f16 cache, off", 1.5),
    Target("attention_prefill", "n_q=2048 n_kv=4096", "f16 cache, half/f16", "f16 cache, off", 1.0),
    Target("attention_decode", "n_q=1 n_kv=32768", "q8_0 cache, half", "q8_0 cache, off", 1.25),
    Target("attention_decode", "n_q=1 n_kv=32768", "q8_0 cache, half", "f16 cache, off", 1.0),
    Target("sample", "n_vocab=151936 n=32", "fused", "top_p, dist", 10.0),
)

PERPLEXITY_LIMIT = 0.002
"""Largest relative difference of perplexity between CUDA and CPU."""
