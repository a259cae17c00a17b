"""Types of the KV cache, as llama.cpp's tools take them with -ctk and -ctv."""

from __future__ import annotations

from typing import NamedTuple

from gguf import GGMLQuantizationType

from ggml_ext.core.errors import GgmlExtError

NAMES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0")
"""What llama.cpp's options take (common/arg.cpp, kv_cache_types)."""


class CacheTypes(NamedTuple):
    """Types of K and V. All but llama.cpp's own choice, f16, run with flash attention, which V needs."""

    k: str = "f16"
    v: str = "f16"

    @classmethod
    def of(cls, k: str, v: str) -> CacheTypes:
        """Raises GgmlExtError for a type that a cache cannot have."""
        for option, name in (("-ctk", k), ("-ctv", v)):
            if name.lower() not in NAMES:
                raise GgmlExtError(f"{option} {name}: no type of a cache; use one of {', '.join(NAMES)}")
        return cls(k.lower(), v.lower())

    @property
    def plain(self) -> bool:
        """Whether it is what llama.cpp takes by itself."""
        return self == PLAIN

    @property
    def ids(self) -> tuple[int, int]:
        """The same of enum ggml_type."""
        return int(GGMLQuantizationType[self.k.upper()]), int(GGMLQuantizationType[self.v.upper()])

    @property
    def arguments(self) -> list[str]:
        """For llama.cpp's tools; none where it is plain."""
        return [] if self.plain else ["-ctk", self.k, "-ctv", self.v, "-fa", "on"]

    def as_json(self) -> dict[str, str]:
        """The keys that results have for them."""
        return {"cache_k": self.k, "cache_v": self.v}

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"K {self.k}, V {self.v}"


PLAIN = CacheTypes()
"""What llama.cpp takes by itself."""
