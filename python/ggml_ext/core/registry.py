"""The methods of a conversion: every transform and every rounding, a row each, and which types are floats.

Whoever offers, checks or carries out a method looks it up here. Nothing else lists them, except the loader in
C (transform_names), which a test holds to this list. A transform NAME is the module transforms/NAME.py with
solve(site, stats, request); a rounding NAME is rounding/NAME.py with encode(w, type_name, hessian, ...). Both
are imported when they are asked for: the command line reads this table without PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_TYPES = ("f32", "f16", "bf16")

OWN_TYPES = ("fq4", "fq4_64", "fq3", "fq3_64")
"""Types that stock llama.cpp refuses."""

SOURCE_TYPES = (*FLOAT_TYPES, "q8_0")
"""Types of weights that are worth rounding anew: what q8_0 has lost is far below what fewer bits lose."""


@dataclass(frozen=True)
class Transform:
    """``online``: whether something is left to do at run time besides a clip. ``heads``: whether it mixes the
    channels of a value head, where that can be folded. ``scales``: whether it scales single channels, which
    hurts types whose small groups have scales of their own."""

    online: bool
    heads: bool
    scales: bool


TRANSFORMS = {
    "none": Transform(online=False, heads=False, scales=False),
    "smoothquant": Transform(online=False, heads=False, scales=True),
    "awq": Transform(online=False, heads=False, scales=True),
    "folded": Transform(online=False, heads=True, scales=True),
    "hadamard": Transform(online=True, heads=True, scales=False),
    "flatquant": Transform(online=True, heads=True, scales=True),
}


@dataclass(frozen=True)
class Rounding:
    """``measures``: whether it needs its inputs' mean squares. ``compensates``: whether it makes up for the
    error of a weight in others, for which it needs all second moments of the inputs. ``otherwise``: the
    rounding of types whose levels it cannot choose one by one (grid.py), "" if it takes all."""

    measures: bool
    compensates: bool
    otherwise: str = ""


ROUNDINGS = {
    "rtn": Rounding(measures=False, compensates=False),
    "imatrix": Rounding(measures=True, compensates=False),
    "gptq": Rounding(measures=True, compensates=True, otherwise="imatrix"),
}
