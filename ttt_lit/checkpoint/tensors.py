"""Safetensors files, read and written lazily: a stored tensor costs memory when its values are touched, not before.

Above ``SHARD_BYTES`` tensors go to numbered shards with an index, as Hugging Face does. The bytes depend only on names,
shapes, dtypes and values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

Shapes = Mapping[str, tuple[int, ...]]
SHARD_BYTES = 5_000_000_000
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""What a weight may be stored as, by safetensors' name; anything else is a quantised checkpoint."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a file, known from the header."""

    file: Path
    name: str
    dtype: str
    """Safetensors' name."""
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The values, memory-mapped; changing them changes memory only, never the file."""
        with safe_open(self.file, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        return tensor


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of several files, by name.

    Raises:
        ValueError: a truncated or malformed file, or a name that two files hold.
    """
    result: dict[str, StoredTensor] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                header = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a usable safetensors file: {str(error)[:200]}; is it complete?") from None
        if twice := sorted(set(header) & set(result)):
            raise ValueError(f"{path}: holds tensors that another file of the checkpoint holds too: {', '.join(twice)}")
        result |= {n: StoredTensor(file=path, name=n, dtype=dtype, shape=shape) for n, (dtype, shape) in header.items()}
    return result


def dtype_name(tensor: torch.Tensor | StoredTensor) -> str:
    """Safetensors' name of a weight's dtype.

    Raises:
        ValueError: the dtype is none that a checkpoint holds.
    """
    names = [n for n, dtype in DTYPES.items() if tensor.dtype in (n, dtype)]
    if not names:
        raise ValueError(f"a checkpoint holds tensors of {', '.join(DTYPES)}, got one of {tensor.dtype}")
    return names[0]


def num_bytes(tensor: torch.Tensor | StoredTensor) -> int:
    """Bytes of a weight in a file."""
    return math.prod(tensor.shape) * DTYPES[dtype_name(tensor)].itemsize


def write_tensors(
    folder: Path, state: Mapping[str, torch.Tensor | StoredTensor], *, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write ``state`` as model.safetensors, or as shards with an index; stored tensors are read shard by shard.

    Returns:
        Names of the files written.
    """
    plan = split_state_dict_into_shards_factory(
        dict(state),
        get_storage_size=num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: state[name] for name in names}
        read = {n: t.read() if isinstance(t, StoredTensor) else t.detach().contiguous() for n, t in shard.items()}
        path = folder / file
        path.touch()
        mode = path.stat().st_mode
        save_file(read, path, metadata={"format": "pt"})
        # save_file makes a file that only its owner reads, whatever the umask allows.
        path.chmod(mode)
    if not plan.is_sharded:
        return [SINGLE_FILE]
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*plan.filename_to_tensors, INDEX_FILE]


def shapes_of(tensors: Mapping[str, torch.Tensor | StoredTensor]) -> Shapes:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def mismatch(found: Shapes, expected: Shapes) -> dict[str, list[str]]:
    """Names that are missing, extra or misshapen; only kinds that occur."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "extra": [name for name in found if name not in expected],
        "misshapen": [f"{n} {found[n]} instead of {s}" for n, s in expected.items() if found.get(n, s) != s],
    }
    return {kind: names for kind, names in problems.items() if names}


def listed(problems: Mapping[str, list[str]]) -> str:
    """Kinds of problems with their names, in one line."""
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items())


def check_shapes(found: Shapes, expected: Shapes, *, where: str) -> None:
    """ValueError that lists every missing, extra and misshapen name."""
    if problems := mismatch(found, expected):
        raise ValueError(f"{where}: the tensors do not fit the model: {listed(problems)}")
