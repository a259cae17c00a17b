"""Opens the folder of a finished observation: what a tensor of the model read, as numpy arrays.

Files are mapped and one site is in memory at a time. Needs neither the model nor llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.observe import description as descriptions
from ggml_ext.observe.description import Description
from ggml_ext.observe.layout import (
    DIAGONAL,
    FLOAT,
    OWN_MOMENTS,
    Place,
    block_floats,
    index,
    moment_floats,
    panels,
    sample_step,
)
from ggml_ext.observe.sites import ROUTED, Site, Table
from ggml_ext.observe.state import ABSMAX, SAMPLES, load_state

Floats = NDArray[np.float32]


class Observation:
    """The figures of a finished observation. ``table``: the model's sites. ``n_tokens``: of the text.

    Tokens far larger than the others were scaled down before they were summed, see Description.largest.
    """

    def __init__(self, folder: Path) -> None:
        """Raises GgmlExtError for a folder that holds no observation, or an unfinished or damaged one."""
        found = descriptions.load(folder)
        if found is None:
            raise GgmlExtError(f"{folder}: holds no observation; make one with ggml-ext observe")
        state = load_state(folder)
        if state.windows != found.windows:
            raise GgmlExtError(
                f"{folder}: {state.windows} of {found.windows} windows are observed; go on with the command "
                "that began it"
            )
        self.folder = folder
        self.description: Description = found
        self.table: Table = found.sites()
        layout = found.layout()
        self._places = index(layout.places)
        self._sums = self._map(state.sums, layout.sums_bytes)
        self._absmax = self._map(ABSMAX, layout.absmax_bytes)
        self._samples = self._map(SAMPLES, layout.sample_bytes)

    def _map(self, name: str, n_bytes: int) -> Floats:
        path = self.folder / name
        if not n_bytes:
            return np.empty(0, np.float32)
        if not path.is_file() or path.stat().st_size != n_bytes:
            raise GgmlExtError(f"{path}: missing or damaged; delete the folder and observe again")
        return np.memmap(path, np.float32, "r")

    @property
    def n_tokens(self) -> int:
        """Tokens of the text that were observed."""
        return self.description.n_tokens

    def site_of(self, tensor: str) -> Site | None:
        """The site that the tensor reads, None if it reads none."""
        return self.table.site_of(tensor)

    def rows(self, site: Site) -> float:
        """Rows in the site's sums: tokens, times the experts of each where every expert reads its own."""
        return float(self._block(site)[0])

    def expert_rows(self, site: Site) -> Floats:
        """Rows that each expert got, [experts]; empty for a site without experts."""
        return np.array(self._block(site)[1 : 1 + site.experts])

    def moment(self, site: Site) -> Floats:
        """Mean of x x^T over all rows, float32 [n, n], symmetric."""
        return _whole(self._moments(site), site.n, self.rows(site))

    def diagonal(self, site: Site) -> Floats:
        """Mean of x^2 over all rows, float32 [n]; the moment's diagonal without the rest of it."""
        rows_seen = np.float32(max(self.rows(site), 1))
        if self._places[site.anchor].moments == DIAGONAL:
            return self._shared(site, site.n) / rows_seen
        moment, start = self._moments(site), 0
        parts = []
        for first, rows in panels(site.n):
            width = site.n - first
            parts.append(moment[start : start + rows * width].reshape(rows, width).diagonal())
            start += rows * width
        return np.concatenate(parts) / rows_seen

    def expert_diagonals(self, site: Site) -> Floats:
        """The same over the rows of each expert, float32 [experts, n], 0 for one that got none."""
        shared = site.n if self._places[site.anchor].moments == DIAGONAL else moment_floats(site.n)
        sums = self._shared(site, shared + site.experts * site.n)[shared:].reshape(site.experts, site.n)
        means: Floats = np.divide(sums, np.maximum(self.expert_rows(site), 1)[:, None], dtype=np.float32)
        return means

    def has_expert_moments(self, site: Site) -> bool:
        """Whether the experts got enough rows for second moments of their own."""
        return self._places[site.anchor].moments == OWN_MOMENTS

    def expert_moment(self, site: Site, expert: int) -> Floats:
        """Mean of x x^T over the rows of one expert, float32 [n, n]. Raises ValueError if there is none."""
        if not self.has_expert_moments(site) or not 0 <= expert < site.experts:
            raise ValueError(f"{site.anchor}: no moment of expert {expert}")
        size = moment_floats(site.n)
        start = 1 + site.experts + size + site.experts * site.n + expert * size
        rows = float(self.expert_rows(site)[expert])
        return _whole(self._block(site)[start : start + size], site.n, rows)

    def absmax(self, site: Site) -> Floats:
        """Largest |x| of each channel, float32 [n]."""
        start = self._places[site.anchor].absmax // FLOAT
        return np.array(self._absmax[start : start + site.n])

    def sample(self, site: Site, most: int | None = None) -> Floats:
        """Some rows, scaled as in the sums, float32 [rows, n], spread evenly over the text. ``most``: as many
        of them as an observation with so many sample rows keeps."""
        place = self._places[site.anchor]
        kept = self._sample_rows(site, place)
        step = None if most is None else sample_step(place, self.n_tokens, most)
        start = place.sample // FLOAT
        return np.array(self._samples[start : start + kept * site.n].reshape(kept, site.n)[:: step or 1])

    def _sample_rows(self, site: Site, place: Place) -> int:
        """Fewer than there is room for where the site has fewer rows per token than it could have."""
        per_pass = self.rows(site) / max(len(site.values), 1)
        return min(place.sample_rows, -(-int(per_pass) // place.stride))

    def importance(self, tensor: str) -> tuple[Floats, Floats] | None:
        """Mean squared input of every column of the tensor, float32 [experts, n] (1 for a matrix that reads
        all rows), 0 for an expert that got no row, and the rows [experts]. None if the tensor reads no site.
        """
        site, reader = self.table.site_of(tensor), self.table.reader(tensor)
        if site is None or reader is None:
            return None
        if not site.experts or (site.routed and reader.op != ROUTED):
            return self.diagonal(site)[None], np.array([self.rows(site)], np.float32)
        return self.expert_diagonals(site), self.expert_rows(site)

    def _block(self, site: Site) -> Floats:
        place = self._places[site.anchor]
        start = place.sums // FLOAT
        return self._sums[start : start + block_floats(site, place.moments)]

    def _shared(self, site: Site, floats: int) -> Floats:
        return self._block(site)[1 + site.experts :][:floats]

    def _moments(self, site: Site) -> Floats:
        if self._places[site.anchor].moments == DIAGONAL:
            raise ValueError(f"{site.anchor}: of importances only the diagonal is there")
        return self._shared(site, moment_floats(site.n))


def _whole(stored: Floats, n: int, rows: float) -> Floats:
    """A moment in panels as a matrix [n, n], divided by ``rows``."""
    whole, start = np.empty((n, n), np.float32), 0
    for first, height in panels(n):
        width = n - first
        panel = stored[start : start + height * width].reshape(height, width)
        whole[first : first + height, first:] = panel
        whole[first + height :, first : first + height] = panel[:, height:].T
        start += height * width
    whole /= np.float32(max(rows, 1))
    return whole
