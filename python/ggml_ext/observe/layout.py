"""Where an observation's files have the figures of each site. docs/observe.md describes the files.

The sums of a site are one block of floats (struct ggml_ext_site_sums in ggml-ext.h): tokens [1 + experts],
the second moment in panels or only its diagonal [n], and with experts the diagonals [experts, n] and, if
kept, a moment of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ggml_ext.observe.sites import Site, Table

PANEL = 256
"""Rows of a second moment that are stored from the diagonal on: GGML_EXT_MOMENT_PANEL."""

ALIGNMENT = 64  # bytes: a cache line
FLOAT = 4

DIAGONAL, MOMENT, OWN_MOMENTS = range(3)
"""What is kept of a site's second moments: the diagonal, the moment of all rows, that of each expert too.
As enum ggml_ext_moments."""

SAMPLE_ROWS = 1024
"""Most rows of a site that are kept as they are, where nobody asks for more."""

OWN_MOMENT_TOKENS = 4
"""Tokens per channel from which on an expert's own second moment is worth keeping."""


@dataclass(frozen=True)
class Place:
    """Where a site's figures lie. ``rows``: per token, at most. ``moments``: DIAGONAL, MOMENT or
    OWN_MOMENTS. ``stride``: of ``sample_rows`` kept rows. ``sums``, ``absmax``, ``sample``: bytes from the
    start of each file."""

    anchor: str
    rows: int
    moments: int
    stride: int
    sample_rows: int
    sums: int
    absmax: int
    sample: int


@dataclass(frozen=True)
class Layout:
    """One place per site of the table, in its order, and the sizes of the files in bytes."""

    places: tuple[Place, ...]
    sums_bytes: int
    absmax_bytes: int
    sample_bytes: int


def panels(n: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each panel of a moment of ``n`` channels."""
    for first in range(0, n, PANEL):
        yield first, min(PANEL, n - first)


def moment_floats(n: int) -> int:
    """Floats of a second moment in panels."""
    return sum(rows * (n - first) for first, rows in panels(n))


def block_floats(site: Site, moments: int) -> int:
    """Floats of a site's block of sums, as ggml_ext_observer_size has it."""
    own = site.experts * moment_floats(site.n) if moments == OWN_MOMENTS else 0
    shared = site.n if moments == DIAGONAL else moment_floats(site.n)
    return 1 + site.experts + shared + site.experts * site.n + own


def lay_out(
    table: Table, n_tokens: int, used: int, *, diagonals: bool, sample_rows: int = SAMPLE_ROWS
) -> Layout:
    """The layout for an observation of ``n_tokens`` tokens. ``used``: experts per token of a mixture.
    ``diagonals``: nothing but diagonals is kept. ``sample_rows``: kept of each site, at most."""
    places = []
    sums = absmax = sample = 0
    for site in table.sites:
        rows = site.rows
        if diagonals:
            places.append(Place(site.anchor, rows, DIAGONAL, 1, 0, sums, 0, 0))
            sums += _aligned(FLOAT * block_floats(site, DIAGONAL))
            continue
        moments = OWN_MOMENTS if keeps_moments(site, n_tokens, used) else MOMENT
        stride = sample_stride(n_tokens * rows, rows, sample_rows)
        kept = -(-n_tokens * rows // stride)
        places.append(Place(site.anchor, rows, moments, stride, kept, sums, absmax, sample))
        sums += _aligned(FLOAT * block_floats(site, moments))
        absmax += _aligned(FLOAT * site.n)
        sample += _aligned(FLOAT * site.n * kept)
    return Layout(tuple(places), sums, absmax, sample)


def require_consistent(layout: Layout, table: Table) -> None:
    """Raises ValueError unless ``layout`` is one that lay_out makes of the table, with room in its files for
    every site's figures and for nothing else."""
    if [place.anchor for place in layout.places] != [site.anchor for site in table.sites]:
        raise ValueError("the places are not those of the sites")
    diagonals = all(place.moments == DIAGONAL for place in layout.places)
    sums = absmax = sample = 0
    for site, place in zip(table.sites, layout.places, strict=True):
        known = place.moments in ((DIAGONAL,) if diagonals else (MOMENT, OWN_MOMENTS))
        if not known or place.rows != site.rows or place.stride < 1 or place.sample_rows < 0:
            raise ValueError(f"the place of {site.anchor} has impossible values")
        if (place.sums, place.absmax, place.sample) != (sums, absmax, sample):
            raise ValueError(f"the place of {site.anchor} is not behind the one before it")
        sums += _aligned(FLOAT * block_floats(site, place.moments))
        if not diagonals:
            absmax += _aligned(FLOAT * site.n)
            sample += _aligned(FLOAT * site.n * place.sample_rows)
    if (layout.sums_bytes, layout.absmax_bytes, layout.sample_bytes) != (sums, absmax, sample):
        raise ValueError("the sizes of the files are not those of the places")


def keeps_moments(site: Site, n_tokens: int, used: int) -> bool:
    """Whether each expert of the site gets enough tokens for a second moment of its own."""
    if not site.experts:
        return False
    if not site.routed:
        return n_tokens >= OWN_MOMENT_TOKENS * site.n  # every matrix reads its part of every token
    return n_tokens * used >= OWN_MOMENT_TOKENS * site.n * site.experts


def sample_stride(rows: int, per_token: int, kept: int) -> int:
    """Every so manieth row is kept: the smallest power of two that keeps ``kept`` or fewer.

    Where a token has several rows, the smallest odd number: a power of two would always meet the same one.
    """
    least = max(1, -(-rows // kept))
    return 1 << math.ceil(math.log2(least)) if per_token == 1 else least | 1


def sample_step(place: Place, n_tokens: int, kept: int) -> int | None:
    """Every so manieth of the kept rows of the text's ``n_tokens`` tokens are the ``kept`` or fewer that a
    layout for so many has, or nearly so where a token has several rows; None where there are too few."""
    wanted = sample_stride(n_tokens * place.rows, place.rows, kept)
    if wanted < place.stride:
        return None
    step = -(-wanted // place.stride)
    return step if place.rows == 1 else step | 1


def index(places: Sequence[Place]) -> dict[str, Place]:
    """Anchor -> place."""
    return {place.anchor: place for place in places}


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
