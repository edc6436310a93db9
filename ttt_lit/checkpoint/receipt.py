"""What became of every tensor: the receipt that goes with a checkpoint, and the lineage that says how it was made.

Importing and converting append to both. A checkpoint whose receipt does not account for exactly its spec's parameters
cannot be written: a tensor that is new without a declaration is how warm starts silently become random ones. Standard
library only.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Status = Literal["inherited", "new", "dropped", "resized"]


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One tensor's fate."""

    name: str
    """Our parameter name; for a dropped tensor the name it had."""
    status: Status
    shape: tuple[int, ...]
    dtype: str
    """Safetensors' name of the stored dtype: F32, BF16, …"""
    source: str | None = None
    """Name in the file it came from, for inherited, resized and dropped tensors."""
    note: str = ""
    """New: the initialisation. Dropped: the reason. Resized: the old shape and what filled the rest."""

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"receipt: {self.name} has status {self.status!r}, expected one of {get_args(Status)}")
        if self.status != "inherited" and not self.note:
            raise ValueError(f"receipt: {self.name} is {self.status} without a note that says how or why")


@dataclass(frozen=True)
class Receipt:
    """All tensors of a checkpoint, and those that were left behind on the way to it."""

    records: tuple[TensorRecord, ...]

    @classmethod
    def all_new(cls, shapes: Mapping[str, tuple[int, ...]], *, dtype: str, note: str) -> Receipt:
        """The receipt of a model made from nothing."""
        return cls(
            tuple(TensorRecord(name=n, status="new", shape=s, dtype=dtype, note=note) for n, s in shapes.items())
        )

    def with_new(self, shapes: Mapping[str, tuple[int, ...]], *, dtype: str, note: str) -> Receipt:
        """The receipt after a conversion declared new tensors and how they are initialised."""
        return Receipt(self.records + Receipt.all_new(shapes, dtype=dtype, note=note).records)

    def stored_as(self, dtypes: Mapping[str, str]) -> Receipt:
        """The receipt with the dtypes that the checkpoint stores; dropped tensors keep the one they had."""
        return Receipt(
            tuple(
                r if r.status == "dropped" else dataclasses.replace(r, dtype=dtypes.get(r.name, r.dtype))
                for r in self.records
            )
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """Status -> number of tensors and of parameters; every status has an entry."""
        result = {status: {"tensors": 0, "parameters": 0} for status in get_args(Status)}
        for record in self.records:
            result[record.status]["tensors"] += 1
            result[record.status]["parameters"] += math.prod(record.shape)
        return result

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Hold the receipt against what the checkpoint must contain.

        Raises:
            ValueError: a parameter without a record, a record without a parameter, or another shape; all are listed.
        """
        kept = [record for record in self.records if record.status != "dropped"]
        names = [record.name for record in kept]
        problems = [f"{name} has no record" for name in shapes if name not in set(names)]
        problems += [f"{record.name} is no parameter" for record in kept if record.name not in shapes]
        problems += [f"{name} has several records" for name in sorted({n for n in names if names.count(n) > 1})]
        problems += [
            f"{r.name} is {r.shape} instead of {shapes[r.name]}" for r in kept if shapes.get(r.name, r.shape) != r.shape
        ]
        if problems:
            raise ValueError("receipt does not fit the model: " + "; ".join(problems))

    def to_json(self) -> str:
        lines = [json.dumps(dataclasses.asdict(record)) for record in self.records]
        return '{"tensors": [\n' + ",\n".join(lines) + "\n]}\n"

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        records = json.loads(text)["tensors"]
        return cls(tuple(TensorRecord(**record | {"shape": tuple(record["shape"])}) for record in records))


@dataclass(frozen=True, kw_only=True)
class LineageStep:
    """One command that made a checkpoint. Free of dates and machines, so that the same input gives the same bytes; only a training
    run also says what it cost."""

    operation: str
    """import, convert, fit, …"""
    source: str | None = None
    """What it read, by name: a hub id, a folder's name, a run's id."""
    source_hash: str | None = None
    """SHA-256 over what it read."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Settings that decide the result; plain JSON values."""


def lineage_to_json(steps: Iterable[LineageStep]) -> str:
    return json.dumps([dataclasses.asdict(step) for step in steps], indent=2, sort_keys=True) + "\n"


def lineage_from_json(text: str) -> tuple[LineageStep, ...]:
    return tuple(LineageStep(**step) for step in json.loads(text))
