"""Documents of a corpus, in an order that depends on nothing but the source.

A source is a folder, a glob or one file of ``.txt``, ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst`` or ``.parquet``;
``stdlib``, the sources of the running Python's standard library; or ``hf:org/name``, a Hugging Face dataset (needs the
optional package ``datasets``).
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_lit.data.readers import NULL_ADVICE, SUFFIXES, read_file

STDLIB = "stdlib"
STDLIB_MIN_CHARACTERS = 2000
HUGGING_FACE = "hf:"
WILDCARDS = "*?["
_LIKE_TEXT = re.compile(r"\.(txt|text|jsonl?|ndjson|parquet|csv|tsv|arrow)(\.(gz|zstd?|bz2|xz|zip))?$", re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """One text. Lone surrogates, which JSON admits and UTF-8 does not, are replaced by U+FFFD."""

    id: str
    """Where it stands: path below the source, then ``:line`` or ``:row`` where a file holds several."""
    text: str

    def digest(self) -> bytes:
        """SHA-256 of the text as UTF-8 (32 bytes)."""
        return hashlib.sha256(self.text.encode()).digest()

    def num_bytes(self) -> int:
        """Raw UTF-8 bytes of the text."""
        return len(self.text.encode())


class Corpus:
    """The documents of ``source``. Iterating always yields the same documents in the same order.

    ``text_field`` names the field (``.jsonl``) or column (``.parquet``, Hugging Face) that holds the text. Raises
    FileNotFoundError for a source without files and ValueError, naming file and line, for one that cannot be read.
    """

    def __init__(self, source: str, text_field: str = "text") -> None:
        self.source = source
        self.text_field = text_field
        self.consumed_bytes = 0
        """Bytes on disk of the files read so far by the current iteration: the numerator of a progress bar."""
        self.total_bytes: int | None = None
        """Bytes on disk of all files; None where that is unknown before the end (``hf:``)."""
        self._files: list[tuple[str, Path]] = []
        if not source.startswith(HUGGING_FACE):
            self._files = stdlib_files() if source == STDLIB else find_files(source)
            self.total_bytes = sum(path.stat().st_size for _, path in self._files)

    def __iter__(self) -> Iterator[Document]:
        self.consumed_bytes = 0
        if self.source.startswith(HUGGING_FACE):
            yield from hugging_face_documents(self.source, self.text_field)
        elif self.source == STDLIB:
            yield from self._stdlib_documents()
        else:
            yield from self._file_documents()

    def _stdlib_documents(self) -> Iterator[Document]:
        for name, path in self._files:
            raw = path.read_bytes()
            self.consumed_bytes += len(raw)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                continue  # a test of other encodings: not text for us, on no machine
            if len(text) > STDLIB_MIN_CHARACTERS:
                yield Document(name, text)

    def _file_documents(self) -> Iterator[Document]:
        for name, path in self._files:
            before = self.consumed_bytes
            for suffix, text in read_file(path, self.text_field, self._advance(before)):
                yield Document(name + suffix, _valid_unicode(text))
            self.consumed_bytes = before + path.stat().st_size

    def _advance(self, before: int) -> Callable[[int], None]:
        def advance(position: int) -> None:
            self.consumed_bytes = before + position

        return advance


def find_files(source: str) -> list[tuple[str, Path]]:
    """(name, path) of every text file of a folder (recursive), a glob or a single file, sorted by name."""
    if any(character in source for character in WILDCARDS):
        found = [Path(name) for name in glob.glob(source, recursive=True)]
        root, wanted = _fixed_part(Path(source)), [path for path in found if path.is_file()]
        foreign = [path for path in wanted if not path.name.endswith(SUFFIXES)]
        if foreign:
            raise ValueError(f"source {source}: {min(foreign)} is none of {', '.join(SUFFIXES)}; narrow the glob")
    elif Path(source).is_dir():
        root = Path(source)
        wanted = [path for path in _walk(root) if path.name.endswith(SUFFIXES)]
    elif Path(source).is_file() and source.endswith(SUFFIXES):
        root, wanted = Path(source).parent, [Path(source)]
    else:
        raise FileNotFoundError(
            f"source {source}: no such folder, glob or text file ({', '.join(SUFFIXES)}); or name '{STDLIB}' or"
            f" '{HUGGING_FACE}org/name'"
        )
    if not wanted:
        raise FileNotFoundError(f"source {source}: holds no file ending in {', '.join(SUFFIXES)}; put the texts there")
    return sorted((path.relative_to(root).as_posix(), path) for path in wanted)


def left_out(source: str) -> list[str]:
    """Files of a folder that look like texts and are not read, because of their endings; sorted names."""
    root = Path(source)
    if not root.is_dir():
        return []
    names = (path.relative_to(root).as_posix() for path in _walk(root) if not path.name.endswith(SUFFIXES))
    return sorted(name for name in names if _LIKE_TEXT.search(name))


def _walk(root: Path) -> Iterator[Path]:
    """Every file below ``root``, through linked folders too, each folder once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (path for path in (Path(folder) / name for name in files) if path.is_file())


def _fixed_part(pattern: Path) -> Path:
    """The folders of a glob before its first wildcard."""
    wild = next(index for index, part in enumerate(pattern.parts) if any(character in part for character in WILDCARDS))
    return Path(*pattern.parts[:wild])


def stdlib_files() -> list[tuple[str, Path]]:
    """(name, path) of every ``*.py`` of the standard library, sorted by name; installed packages are not part of it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages", "__pycache__"}
    files = [(path.relative_to(root), path) for path in root.rglob("*.py") if path.is_file()]
    return sorted((name.as_posix(), path) for name, path in files if not installed.intersection(name.parts))


def hugging_face_documents(source: str, text_field: str) -> Iterator[Document]:
    """Rows of the train split of ``hf:org/name`` or ``hf:org/name:subset``, streamed in the dataset's own order."""
    name, _, subset = source.removeprefix(HUGGING_FACE).partition(":")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"source {source}: needs the optional package datasets; install it: pip install datasets==5.2.0"
        ) from error
    rows: Any = datasets.load_dataset(name, subset or None, split="train", streaming=True)
    for number, row in enumerate(rows):
        if text_field in row and row[text_field] is None:
            raise ValueError(f"source {source}, row {number}: the text in column {text_field!r} is null; {NULL_ADVICE}")
        if not isinstance(row.get(text_field), str):
            raise ValueError(
                f"source {source}, row {number}: no text in column {text_field!r}; columns are {sorted(row)}: set"
                " text_field"
            )
        yield Document(f"{name}:{number}", _valid_unicode(row[text_field]))


def _valid_unicode(text: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
