"""What a KV cache is made of: its types, as llama.cpp's tools take them with -ctk and -ctv, its budget."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from gguf import GGMLQuantizationType

from ggml_ext.core.errors import GgmlExtError

NAMES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0")
"""What llama.cpp's options take (common/arg.cpp, kv_cache_types)."""

_STAYS = r"(,(sink|recent)=\d+)*"
_POLICY, _COLD = r",policy=(norm|random|probe|attention)", r",cold=cq[12]"
_BUDGET = re.compile(rf"paged(,\d+[%KMG]?)?(({_POLICY}|{_COLD}|{_POLICY}{_COLD}){_STAYS})?|\d+%?{_STAYS}")

_UBATCH = 48
"""Tokens that a cache with a budget takes at a time: they need cells beside those that stay, and the last
of them see more than the first. With 16 sinks and 64 recent tokens they fill two blocks."""


class CacheTypes(NamedTuple):
    """Types of K and V. All but llama.cpp's own choice, f16, run with flash attention, which V needs. ``kv``:
    the budget of GGML_EXT_KV (docs/kv-cache.md), "25%", or "paged"; empty: what the environment says."""

    k: str = "f16"
    v: str = "f16"
    kv: str = ""

    @classmethod
    def of(cls, k: str, v: str, kv: str | None = None) -> CacheTypes:
        """The cache that a command's options name, in small letters.

        Raises GgmlExtError for a type that a cache cannot have, and for what is no budget.
        """
        if kv is not None and not _BUDGET.fullmatch(kv):
            raise GgmlExtError(
                f"--kv {kv}: no budget; write 25% of the context, 4096 cells per sequence, paged, paged,2G, "
                "paged,25%,policy=norm, or paged,cold=cq2"
            )
        for option, name in (("-ctk", k), ("-ctv", v)):
            if name.lower() not in NAMES:
                raise GgmlExtError(f"{option} {name}: no type of a cache; use one of {', '.join(NAMES)}")
        return cls(k.lower(), v.lower(), kv or "")

    @property
    def plain(self) -> bool:
        """Whether the types are what llama.cpp takes by itself."""
        return self[:2] == PLAIN[:2]

    @property
    def ids(self) -> tuple[int, int]:
        """The types of K and V as values of enum ggml_type."""
        return int(GGMLQuantizationType[self.k.upper()]), int(GGMLQuantizationType[self.v.upper()])

    @property
    def arguments(self) -> list[str]:
        """For llama.cpp's tools; none where it is plain."""
        return [] if self.plain else ["-ctk", self.k, "-ctv", self.v, "-fa", "on"]

    @property
    def setting(self) -> str:
        """The value of GGML_EXT_KV, of a cache with ``kv``."""
        return re.sub(r",(?=\d)", ",budget=", self.kv) if self.paged else f"budget={self.kv}"

    @property
    def paged(self) -> bool:
        """Whether the cache's rows are in blocks."""
        return self.kv.startswith("paged")

    @property
    def evicts(self) -> bool:
        """Whether the cache forgets what it has no room for."""
        return bool(self.kv) and (not self.paged or "policy=" in self.kv)

    @property
    def has_boundary(self) -> bool:
        """Whether a sequence cannot be cut in front of the last position that it has lost."""
        return self.evicts and (not self.paged or "policy=attention" in self.kv)

    def ubatch(self, wanted: int) -> int:
        """Tokens of a ubatch: ``wanted``, fewer where old tokens are evicted or coded."""
        return min(wanted, _UBATCH) if self.evicts or "cold=" in self.kv else wanted

    @contextmanager
    def budget(self) -> Iterator[None]:
        """The time in which a context is made: GGML_EXT_KV says the budget."""
        before = os.environ.get("GGML_EXT_KV")
        if self.kv:
            os.environ["GGML_EXT_KV"] = self.setting
        try:
            yield
        finally:
            if self.kv:
                os.environ.pop("GGML_EXT_KV")
                if before is not None:
                    os.environ["GGML_EXT_KV"] = before

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> CacheTypes:
        """What ``as_json`` made."""
        return cls(row["cache_k"], row["cache_v"], row["cache_kv"] or "")

    def as_json(self) -> dict[str, str | None]:
        """The keys that results have for them."""
        return {"cache_k": self.k, "cache_v": self.v, "cache_kv": self.kv or None}

    def __str__(self) -> str:
        types = self.k if self.k == self.v else f"K {self.k}, V {self.v}"
        return f"{types}, {self.kv if self.paged else f'budget {self.kv}'}" if self.kv else types


PLAIN = CacheTypes()
"""What llama.cpp takes by itself."""
