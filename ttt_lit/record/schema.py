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
from ttt_lit.record.status import Status

SCHEMA_VERSION = 2
RECORD_NAME = "record.json"

Mode = Literal["none", "static", "meta", "first_order"]
Role = Literal["external", "fa_scratch", "fa_import", "bridge", "direct", "ttt_scratch", "control"]
Headline = Literal["on", "off"]


@dataclass(kw_only=True)
class Start:
    """Where the weights came from."""

    source: str | None = None
    """The checkpoint that the run started from; null: from nothing."""
    weights_hash: str | None = None
    """SHA-256 that identifies that checkpoint's weights; null: random weights."""
    lineage: list[Any] = field(default_factory=list)
    """The start checkpoint's lineage, as stored with it."""
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
    """Checkpoint family: qwen2, gemma3, …"""
    num_parameters: int
    num_layers: int
    ttt_layers: list[int]
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
    """The same of the long documents, whose held-out side is what every run is measured on."""


@dataclass(kw_only=True)
class Parent:
    """A run whose weights this run started from, directly or through others."""

    name: str
    """EXPERIMENT/ID, or the name of a checkpoint that came from elsewhere."""
    stage: str | None = None
    """Its last stage that went into the start; null: not known."""
    gpu_seconds: float | None = None
    """Compute device-seconds up to there; null: not known."""
    tokens: int | None = None
    """Tokens trained up to there; null: not known."""


@dataclass(kw_only=True)
class Environment:
    """What the run ran on. No host name."""

    versions: dict[str, str] = field(default_factory=dict)
    """Package → version, Python included."""
    device: str = "cpu"
    num_devices: int = 1
    kernels: list[str] = field(default_factory=list)
    """Attention kernels that really ran."""


@dataclass(kw_only=True)
class Git:
    """State of the source tree; nulls where there is none."""

    revision: str | None = None
    dirty: bool | None = None


@dataclass(kw_only=True)
class Planned:
    """A stage's budget: whole optimiser steps, or compute device-seconds."""

    optimizer_steps: int | None = None
    tokens: int | None = None
    gpu_seconds: float | None = None


@dataclass(kw_only=True)
class Spent:
    """What was consumed, over all ranks."""

    optimizer_steps: int = 0
    micro_batches: int = 0
    tokens: int = 0
    bytes: int = 0
    gpu_seconds: dict[str, float] = field(default_factory=dict)
    """Device-seconds per account: compute, validation, checkpoint, compile."""


@dataclass(kw_only=True)
class Transition:
    """Proof of the conversion into a stage: one fixed batch in float32 at this stage's context."""

    kind: str
    """What was converted, in words."""
    preserves: bool
    """Whether the function must not change."""
    before: float
    """Nats per token as the stage before computes it, without the inner loop."""
    after: float
    """Nats per token as this stage computes it, without inner updates."""
    tolerance: float
    """Largest |after − before| allowed where the function is preserved."""

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def held(self) -> bool:
        """Whether the promise, if there is one, was kept. NaN keeps none."""
        return not self.preserves or abs(self.difference) <= self.tolerance


@dataclass(kw_only=True)
class Bucket:
    """Mean loss over the positions start … stop − 1."""

    start: int
    stop: int
    nats_per_token: float


@dataclass(kw_only=True)
class Document:
    """One held-out block: the unit that comparisons are paired by. Losses in nats per token."""

    id: str
    """Of its tokens: equal ids are equal blocks."""
    source: int
    """The document it was cut from, numbered in its split: blocks of one document are not independent."""
    bytes: int
    nats_per_token: float
    short: float
    """Mean over the positions of the short context."""
    deciles: list[float]
    """Mean over each tenth of the positions, in order."""


@dataclass(kw_only=True)
class Validation:
    """One pass over held-out documents."""

    inner: Literal["on", "off"]
    """Whether the inner loop updated the fast weights."""
    context: int
    nats_per_token: float
    bits_per_byte: float
    blocks: int
    tokens: int
    bytes: int
    buckets: list[Bucket]
    """Loss by position, in order, without gaps from 0 to the context."""
    documents: list[Document] = field(default_factory=list)
    """Every block, sorted by id."""
    curve: str | None = None
    """Array file with the loss at every position, relative to the record."""


@dataclass(kw_only=True)
class Norms:
    """Summary of a stage's inner update norms: L2 norm of the fast weights' change per chunk."""

    mean: float
    minimum: float
    maximum: float
    last: float
    count: int
    """Measurements that entered the summary."""
    by_chunk: list[float] = field(default_factory=list)
    """Mean per chunk of the sequence, in order."""


@dataclass(kw_only=True)
class Throughput:
    """Speed of a stage's compute account, over all devices."""

    tokens_per_second: float
    seconds_per_1k_tokens: float
    flop_per_token: float
    """By the analytic count."""
    flop_per_second: float
    peak_memory_gib: float | None = None


@dataclass(kw_only=True)
class Damage:
    """Loss of the stage's network minus that of the imported model on the same held-out tokens, in nats per token; null where it is not
    finite."""

    when: Literal["start", "end"]
    """Of the stage."""
    context: Literal["short", "long"]
    inner: Literal["on", "off"]
    inside: float | None
    """Mean over the positions inside the stage's window."""
    beyond: float | None
    """Mean over those beyond it; null, too, where the window with its sinks spans the context."""
    nats: float | None
    """Mean over all positions."""


@dataclass(kw_only=True)
class Imported:
    """The imported model's own loss on the held-out blocks that damage is measured on."""

    context: Literal["short", "long"]
    blocks: int
    tokens: int
    """Over all blocks."""
    nats_per_token: float
    buckets: list[Bucket]
    """Loss by position, in order, without gaps from 0 to the context."""


@dataclass(kw_only=True)
class Ceiling:
    """Worth of the context beyond a window to the imported dense model: its loss on fresh contexts of the last tokens minus that at full
    length, so the most that a memory of what lies further back can win on these data. As ``python cli.py probe`` measured it."""

    window: int
    stride: int
    """A token was read with its last ``window`` … ``window + stride`` tokens."""
    nats: float
    low: float | None
    """95 % interval, bootstrap over documents; null: a single document gives none."""
    high: float | None
    blocks: int
    documents: int
    checkpoint: str
    """Name and the hash's first digits of the model that was probed."""
    digest: str = field(default="", metadata=ADDED_LATER)
    """SHA-256 that identifies its weights, as ``weights_hash`` of a start that is this model; empty: not known."""


@dataclass(kw_only=True)
class Stage:
    """One stage of the run."""

    name: str
    mode: Mode
    context: int
    windows: list[int | None]
    """Window of each layer in tokens; null: dense."""
    sink_tokens: int = 0
    """Tokens at the start that stay visible outside of the windows."""
    planned: Planned
    spent: Spent = field(default_factory=Spent)
    carry: Literal["all", "params"] = "all"
    """What of the stage before was carried: optimiser state too, or weights only."""
    train_loss_first: float | None = None
    """Nats per token at the first optimiser step."""
    train_loss_mean: float | None = None
    train_loss_last_tenth: float | None = None
    """Mean over the last 10 % of the optimiser steps."""
    train_losses: list[float] = field(default_factory=list)
    """Nats per token of every optimiser step."""
    train_gpu_seconds: list[float] = field(default_factory=list)
    """Compute device-seconds of the whole run at the end of every optimiser step."""
    transition: Transition | None = None
    """Null for a run's first stage, if nothing was converted."""
    validations: list[Validation] = field(default_factory=list)
    """At the end of the stage: inner loop off and on, for every context that was looked at."""
    inner_update_norms: Norms | None = None
    throughput: Throughput | None = None
    damage: list[Damage] = field(default_factory=list, metadata=ADDED_LATER)
    """At the stage's start and end, against the imported model; empty: not measured."""

    def validated(self, inner: Headline) -> Validation | None:
        """The stage's validation in that setting, the first of several contexts; None where it was not measured."""
        return next((validation for validation in self.validations if validation.inner == inner), None)


@dataclass(kw_only=True)
class EvaluationPoint:
    """One point of the series on a fixed subset, for cost to a target loss."""

    stage: str
    tokens: int
    """Trained so far in the run."""
    gpu_seconds: float
    """Compute device-seconds so far in the run."""
    inner_on: float | None = None
    """Nats per token; null: not measured."""
    inner_off: float | None = None


@dataclass(kw_only=True)
class RunRecord:
    """Everything about one run."""

    run_id: str
    experiment: str
    role: Role | None = None
    """What the run is in a comparison; null: nothing in particular."""
    variant: str = ""
    """What an ablation changed, as ``axis=label``; empty: nothing."""
    share: float | None = None
    """Budget as a share of the baseline's GPU-hours; null: matched by tokens."""
    seed: int = 0
    headline: Headline = "off"
    """Which of the final stage's losses speaks for the run: with the inner loop on or off."""
    status: Status = "running"
    reason: str | None = None
    """Why the run did not finish; null while it runs and when it finished."""
    started: str | None = None
    """UTC, ISO 8601."""
    ended: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration."""
    start: Start = field(default_factory=Start)
    model: Model
    data: Data = field(default_factory=Data)
    environment: Environment = field(default_factory=Environment)
    git: Git = field(default_factory=Git)
    start_validation: Validation | None = None
    """The start checkpoint as it came, on the blocks that every stage end is measured on, inner loop off; null for random weights."""
    imported: list[Imported] = field(default_factory=list, metadata=ADDED_LATER)
    """What damage is measured against; empty where the start checkpoint is not a model as imported, and where damage is not measured."""
    stages: list[Stage] = field(default_factory=list)
    evaluations: list[EvaluationPoint] = field(default_factory=list)
    totals: Spent = field(default_factory=Spent)
    unigram_entropy: float | None = None
    """Nats per token: entropy of the validation tokens' own frequencies. A model that is not well below it has learnt little else."""
    parents: list[Parent] = field(default_factory=list)
    """Every run that made the start checkpoint, oldest first."""
    ceiling: list[Ceiling] = field(default_factory=list, metadata=ADDED_LATER)
    """Per window that was probed, what context beyond it is worth to the imported model; empty: the run was given no probe."""
    schema_version: int = SCHEMA_VERSION

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
