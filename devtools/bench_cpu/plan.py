"""What is run: groups of contenders whose speeds are compared within a round.

Long tasks have fewer rounds, since stock fills a deep q8_0 cache at some 100 tokens per second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from devtools.bench_cpu.models import SHAPES, TYPES, Model
from ggml_ext.core.errors import GgmlExtError, listed

STOCK, PATCHED = "stock", "patched"
OURS = "FQ4"  # the type that stock llama.cpp does not have
CACHE_WEIGHTS = "Q4_0"  # weights of the runs that compare caches: both builds have the type
PARTS = ("prefill", "decode", "kv")

ROUNDS, QUICK_ROUNDS = 5, 3
LAYERS = {"1B": 6, "0.5B": 8}
CACHE_LAYERS = 4
"""With the vocabulary of 32,000 the head has the share of the weights that it has in Llama-3.2-1B (21 %)."""

PROMPT, LONG_PROMPT, GENERATED = 512, 4096, 128
DEPTHS, QUICK_DEPTHS = (0, 4096, 8192), (4096,)
_QUICK_TYPES = (OURS, "Q4_0", "Q4_K", "IQ4_XS")
_LONG_TYPES = _QUICK_TYPES

# Tokens per second and slowdowns behind the progress bar's estimate; no figure depends on them.
_PROMPT_RATE, _GENERATION_RATE = 420.0, 90.0
_DEPTH_SLOWDOWN = {"f16": 1 / 2800, "q8_0": 1 / 690}  # per position already in stock's cache
_START = 0.7


@dataclass(frozen=True)
class Contender:
    """``build``: STOCK or PATCHED. ``cache``: type of K and V as llama-bench takes it."""

    build: str
    type_name: str
    cache: str = "f16"

    def __str__(self) -> str:
        return f"{self.build} {self.type_name}" + (f", {self.cache} cache" if self.cache != "f16" else "")


@dataclass(frozen=True)
class Group:
    """Contenders that take turns with one task: ``prompt`` tokens at once, ``generated`` tokens one by one
    (0: not measured), both with ``depth`` tokens in the cache, ``repetitions`` times a round."""

    name: str
    shape: str
    layers: int
    contenders: tuple[Contender, ...]
    rounds: int
    prompt: int = 0
    generated: int = 0
    depth: int = 0
    repetitions: int = 1
    warm_up: bool = True

    def model(self, contender: Contender) -> Model:
        """The file that the contender runs."""
        return Model(SHAPES[self.shape], self.layers, contender.type_name)

    def order(self, round_number: int) -> tuple[Contender, ...]:
        """Contenders in the order of a round: back and forth, so that a drift hits both ends alike."""
        return self.contenders if round_number % 2 == 0 else self.contenders[::-1]

    def pairs(self) -> list[tuple[Contender, Contender]]:
        """(patched, stock) pairs whose ratio says something."""
        stock = [c for c in self.contenders if c.build == STOCK]
        return [
            (ours, other)
            for ours in self.contenders
            if ours.build == PATCHED
            for other in stock
            if (ours.type_name in (OURS, other.type_name)) and (ours.cache, other.cache) != ("f16", "q8_0")
        ]

    def expected_seconds(self, contender: Contender) -> float:
        """Rough length of one run, for the progress bar."""
        slow = _DEPTH_SLOWDOWN["f16" if contender.build == PATCHED else contender.cache]
        at_depth = 1 + self.depth * slow
        prompts = self.prompt * (self.repetitions + self.warm_up) * (1 + self.prompt * slow / 2) * at_depth
        fill = self.depth * (1 + self.depth * slow / 2)
        size = self.layers / LAYERS["1B"] if self.shape == "1B" else 0.3
        generated = self.repetitions * self.generated * math.sqrt(at_depth)
        return _START + size * ((prompts + fill) / _PROMPT_RATE + generated / _GENERATION_RATE)


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for. ``layers``: None for LAYERS and CACHE_LAYERS, else for all models."""

    parts: tuple[str, ...] = PARTS
    types: tuple[str, ...] = tuple(TYPES)
    shapes: tuple[str, ...] = tuple(SHAPES)
    rounds: int | None = None
    layers: int | None = None
    quick: bool = False


def check_names(kind: str, names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """``names`` in the order of ``known``. Raises GgmlExtError for one that is not known, and for none."""
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise GgmlExtError(f"unknown {kind}: {', '.join(unknown) or 'none'}; choose from {', '.join(known)}")
    return tuple(name for name in known if name in names)


def groups(wanted: Wanted) -> list[Group]:
    """The groups of a run, in their order. Raises GgmlExtError if nothing would be measured."""
    rounds = wanted.rounds or (QUICK_ROUNDS if wanted.quick else ROUNDS)
    few, fewest = max(1, rounds // 2), max(1, rounds // 4)
    types = [t for t in wanted.types if not wanted.quick or t in _QUICK_TYPES]
    shapes = [s for s in wanted.shapes if not wanted.quick or s == "1B"]
    contenders = _by_type(types)
    prefill, decode = "prefill" in wanted.parts, "decode" in wanted.parts
    found = []
    if (prefill or decode) and contenders:
        for shape in shapes:
            found.append(
                Group(
                    f"{shape}, short",
                    shape,
                    wanted.layers or LAYERS[shape],
                    contenders,
                    rounds if shape == "1B" else few,
                    prompt=PROMPT if prefill else 0,
                    generated=GENERATED if decode else 0,
                )
            )
    long = _by_type([t for t in types if t in _LONG_TYPES])
    if prefill and long and "1B" in shapes and not wanted.quick:
        layers = wanted.layers or LAYERS["1B"]
        found.append(Group("1B, long", "1B", layers, long, fewest, prompt=LONG_PROMPT, warm_up=False))
    if "kv" in wanted.parts and "1B" in shapes:
        found += [
            _cache_group(depth, wanted.layers or CACHE_LAYERS, fewest if depth == max(DEPTHS) else few)
            for depth in (QUICK_DEPTHS if wanted.quick else DEPTHS)
        ]
    if not found:
        raise GgmlExtError(
            f"nothing to measure with {listed(list(wanted.shapes))}; caches need shape 1B; "
            "choose other --shapes or --only"
        )
    return found


def _by_type(types: Sequence[str]) -> tuple[Contender, ...]:
    """Each type where it can run; Q4_0 in both builds: what differs there is the noise of the machine."""
    found = [Contender(STOCK, t) for t in types if t != OURS]
    # FQ4 between the types that it is compared with, so that it is far from none of them.
    if OURS in types:
        found.insert(min(2, len(found)), Contender(PATCHED, OURS))
    if "Q4_0" in types:
        found.insert(1, Contender(PATCHED, "Q4_0"))
    return tuple(found)


def _cache_group(depth: int, layers: int, rounds: int) -> Group:
    both = [Contender(STOCK, CACHE_WEIGHTS), Contender(PATCHED, CACHE_WEIGHTS, "q8_0")]
    contenders = [*both, Contender(STOCK, CACHE_WEIGHTS, "q8_0")]
    if depth == DEPTHS[1]:
        contenders.append(Contender(PATCHED, OURS, "q8_0"))
    return Group(
        f"1B, depth {depth}",
        "1B",
        layers,
        tuple(contenders),
        rounds,
        prompt=PROMPT,
        generated=GENERATED,
        depth=depth,
        warm_up=depth == 0,  # filling the cache warms up
    )
