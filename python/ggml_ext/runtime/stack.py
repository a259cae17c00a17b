"""Stack for llama.cpp's tokenizers, which take some for every character of a long run.

Pre-tokenizers that llama.cpp has no code of its own for are std::regex's (src/unicode.cpp,
unicode_regex_split_stl). Its matcher calls itself for each character of a match: some 20,000 letters, blanks
or dashes without a break overflow the usual 8 MiB and end the process with a signal. With more stack the
tokens are the same as everywhere else, whatever the text, so that is what such texts get.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import TypeVar

from ggml_ext.core.errors import GgmlExtError

T = TypeVar("T")

BYTES_PER_CHARACTER = 2048
"""Five times what the hungriest pre-tokenizers were seen to take (-O3); only what is used becomes memory."""

_ORDINARY = 2000  # characters in a run that need no care: 4 MiB
_SPARE = 16 << 20

# What one match can span, in all of llama.cpp's pre-tokenizers (src/llama-vocab.cpp, llm_tokenizer_bpe) but
# those on whitespace alone: words with what stands between them, up to a line's end or the usual punctuation;
# punctuation with line ends behind it; whitespace.
_SPANS = (re.compile(r"[^\n.,!?|()]+"), re.compile(r"(?:[^\w\n]|_)+[\s/]*"), re.compile(r"\s+"))
_WORD = re.compile(r"\S+")


def longest_run(text: bytes, *, words: bool = False) -> int:
    """Bound on the characters that one match of a pre-tokenizer spans in UTF-8 ``text``.

    words: of a pre-tokenizer on whitespace alone too.
    """
    decoded = text.decode("utf-8", "replace")
    spans = (*_SPANS, _WORD) if words else _SPANS
    lengths = (match.end() - match.start() for span in spans for match in span.finditer(decoded))
    return max(lengths, default=0)


def call(function: Callable[[], T], run: int) -> T:
    """Calls the function with stack for a run of so many characters, in a thread of its own if need be.

    Raises what the function raises, and GgmlExtError where the system has no memory for the stack.
    """
    if run <= _ORDINARY:
        return function()
    done: list[T] = []
    failed: list[BaseException] = []
    ended = threading.Event()  # once interrupted, Thread.join takes a running thread for one that has ended

    def work() -> None:
        try:
            done.append(function())
        except BaseException as error:
            failed.append(error)
        finally:
            ended.set()

    before = threading.stack_size()
    try:
        threading.stack_size(_needed(run))
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
    except (RuntimeError, ValueError, OverflowError, MemoryError) as error:
        raise _no_stack(run) from error
    finally:
        threading.stack_size(before)
    try:
        ended.wait()
    except BaseException:
        ended.wait()  # what the function works on is freed once this has returned
        raise
    if failed:
        raise failed[0]
    return done[0]


def _needed(run: int) -> int:
    return _SPARE + run * BYTES_PER_CHARACTER


def _no_stack(run: int) -> GgmlExtError:
    return GgmlExtError(
        f"the text has {run} characters without a line end or punctuation, and llama.cpp's tokenizer needs "
        f"{_needed(run) >> 20} MiB of stack for them, more than the system gives; break them with line ends"
    )
