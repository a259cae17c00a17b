"""The choice of one type per tensor under a bound of bytes.

What would break these: a choice that is larger than the bound, options off the convex hull, steps of a tensor
taken out of their order, bytes left that something better would have had."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggml_ext.types.allocation import Option, TooSmallError, allocate, hull

OPTION = st.tuples(st.integers(1, 40), st.floats(0, 100, allow_nan=False))
OPTIONS = st.lists(OPTION, min_size=1, max_size=4).map(
    lambda its: [Option(f"t{i}", n_bytes, loss) for i, (n_bytes, loss) in enumerate(its)]
)


def total(options: dict[str, list[Option]], types: dict[str, str]) -> tuple[int, float]:
    chosen = [next(o for o in its if o.type_name == types[name]) for name, its in options.items()]
    return sum(o.n_bytes for o in chosen), sum(o.loss for o in chosen)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(1, 160))
def test_it_fits_and_is_within_one_step_of_the_best(every: list[list[Option]], n_bytes: int) -> None:
    """No choice that fits loses less by more than the largest step's gain, which is what a bound that falls
    within a step costs at most."""
    options = {f"blk.{i}": its for i, its in enumerate(every)}
    fitting = [sum(o.loss for o in its) for its in product(*every) if sum(o.n_bytes for o in its) <= n_bytes]
    if not fitting:
        with pytest.raises(TooSmallError) as caught:
            allocate(options, n_bytes)
        assert caught.value.least == sum(min(o.n_bytes for o in its) for its in every)
        return
    size, loss = total(options, allocate(options, n_bytes))
    assert size <= n_bytes
    steps = [a.loss - b.loss for its in every for a, b in zip(hull(its), hull(its)[1:], strict=False)]
    assert loss <= min(fitting) + max(steps, default=0) + 1e-9


def test_the_bytes_go_where_they_save_most() -> None:
    options = {
        "a": [Option("small", 10, 8.0), Option("large", 20, 1.0)],
        "b": [Option("small", 10, 3.0), Option("large", 20, 1.0)],
    }
    assert allocate(options, 30) == {"a": "large", "b": "small"}
    assert allocate(options, 40) == {"a": "large", "b": "large"}
    assert allocate(options, 29) == {"a": "small", "b": "small"}


def test_what_is_left_goes_to_steps_that_fit() -> None:
    options = {
        "wide": [Option("small", 100, 50.0), Option("large", 200, 1.0)],
        "narrow": [Option("small", 10, 2.0), Option("large", 15, 1.0)],
    }
    assert allocate(options, 116) == {"wide": "small", "narrow": "large"}


def test_only_the_lower_hull_is_chosen_from() -> None:
    ends = [Option("q4", 4, 10.0), Option("q8", 8, 0.0)]
    assert [o.type_name for o in hull([*ends, Option("q5", 5, 9.0)])] == ["q4", "q8"]
    assert [o.type_name for o in hull([*ends, Option("q5", 5, 5.0)])] == ["q4", "q5", "q8"]
    assert [o.type_name for o in hull([*ends, Option("q9", 9, 0.0), Option("q4_1", 4, 11.0)])] == ["q4", "q8"]
