#!/usr/bin/env python3
"""Text of the demo model: the running interpreter's own documentation.

Three sources, all installed with every CPython:

* ``pydoc_data.topics``, the language reference shown by ``help()``;
* docstrings and comment blocks of the standard library's Python files;
* docstrings of the builtin and extension modules.

The **unit** is the smallest piece of text that is kept whole: one docstring (preceded by its
signature), one contiguous block of comment lines, or one entry of a help topic (a paragraph with the
indented paragraphs below it, since topics repeat each other's entries).  Units are compared and split
by the SHA-256 of their normalised text, so a unit occurs once, lies in exactly one part, and lies in the
same part under every Python version that contains it.

    python scripts/demo_text.py OUTDIR      # writes OUTDIR/train.txt and OUTDIR/heldout.txt
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import io
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELDOUT_PERCENT = 8
"""Share of the units that is held out."""

MIN_CHARS = 60
"""Shorter units ("Return the value.") say too little to be learnt from or scored."""

MIN_PROSE = 0.74
"""Least share of letters and spaces in a unit; below it lie tables, rulers and commented-out data."""

MIN_WORDS = 0.6
"""Least share of word-like pieces in a comment block; below it lies commented-out code."""

SKIP_DIRS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "_bundled", "data", "pydoc_data", "encodings"}
)
SKIP_FILES = re.compile(r"^(_sysconfigdata.*|bad.*|badsyntax.*|this|antigravity|sre_constants)\.py$")
SKIP_MODULES = re.compile(r"^(_test.*|_xx.*|xx.*|_ctypes_test|_tkinter)$")
BOILERPLATE = re.compile(
    r"copyright|all rights reserved|permission to use|licen[sc]ed? (to|under)|warrant(y|ies)|auto-?generated"
    r"|generated (by|from|automatically)|coding[:=]\s*utf",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Unit:
    """One piece of documentation: ``text`` decides about duplicates and split, ``head`` is its signature."""

    text: str
    head: str = ""

    def digest(self) -> str:
        """SHA-256 of the text in lower case with every run of white space made one space."""
        return hashlib.sha256(" ".join(self.text.lower().split()).encode()).hexdigest()

    def render(self) -> str:
        """The unit as it stands in the corpus."""
        return f"{self.head}\n{self.text}" if self.head else self.text


def is_heldout(digest: str) -> bool:
    """Whether the unit with this digest belongs to the held-out part."""
    return int(digest[:8], 16) % 100 < HELDOUT_PERCENT


def is_prose(text: str, *, comment: bool = False) -> bool:
    """Whether ``text`` is worth learning: long enough, mostly words, no licence, no commented-out code."""
    if len(text) < MIN_CHARS or not text.isascii() or BOILERPLATE.search(text):
        return False
    if sum(c.isalpha() or c.isspace() for c in text) < MIN_PROSE * len(text):
        return False
    pieces = text.split()
    wordlike = sum(bool(re.fullmatch(r"[(\"'`]*[A-Za-z][A-Za-z'-]*[)\"'`.,:;?!]*", p)) for p in pieces)
    return not comment or wordlike >= MIN_WORDS * len(pieces)


def tidy(text: str) -> str:
    """Strip trailing white space and outer blank lines, expand tabs, keep at most one blank line in a row."""
    lines = [line.rstrip() for line in text.expandtabs().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def topic_units() -> Iterator[Unit]:
    """The entries of every help topic."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        entry: list[str] = []
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if re.search(r"^[*=~^\-\"]{4,}$", paragraph, re.MULTILINE):
                continue  # an underlined heading
            if entry and not paragraph.startswith(" "):
                yield Unit(tidy("\n\n".join(entry)))
                entry = []
            entry.append(paragraph)
        yield Unit(tidy("\n\n".join(entry)))


def signature(node: ast.AST) -> str:
    """The header line of a documented class or function, empty for a module."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"def {node.name}({ast.unparse(node.args)}):"
    return ""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, Unit]]:
    """Line number and unit of every docstring of a module."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node)
            if doc is not None:
                yield getattr(node, "lineno", 0), Unit(tidy(doc), signature(node))


def comments(source: str) -> Iterator[tuple[int, Unit]]:
    """Line number and unit of every contiguous block of whole-line comments."""
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue  # a comment behind code is a fragment that says little by itself
        row = token.start[0]
        if block and row != last + 1:
            yield start, Unit(tidy("\n".join(block)))
            block = []
        if not block:
            start = row
        last = row
        block.append(re.sub(r"^#+:? ?", "", token.string) if re.search(r"\w", token.string) else "")
    if block:
        yield start, Unit(tidy("\n".join(block)))


def source_units(path: Path) -> Iterator[Unit]:
    """Docstrings and comment blocks of one file in the order of its lines; none if it does not parse."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = list(docstrings(ast.parse(source)))
        notes = list(comments(source))
    except (SyntaxError, ValueError, UnicodeError, OSError, RecursionError, tokenize.TokenError):
        return  # the test package holds files that are broken on purpose
    found += [(row, unit) for row, unit in notes if is_prose(unit.text, comment=True)]
    for _, unit in sorted(found, key=lambda item: item[0]):
        yield unit


def library_units() -> Iterator[Unit]:
    """Units of the standard library's Python files, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not SKIP_DIRS.intersection(parts) and not SKIP_FILES.match(path.name):
            yield from source_units(path)


def extension_names() -> list[str]:
    """Names of the modules that are written in C: builtin ones and shared libraries."""
    names = set(sys.builtin_module_names)
    for folder in {sysconfig.get_paths()["platstdlib"], sysconfig.get_paths()["stdlib"]}:
        names.update(path.name.split(".")[0] for path in Path(folder, "lib-dynload").glob("*.*"))
    return sorted(name for name in names if not SKIP_MODULES.match(name))


def native_units() -> Iterator[Unit]:
    """Docstrings of the builtin and extension modules, their functions, classes and methods."""
    for name in extension_names():
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # built without the library that the extension needs
        objects = [("", module), *sorted(vars(module).items())]
        for attribute, value in objects:
            yield from object_units(attribute, value)
            if inspect.isclass(value) and value.__module__ in (name, "builtins"):
                for member in sorted(vars(value)):
                    yield from object_units(member, vars(value)[member])


def object_units(name: str, value: object) -> Iterator[Unit]:
    """The docstring of one object of a C module, if it has one of its own."""
    documented = inspect.ismodule(value) or inspect.isclass(value) or callable(value)
    if not documented and not inspect.isdatadescriptor(value):
        return  # an instance shows its class's docstring
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str):
        return
    text_signature = getattr(value, "__text_signature__", None) or ""
    keyword = "class" if inspect.isclass(value) else "def"
    yield Unit(tidy(inspect.cleandoc(doc)), f"{keyword} {name}{text_signature}:" if text_signature else "")


def collect() -> tuple[list[Unit], list[Unit]]:
    """All units without duplicates, split into training and held-out part, in the order of the sources."""
    seen: set[str] = set()
    train: list[Unit] = []
    heldout: list[Unit] = []
    for source in (topic_units, native_units, library_units):
        for unit in source():
            digest = unit.digest()
            if digest in seen or not is_prose(unit.text):
                continue
            seen.add(digest)
            (heldout if is_heldout(digest) else train).append(unit)
    return train, heldout


def join(units: list[Unit]) -> str:
    """One text of all units, with an empty line between them."""
    return "\n\n".join(unit.render() for unit in units) + "\n"


def texts() -> tuple[str, str]:
    """Training text and held-out text."""
    train, heldout = collect()
    return join(train), join(heldout)


def main() -> int:
    """Write both parts into the folder named on the command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(f"{Path(sys.argv[0]).name}: one argument needed: the folder to write to", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, units in zip(("train.txt", "heldout.txt"), collect(), strict=True):
            text = join(units)
            (folder / name).write_text(text, encoding="utf-8")
            print(f"{folder / name}: {len(units)} units, {len(text.encode())} bytes")
    except OSError as error:
        print(f"{folder}: {error.strerror}; choose a folder that can be written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
