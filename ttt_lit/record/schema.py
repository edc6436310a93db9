"""The run record: one JSON file per run that holds everything a report needs. Documented in ``docs/run-record.md``.

Reading is strict: unknown or missing fields, wrong types, other schema versions and non-finite numbers are errors that
name the file and the field. A loss that became NaN is written as null, and only a diverged run may contain such a null.
Standard library only, so a report starts at once.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ttt_lit.record.codec import ADDED_LATER, decode, encode, refuse_constant, write_atomic
from ttt_lit.record.measured import (
    Ceiling,
    Damage,
    EvaluationPoint,
    Imported,
    Norms,
    Throughput,
    Transition,
    Validation,
)

SCHEMA_VERSION = 2
RECORD_NAME = "record.json"

Mode = Literal["none", "static", "meta", "first_order"]
Role = Literal["external", "fa_scratch", "fa_import", "bridge", "direct", "ttt_scratch", "control"]
Headline = Literal["on", "off"]
Status = Literal["running", "finished", "diverged", "interrupted", "failed"]
ENDED: tuple[Status, ...] = ("finished", "diverged")
"""Runs that no start continues: they are complete, or going on would go wrong again."""


@dataclass(kw_only=True)
class Start:
    """Where the weights came from."""

    source: str | None = None
    """The checkpoint that the run started from; null: from nothing."""
    weights_hash: str | None = None
    """SHA-256 that identifies that checkpoint's weights; null: random weights."""
    lineage: list[Any] = field(default_factory=list)
    """That checkpoint's lineage, as stored with it."""
    receipt: dict[str, Any] = field(default_factory=dict)
    """Which tensors were inherited, new or dropped."""

    @property
    def models(self) -> set[str | None]:
        """Hashes of the weights that it began with, and with which the runs began that made these."""
        return {
            self.weights_hash,
            *(step.get("source_hash") for step in self.lineage if step.get("operation") == "fit"),
        }


@dataclass(kw_only=True)
class Model:
    """The network at the start of the run."""

    family: str
    """Checkpoint family: ``qwen2``, ``gemma3``, …"""
    num_parameters: int
    """All parameters, a tied head counted once."""
    num_layers: int
    ttt_layers: list[int]
    """Indices of the layers with fast weights."""
    spec: dict[str, Any] = field(default_factory=dict)
    """The whole model spec."""


@dataclass(kw_only=True)
class Data:
    """Identities of what the run read: equal hashes are equal bytes."""

    tokenizer: str | None = None
    """Hash of the tokenizer."""
    short: str | None = None
    """SHA-256 of the manifest of the short documents; null where no stage reads them."""
    long: str | None = None
    """The same of the long documents, whose held-out side every run is measured on."""


@dataclass(kw_only=True)
class Parent:
    """A run whose weights this run started from, directly or through others."""

    name: str
    """EXPERIMENT/ID, or the name of a checkpoint that came from elsewhere."""
    stage: str | None = None
    """Its last stage that went into the start; null: not known."""
    gpu_seconds: float | None = None
    """Compute device-seconds up to there; null: not known. ``import --trained-by RUN`` makes them known."""
    tokens: int | None = None
    """Tokens trained up to there; null: not known."""


@dataclass(kw_only=True)
class Environment:
    """What the run ran on. No host name."""

    versions: dict[str, str] = field(default_factory=dict)
    """Package → version, Python included."""
    device: str = "cpu"
    """Device name."""
    num_devices: int = 1
    kernels: list[str] = field(default_factory=list)
    """Attention kernels that really ran (``flash``, ``sdpa``, ``triton``, ``tiled``), and ``torch.compile`` where it did."""


@dataclass(kw_only=True)
class Git:
    """State of the source tree; nulls where there is none."""

    revision: str | None = None
    """Commit; null outside a repository."""
    dirty: bool | None = None
    """Whether tracked files differed from it."""


@dataclass(kw_only=True)
class Planned:
    """A stage's budget: whole optimiser steps, or compute device-seconds."""

    optimizer_steps: int | None = None
    """Budget in whole optimiser steps."""
    tokens: int | None = None
    """The same in tokens."""
    gpu_seconds: float | None = None
    """Budget in compute device-seconds."""


@dataclass(kw_only=True)
class Spent:
    """What was consumed, over all ranks."""

    optimizer_steps: int = 0
    micro_batches: int = 0
    tokens: int = 0
    bytes: int = 0
    """Bytes of the text of these tokens."""
    gpu_seconds: dict[str, float] = field(default_factory=dict)
    """Device-seconds per account: ``compute`` (waiting for data included), ``validation``, ``checkpoint``, ``compile``."""


@dataclass(kw_only=True)
class Stage:
    """One stage of the run."""

    name: str
    """A, B0, B1, B2 or C."""
    mode: Mode
    """Inner loop in training: ``none``, ``static``, ``meta`` or ``first_order``."""
    context: int
    """Training context in tokens."""
    windows: list[int | None]
    """Attention window of each layer; null: dense."""
    sink_tokens: int = 0
    """Tokens at the start that stay visible outside of the windows, in the layers that had full attention before the stage."""
    planned: Planned
    """The stage's budget."""
    spent: Spent = field(default_factory=Spent)
    """What it consumed."""
    carry: Literal["all", "params"] = "all"
    """What came from the stage before: ``all`` (optimiser state too) or ``params``."""
    train_loss_first: float | None = None
    """At the first optimiser step."""
    train_loss_mean: float | None = None
    """Over the stage's optimiser steps."""
    train_loss_last_tenth: float | None = None
    """Mean over the last 10 % of the optimiser steps."""
    train_losses: list[float] = field(default_factory=list)
    """Loss of every optimiser step."""
    train_gpu_seconds: list[float] = field(default_factory=list)
    """Compute device-seconds of the whole run at the end of every optimiser step."""
    transition: Transition | None = None
    """Proof of the conversion into this stage; null where nothing was converted."""
    validations: list[Validation] = field(default_factory=list)
    """At the end of the stage: inner loop off and on, for every context looked at."""
    inner_update_norms: Norms | None = None
    """Null where the inner loop does not run."""
    throughput: Throughput | None = None
    damage: list[Damage] = field(default_factory=list, metadata=ADDED_LATER)
    """At the stage's start and end, against the imported model; empty: not measured."""

    def validated(self, inner: Headline) -> Validation | None:
        """The stage's validation in that setting, the first of several contexts; None where it was not measured."""
        return next((validation for validation in self.validations if validation.inner == inner), None)


@dataclass(kw_only=True)
class RunRecord:
    """Everything about one run."""

    run_id: str
    """The run's own name, unique within the experiment."""
    experiment: str
    """What the run is an instance of."""
    role: Role | None = None
    """What the run is in a comparison: ``external``, ``fa_scratch``, ``fa_import``, ``bridge``, ``direct``, ``ttt_scratch`` or ``control``;
    null: nothing in particular."""
    variant: str = ""
    """What an ablation changed, as ``axis=label`` separated by commas; empty: nothing."""
    share: float | None = None
    """Budget as a share of the baseline's GPU-hours; null: matched by tokens."""
    seed: int = 0
    """Of random initial values."""
    headline: Headline = "off"
    """Which of the last stage's losses speaks for the run: inner loop ``on`` or ``off``."""
    status: Status = "running"
    """``running``, ``finished``, ``diverged``, ``interrupted`` or ``failed``."""
    reason: str | None = None
    """Why the run did not finish; null while it runs and when it finished, required otherwise."""
    started: str | None = None
    """UTC, ISO 8601."""
    ended: str | None = None
    """UTC, ISO 8601."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration; an infinite number is the string ``.inf``, as in YAML."""
    start: Start = field(default_factory=Start)
    """Where the weights came from."""
    model: Model
    """The network."""
    data: Data = field(default_factory=Data)
    """What it read."""
    environment: Environment = field(default_factory=Environment)
    """What it ran on."""
    git: Git = field(default_factory=Git)
    """The source tree."""
    start_validation: Validation | None = None
    """The start checkpoint as it came, on the blocks that every stage end is measured on, inner loop off; null for random weights."""
    imported: list[Imported] = field(default_factory=list, metadata=ADDED_LATER)
    """The imported model's own losses, which damage is measured against; empty for random weights, for a start from another run's
    checkpoint, and where damage is not measured."""
    stages: list[Stage] = field(default_factory=list)
    """In the order in which they ran."""
    evaluations: list[EvaluationPoint] = field(default_factory=list)
    """The series during training, for cost to a target loss."""
    totals: Spent = field(default_factory=Spent)
    """Sum over the stages."""
    unigram_entropy: float | None = None
    """Nats per token: entropy of the validation tokens' own frequencies, which a trained model must leave well behind."""
    parents: list[Parent] = field(default_factory=list)
    """Every run that made the start checkpoint, oldest first."""
    ceiling: list[Ceiling] = field(default_factory=list, metadata=ADDED_LATER)
    """Per window that ``python cli.py probe`` tried, what context beyond it is worth to the imported model; empty where
    ``model.validation.probe`` is null."""
    schema_version: int = SCHEMA_VERSION
    """2."""

    @property
    def name(self) -> str:
        """The run among all runs: experiment and id."""
        return f"{self.experiment}/{self.run_id}"

    def final(self, inner: Headline | None = None) -> Validation | None:
        """The last stage's validation that speaks for the run (or that of ``inner``); None where it was not measured."""
        return self.stages[-1].validated(inner or self.headline) if self.stages else None

    def trained_by(self) -> list[dict[str, Any]]:
        """This run and its parents, oldest first, as a checkpoint's lineage names who trained it. ValueError unless it has finished."""
        if self.status != "finished":
            raise ValueError(
                f"{self.name}: its status is {self.status}, so what its weights have cost is not known yet"
            )
        own = Parent(
            name=self.name,
            stage=self.stages[-1].name,
            gpu_seconds=round(self.totals.gpu_seconds["compute"], 3),
            tokens=self.totals.tokens,
        )
        return [dataclasses.asdict(parent) for parent in (*self.parents, own)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. NotFinite, a ValueError naming the field, if a number is not finite and the run did not diverge."""
        _check_status(self)
        plain: dict[str, Any] = encode(dataclasses.asdict(self), "record", self.status == "diverged")
        return plain

    @classmethod
    def from_dict(cls, data: Any) -> RunRecord:
        """Inverse of ``to_dict``; strict. Nulls of a diverged run in fields that must be numbers come back as NaN."""
        if not isinstance(data, dict):
            raise ValueError(f"record: got {type(data).__name__}, expected an object")
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version: got {version!r}, expected {SCHEMA_VERSION}; use the ttt_lit that wrote it"
            )
        record: RunRecord = decode(cls, data, "record", data.get("status") == "diverged")
        _check_status(record)
        return record

    def write(self, path: Path) -> None:
        """Replace the file in one step: a reader sees the old record or the new one, never half of it."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        write_atomic(path, text)

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """The record in a file or a run's folder. FileNotFoundError or ValueError in one line that names the file."""
        path = path / RECORD_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no run record; expected a run folder with {RECORD_NAME}, as fit writes it"
            )
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant))
        except ValueError as error:
            raise ValueError(f"{path}: not a readable run record: {error}") from error


def _check_status(record: RunRecord) -> None:
    needs_reason = record.status in ("diverged", "interrupted", "failed")
    if needs_reason != (record.reason is not None):
        expected = "a reason" if needs_reason else "no reason"
        raise ValueError(f"record.reason: got {record.reason!r} with status {record.status!r}, expected {expected}")
