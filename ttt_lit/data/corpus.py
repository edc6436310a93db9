"""Documents of a corpus, in an order that depends on nothing but the source, and on which side of the split each stands.

A source is a folder, a glob or one file of ``.txt``, ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst`` or ``.parquet``;
``stdlib``, the sources of the running Python's standard library; or ``hf:org/name``, a Hugging Face dataset (needs the
optional package ``datasets``). Damage is an error that names the file and the line or row.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
STDLIB = "stdlib"
STDLIB_MIN_CHARACTERS = 2000
HUGGING_FACE = "hf:"
WILDCARDS = "*?["
READ_BYTES = 1 << 20
_LIKE_TEXT = re.compile(r"\.(txt|text|jsonl?|ndjson|parquet|csv|tsv|arrow)(\.(gz|zstd?|bz2|xz|zip))?$", re.IGNORECASE)

SALT = "ttt_lit split 1\n"
"""Part of the split rule, not a setting: two data sets with different salts would mix train and validation documents."""

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

Text = tuple[str, str]
"""(suffix of the document's id inside the file, text)"""


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


def split_of(document: Document, validation_fraction: float) -> Split:
    """The first 8 bytes of SHA-256(salt + text), as a fraction of 2^64, against ``validation_fraction``.

    By the text alone, so every data set of one corpus and its tokenizer share the split, and duplicates their side.
    """
    digest = hashlib.sha256((SALT + document.text).encode()).digest()
    return "validation" if int.from_bytes(digest[:8]) < validation_fraction * 2**64 else "train"


def split_rule(validation_fraction: float) -> str:
    """The rule in words, for manifests; two data sets share a split exactly if these are equal."""
    return f"validation if the first 8 bytes of SHA-256({SALT!r} + text) < {validation_fraction!r} * 2**64, else train"


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
            self._files = _stdlib_files() if source == STDLIB else _find_files(source)
            self.total_bytes = sum(path.stat().st_size for _, path in self._files)

    def __iter__(self) -> Iterator[Document]:
        if self.source.startswith(HUGGING_FACE):
            yield from _hugging_face_documents(self.source, self.text_field)
            return
        read = _read_stdlib if self.source == STDLIB else _read_file
        finished = self.consumed_bytes = 0
        for name, path in self._files:
            with path.open("rb") as raw:
                for suffix, text in read(path, raw, self.text_field):
                    self.consumed_bytes = finished + raw.tell()
                    yield Document(name + suffix, text)
            finished = self.consumed_bytes = finished + path.stat().st_size


def left_out(source: str) -> list[str]:
    """Files of a folder that look like texts and are not read, because of their endings; sorted names."""
    root = Path(source)
    if not root.is_dir():
        return []
    names = (path.relative_to(root).as_posix() for path in _walk(root) if not path.name.endswith(SUFFIXES))
    return sorted(name for name in names if _LIKE_TEXT.search(name))


# Files ----------------------------------------------------------------------------------------------------------------


def _find_files(source: str) -> list[tuple[str, Path]]:
    """(name, path) of every text file of a folder (recursive), a glob or a single file, sorted by name."""
    path = Path(source)
    if any(character in source for character in WILDCARDS):
        wild = next(i for i, part in enumerate(path.parts) if any(character in part for character in WILDCARDS))
        root = Path(*path.parts[:wild])
        wanted = [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
        foreign = [path for path in wanted if not path.name.endswith(SUFFIXES)]
        if foreign:
            raise ValueError(f"source {source}: {min(foreign)} is none of {', '.join(SUFFIXES)}; narrow the glob")
    elif path.is_dir():
        root, wanted = path, [path for path in _walk(path) if path.name.endswith(SUFFIXES)]
    elif path.is_file() and source.endswith(SUFFIXES):
        root, wanted = path.parent, [path]
    else:
        raise FileNotFoundError(
            f"source {source}: no such folder, glob or text file ({', '.join(SUFFIXES)}); or name '{STDLIB}' or"
            f" '{HUGGING_FACE}org/name'"
        )
    if not wanted:
        raise FileNotFoundError(f"source {source}: holds no file ending in {', '.join(SUFFIXES)}; put the texts there")
    return sorted((path.relative_to(root).as_posix(), path) for path in wanted)


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


def _stdlib_files() -> list[tuple[str, Path]]:
    """(name, path) of every ``*.py`` of the standard library, sorted by name; installed packages are not part of it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages", "__pycache__"}
    files = [(path.relative_to(root), path) for path in root.rglob("*.py") if path.is_file()]
    return sorted((name.as_posix(), path) for name, path in files if not installed.intersection(name.parts))


# Texts ----------------------------------------------------------------------------------------------------------------


def _read_file(path: Path, raw: BinaryIO, text_field: str) -> Iterator[Text]:
    """The file's texts in their order. Raises ValueError for anything that is not what the ending says."""
    if path.suffix == ".txt":
        yield "", _decode(raw.read(), str(path))
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, text_field)
    else:
        for number, line in enumerate(_lines(path, raw), start=1):
            if line.strip():
                yield f":{number}", _json_text(line.rstrip(), text_field, f"{path}:{number}")


def _read_stdlib(path: Path, raw: BinaryIO, text_field: str) -> Iterator[Text]:
    try:
        text = raw.read().decode()
    except UnicodeDecodeError:
        return  # a test of other encodings: not text for us, on no machine
    if len(text) > STDLIB_MIN_CHARACTERS:
        yield "", text


def _lines(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    if codec is None:
        yield from raw
        return
    import pyarrow

    try:
        yield from io.BufferedReader(pyarrow.CompressedInputStream(raw, codec), READ_BYTES)
    except OSError as error:
        raise ValueError(f"{path}: damaged or cut off ({error}); fetch the file again") from error


def _json_text(line: bytes, text_field: str, where: str) -> str:
    try:
        row = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); expected one object per line") from error
    return _text_of(row, text_field, where)


def _read_parquet(path: Path, text_field: str) -> Iterator[Text]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise _no_field(str(path), text_field, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield f":{number}", _text_of({text_field: text}, text_field, f"{path}:{number}")
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from error


def _hugging_face_documents(source: str, text_field: str) -> Iterator[Document]:
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
        yield Document(f"{name}:{number}", _text_of(row, text_field, f"source {source}, row {number}"))


def _text_of(row: Any, text_field: str, where: str) -> str:
    """The text of a row, valid Unicode."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {type(row).__name__}, expected an object with text in field {text_field!r}")
    if text_field not in row:
        raise _no_field(where, text_field, sorted(row))
    text = row[text_field]
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        raise ValueError(
            f"{where}: field {text_field!r} is {found}, expected text; take such rows out of the source, or set text_field"
        )
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _no_field(where: str, text_field: str, found: list[str]) -> ValueError:
    return ValueError(f"{where}: no field {text_field!r} with the text, fields are {found}; set text_field")


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file first"
        ) from error
