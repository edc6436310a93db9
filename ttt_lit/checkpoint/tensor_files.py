"""Writes tensors to safetensors files one at a time, so that memory holds one tensor and not the model.

The bytes depend only on names, shapes, dtypes and values: the order is by falling element size, then as given, which
keeps every tensor aligned. Above ``SHARD_BYTES`` the tensors go to numbered shards with an index, as Hugging Face does.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ttt_lit.checkpoint.headers import DTYPE_BYTES, StoredTensor, read_header

SHARD_BYTES = 5_000_000_000
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A tensor that will be read when its turn to be written comes."""

    dtype: str
    """Safetensors' name, one of ``TORCH_DTYPES``."""
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    """Gives the values; called once per file that is written."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def entry_of(tensor: torch.Tensor) -> TensorEntry:
    """An entry for a tensor in memory, on any device.

    Raises:
        ValueError: the dtype is none that a checkpoint holds.
    """
    return TensorEntry(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), read=lambda: tensor)


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' name of a floating-point dtype."""
    if dtype not in _NAMES:
        raise ValueError(f"a checkpoint holds {sorted(map(str, _NAMES))}, got a tensor of {dtype}")
    return _NAMES[dtype]


def write_tensors(
    folder: Path,
    entries: Mapping[str, TensorEntry],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write ``entries`` as model.safetensors, or as shards with an index.

    Returns:
        File name -> SHA-256 of each file written, the index included.
    """
    ordered = sorted(entries, key=lambda name: -DTYPE_BYTES[entries[name].dtype])
    shards = _shards(ordered, entries, shard_bytes)
    if len(shards) == 1:
        return {SINGLE_FILE: _write_file(folder / SINGLE_FILE, shards[0], entries, metadata)}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    hashes = {
        name: _write_file(folder / name, shard, entries, metadata) for name, shard in zip(names, shards, strict=True)
    }
    index = {
        "metadata": {"total_size": sum(entry.num_bytes for entry in entries.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    hashes[INDEX_FILE] = write_text(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return hashes


def write_text(path: Path, text: str) -> str:
    """Write a small file durably; returns its SHA-256."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        _flush(file)
    return hashlib.sha256(data).hexdigest()


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """The tensor's values, memory-mapped; changing them changes memory only, never the file.

    Raises:
        ValueError: the dtype is none that a checkpoint holds.
    """
    if stored.dtype not in TORCH_DTYPES:
        raise ValueError(f"{stored.file}: dtype {stored.dtype} is not one of {sorted(TORCH_DTYPES)}")
    if stored.size == 0:
        return torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
    # One mapping per tensor, of its own pages only, given back with the tensor.
    skipped = stored.begin % mmap.ALLOCATIONGRANULARITY
    with stored.file.open("rb") as file:
        pages = mmap.mmap(
            file.fileno(),
            stored.end - stored.begin + skipped,
            offset=stored.begin - skipped,
            access=mmap.ACCESS_COPY,
        )
    data = torch.frombuffer(pages, dtype=torch.uint8, offset=skipped)
    if stored.begin % DTYPE_BYTES[stored.dtype]:
        data = data.clone()
    return data.view(TORCH_DTYPES[stored.dtype]).view(stored.shape)


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The headers of several files together.

    Raises:
        ValueError: a malformed file, or a name that two files hold.
    """
    result: dict[str, StoredTensor] = {}
    for path in files:
        header = read_header(path)
        if twice := sorted(set(header) & set(result)):
            raise ValueError(f"{path}: holds tensors that another file of the checkpoint holds too: {', '.join(twice)}")
        result.update(header)
    return result


def _shards(names: list[str], entries: Mapping[str, TensorEntry], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name in names:
        size = entries[name].num_bytes
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_file(
    path: Path, names: list[str], entries: Mapping[str, TensorEntry], metadata: Mapping[str, str] | None
) -> str:
    header = _header(names, entries, metadata)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in (len(header).to_bytes(8, "little"), header):
            file.write(block)
            digest.update(block)
        for name in names:
            entry = entries[name]
            tensor = entry.read()
            if tuple(tensor.shape) != entry.shape or dtype_name(tensor.dtype) != entry.dtype:
                raise AssertionError(f"{name}: read {tensor.dtype} {tuple(tensor.shape)}, announced {entry}")
            if tensor.numel():
                data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                file.write(data)
                digest.update(data)
        _flush(file)
    return digest.hexdigest()


def _header(names: list[str], entries: Mapping[str, TensorEntry], metadata: Mapping[str, str] | None) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in names:
        end = position + entries[name].num_bytes
        table[name] = {
            "dtype": entries[name].dtype,
            "shape": list(entries[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    # Padding keeps the data 8-byte aligned.
    return text + b" " * (-len(text) % 8)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
