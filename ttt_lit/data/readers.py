"""Texts of one file, by the ending of its name. Damage is an error that names the file and the line or row."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

Text = tuple[str, str]
"""(suffix of the document's id inside the file, text)"""
Advance = Callable[[int], None]
"""Told how many bytes of the file on disk have been read."""

CHUNK_BYTES = 1 << 20
NULL_ADVICE = "take such rows out of the source"


def read_file(path: Path, text_field: str, advance: Advance) -> Iterator[Text]:
    """The file's texts in their order. Raises ValueError for anything that is not what the ending says."""
    if path.name.endswith(".parquet"):
        yield from _parquet(path, text_field)
        return
    if path.name.endswith(".txt"):
        yield "", _decode(path.read_bytes(), str(path))
        return
    with path.open("rb") as raw:
        for number, line in enumerate(_lines(path, raw, advance), start=1):
            if line.strip():
                yield f":{number}", _json_text(line, text_field, f"{path}:{number}")


def _lines(path: Path, raw: BinaryIO, advance: Advance) -> Iterator[bytes]:
    # Joined once a line is whole: adding to it piece by piece takes the square of its length.
    parts: list[bytes] = []
    try:
        for piece in _pieces(path, raw):
            advance(raw.tell())
            head, *heads = piece.split(b"\n")
            parts.append(head)
            for head in heads:
                yield b"".join(parts)
                parts = [head]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut off ({error}); fetch the file again") from error
    yield b"".join(parts)


def _pieces(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    if path.name.endswith(".zst"):
        yield from _zstd_pieces(path, raw)
        return
    stream = io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb")) if path.name.endswith(".gz") else raw
    while piece := stream.read(CHUNK_BYTES):
        yield piece


def _zstd_pieces(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    # zstandard's stream reader takes a cut-off file for a complete one; the decompression object says whether a frame
    # ended.
    import zstandard

    frame = None
    while compressed := raw.read(CHUNK_BYTES):
        while compressed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(compressed)
            except zstandard.ZstdError as error:
                raise ValueError(f"{path}: damaged ({error}); fetch the file again") from error
            compressed = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise ValueError(f"{path}: cut off inside a zstd frame; fetch the file again")


def _json_text(line: bytes, text_field: str, where: str) -> str:
    try:
        row = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); expected one object per line") from error
    if isinstance(row, dict) and text_field in row and row[text_field] is None:
        raise ValueError(f"{where}: the text in field {text_field!r} is null; {NULL_ADVICE}")
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        found = f"fields {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected an object with text in field {text_field!r}, got {found}: set text_field")
    return row[text_field]


def _parquet(path: Path, text_field: str) -> Iterator[Text]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise ValueError(
                    f"{path}: no column {text_field!r}, columns are {file.schema_arrow.names}: set text_field"
                )
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise ValueError(f"{path}:{number}: the text in column {text_field!r} is null; {NULL_ADVICE}")
                    if not isinstance(text, str):
                        raise ValueError(
                            f"{path}:{number}: expected text in column {text_field!r}, got {type(text).__name__}"
                        )
                    yield f":{number}", text
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file first"
        ) from error
