"""Tokens of the retrieval model: whole words of the made language, and bytes."""

from __future__ import annotations

import re

from ggml_ext.measure.tasks.filler import vocabulary

_PIECE = re.compile(r"[A-Za-z]+|[.,:?]")


class Vocabulary:
    """Bytes as GPT-2 names them, whole words with the blank before them, BOS and EOS.

    ``tokens``: their names by id; ``bos``, ``eos``: ids.
    """

    def __init__(self) -> None:
        named = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in named]
        signs = {byte: chr(byte) for byte in named} | {byte: chr(256 + i) for i, byte in enumerate(others)}
        words = vocabulary()
        self.tokens = [*(signs[byte] for byte in range(256)), *(f"{signs[32]}{word}" for word in words)]
        self.bos, self.eos = len(self.tokens), len(self.tokens) + 1
        self.tokens += ["<s>", "</s>"]
        self._ids = {word: 256 + i for i, word in enumerate(words)} | {mark: ord(mark) for mark in ".,:?"}

    def encode(self, text: str) -> list[int]:
        """Ids of a text of known words, each after a blank, and marks; without BOS.

        Raises KeyError for any other word.
        """
        return [self._ids[piece] for piece in _PIECE.findall(text)]
