"""An arm: the runs that differ in nothing but the seed, and what they say together. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ttt_lit.record.measured import Validation
from ttt_lit.record.schema import Headline, Role, RunRecord

Account = Literal["marginal", "with_parents"]
ACCOUNTS: tuple[Account, ...] = ("marginal", "with_parents")
"""GPU-hours of the run itself, and the same with every run that made its start checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One setting, run once per seed."""

    experiment: str
    variant: str
    share: float | None
    """Planned budget as a share of the baseline's GPU-hours; None: matched by tokens."""
    role: Role | None
    family: str
    records: tuple[RunRecord, ...]
    """Sorted by seed, one per seed, at least one."""
    problems: tuple[str, ...] = ()
    """Why these runs are not one arm: a seed that was run twice, several roles."""

    @property
    def name(self) -> str:
        """For people: ``q_p1_bridge``, ``q_p1_bridge b2_budget=5``, ``q_p1_bridge at 0.35``."""
        variant = f" {self.variant}" if self.variant else ""
        return f"{self.experiment}{variant}" + ("" if self.share is None else f" at {self.share:g}")

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.seed for record in self.records)

    @property
    def finished(self) -> bool:
        return all(record.status == "finished" for record in self.records)

    @property
    def trains_with_updates(self) -> bool:
        return any(stage.mode in ("meta", "first_order") for record in self.records for stage in record.stages)

    def finals(self, inner: Headline | None = None) -> list[Validation | None]:
        """Per seed, the validation that speaks for the run, or that of ``inner``; None where it was not measured."""
        return [record.final(inner) for record in self.records]

    def documents(self, inner: Headline | None = None) -> list[dict[str, float]]:
        """Per seed, held-out block id → nats per token; empty where it was not measured. A diverged run's may be NaN."""
        return [
            {document.id: document.nats_per_token for document in final.documents} if final else {}
            for final in self.finals(inner)
        ]

    @property
    def sources(self) -> dict[str, int]:
        """Held-out block id → the document it was cut from, over all seeds, with what was measured at the start."""
        validations = [v for record in self.records for v in (record.final(), record.start_validation) if v]
        return {block.id: block.source for validation in validations for block in validation.documents}

    @property
    def loss(self) -> float | None:
        """Headline loss in nats per token, mean over seeds; None where a seed has none or it is not finite."""
        return _mean(None if final is None else final.nats_per_token for final in self.finals())

    @property
    def bits_per_byte(self) -> float | None:
        """Headline loss in bits per byte, mean over seeds; None as for ``loss``."""
        return _mean(None if final is None else final.bits_per_byte for final in self.finals())

    @property
    def tokens(self) -> float:
        """Trained tokens, mean over seeds."""
        return sum(record.totals.tokens for record in self.records) / len(self.records)

    @property
    def bytes(self) -> float:
        """Bytes of the trained text, mean over seeds."""
        return sum(record.totals.bytes for record in self.records) / len(self.records)

    def gpu_hours(self, account: Account) -> float | None:
        """Device-hours, mean over seeds; None where a seed's, or under ``with_parents`` a parent's, are not known."""
        return _mean(gpu_hours(record, account) for record in self.records)


def gpu_hours(record: RunRecord, account: Account) -> float | None:
    """Device-hours of one run: its compute account, under ``with_parents`` with that of every parent; None: not known."""
    own = record.totals.gpu_seconds.get("compute")
    if not _is_known(own) or (account == "with_parents" and unknown_parents(record)):
        return None
    parents = [parent.gpu_seconds or 0.0 for parent in record.parents] if account == "with_parents" else []
    return ((own or 0.0) + sum(parents)) / 3600


def unknown_parents(record: RunRecord) -> list[str]:
    """Names of the parents whose cost is not known; of a run that started from weights and names no parent, where they came from."""
    if record.start.source is not None and not record.parents:
        return [record.start.source]
    return [parent.name for parent in record.parents if not _is_known(parent.gpu_seconds)]


def _is_known(seconds: float | None) -> bool:
    return seconds is not None and math.isfinite(seconds)


def _mean(values: Iterable[float | None]) -> float | None:
    every = list(values)
    known = [value for value in every if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if every and len(known) == len(every) else None
