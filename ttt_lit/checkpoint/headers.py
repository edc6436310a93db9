"""Reads and checks the header of a safetensors file without touching its data.

The file is somebody else's: a header that lies about its length, gaps or overlaps between tensors, spans that do not
match shape and dtype, and repeated names are refused with one line that names the file. Format: 8 bytes little-endian
header length, a JSON object name -> {dtype, shape, data_offsets}, data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
"""What a weight may be stored as; anything else is a quantised checkpoint."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One entry of a header."""

    file: Path
    dtype: str
    """Safetensors' name of the dtype, one of ``DTYPE_BYTES``."""
    shape: tuple[int, ...]
    begin: int
    """First byte of the data, counted from the start of the file."""
    end: int
    """Byte after the last one."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, by name, in the order of the data.

    Raises:
        ValueError: the file is truncated or malformed; the message names the file and what is wrong.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        file_bytes = path.stat().st_size
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > file_bytes - 8:
            raise _malformed(path, f"{file_bytes} bytes are too few for its header; is the download complete?")
        if length > MAX_HEADER_BYTES:
            raise _malformed(path, f"its header claims {length} bytes, more than {MAX_HEADER_BYTES}")
        raw = file.read(length)
    entries = _parse(path, raw)
    entries.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _entry(path, name, entry, start) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = start
    for name, tensor in ordered.items():
        if tensor.begin != position:
            raise _malformed(path, f"a gap or an overlap before tensor {_short(name)}")
        position = tensor.end
    if position != file_bytes:
        raise _malformed(path, f"the header describes {position} bytes, the file has {file_bytes}; is it complete?")
    return ordered


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice")
        return result

    try:
        entries = json.loads(raw, object_pairs_hook=unique)
    except RecursionError:
        raise _malformed(path, "its header is nested too deeply") from None
    except ValueError as error:
        raise _malformed(path, f"its header is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise _malformed(path, "its header is not a JSON object")
    return entries


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"tensor {_short(name)} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _malformed(path, f"tensor {_short(name)} has the unknown dtype {_short(dtype)}")
    if not _sizes(shape) or len(shape) > 8:
        raise _malformed(path, f"tensor {_short(name)} has the impossible shape {_short(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(path, f"tensor {_short(name)} has the impossible data_offsets {_short(offsets)}")
    if math.prod(shape) * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise _malformed(path, f"tensor {_short(name)}: {dtype} {_short(shape)} does not fill {_short(offsets)}")
    return StoredTensor(file=path, dtype=dtype, shape=tuple(shape), begin=start + offsets[0], end=start + offsets[1])


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _malformed(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path}: not a usable safetensors file: {problem}")
