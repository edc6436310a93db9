"""The reporting template: six items for every run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ttt_lit.metrics import ACCOUNTS
from ttt_lit.record.measured import Validation
from ttt_lit.record.schema import Role, RunRecord, Stage
from ttt_lit.report.blocks import Block, Cell, Grid, Heading
from ttt_lit.report.differences import difference_text
from ttt_lit.verdict.arm import Arm, gpu_hours
from ttt_lit.verdict.comparison import Differences
from ttt_lit.verdict.findings import window_of
from ttt_lit.verdict.formats import GPU_HOURS, billions, count, hours, loss, ranges, seconds_as_hours, size
from ttt_lit.verdict.study import FamilyStudy
from ttt_lit.verdict.unfinished import marked

HEADER = (
    "run",
    "1 · checkpoint source",
    "2 · attention and TTT policy",
    "3 · stage budgets: spent of planned",
    "4 · long-context loss",
    "5 · throughput and time",
    "6 · differences",
)
REFERENCES: dict[str, Role] = {"baseline": "ttt_scratch", "FA scratch": "fa_scratch", "FA import": "fa_import"}
_SHOWN_HASH = 12


def run_table(family: FamilyStudy, compared: Mapping[str, Differences]) -> list[Block]:
    """One row per run."""
    rows = tuple(_row(record, arm, compared[arm.name]) for arm in family.arms for record in arm.records)
    caption = f"Runs of {family.family}: source, policy, budgets, loss (nats per token), time, differences"
    return [
        Heading(level=3, text=f"{family.family}: every run"),
        Grid(caption=caption, header=HEADER, rows=rows, wide=True),
    ]


def _row(record: RunRecord, arm: Arm, compared: Differences) -> tuple[Cell, ...]:
    return (
        (marked(record.name, [record]), f"seed {record.seed}, {record.status}"),
        tuple(source(record)),
        tuple(policy(record)),
        tuple(budgets(record)),
        tuple(losses(record)) or "not measured",
        tuple(times(record)),
        tuple(differences(arm, compared)),
    )


def source(record: RunRecord) -> Iterator[str]:
    yield record.model.family
    if record.start.source is None:
        yield "random weights"
    else:
        digest = record.start.weights_hash
        yield record.start.source
        yield f"sha256 {digest[:_SHOWN_HASH]}…" if digest else "hash not recorded"
    for parent in record.parents:
        yield f"parent {parent.name}: {seconds_as_hours(parent.gpu_seconds)} {GPU_HOURS}"


def policy(record: RunRecord) -> Iterator[str]:
    layers = record.model.ttt_layers
    yield f"TTT layers: {ranges(layers)} of {record.model.num_layers}" if layers else "no TTT layers"
    for stage in record.stages:
        yield f"{stage.name}: {windows(stage)}, {stage.mode}, {stage.context:,}"
    if record.start.receipt:
        yield f"tensors: {', '.join(_receipt(record.start.receipt))}"


def _receipt(receipt: Mapping[str, Any]) -> Iterator[str]:
    for status, number in receipt.items():
        amount = number.get("tensors") if isinstance(number, dict) else number
        yield f"{amount} {status}"


def windows(stage: Stage) -> str:
    """dense, a width, or how many layers have which; and the sinks before them."""
    if all(width is None for width in stage.windows):
        return "dense"
    widest = window_of(stage)
    sinks = f", {stage.sink_tokens} sinks" if stage.sink_tokens else ""
    if widest is not None and len(set(stage.windows)) == 1:
        return f"window {widest:,}{sinks}"
    kinds = dict.fromkeys(stage.windows)
    return (
        "windows "
        + " + ".join(f"{stage.windows.count(width)} × {'dense' if width is None else f'{width:,}'}" for width in kinds)
        + sinks
    )


def budgets(record: RunRecord) -> Iterator[str]:
    for stage in record.stages:
        spent, planned = stage.spent, stage.planned
        steps = count(spent.optimizer_steps)
        if planned.optimizer_steps is not None:
            steps += f" of {count(planned.optimizer_steps)}"
        time = seconds_as_hours(spent.gpu_seconds.get("compute"))
        if planned.gpu_seconds is not None:
            time += f" of {seconds_as_hours(planned.gpu_seconds)}"
        yield f"{stage.name}: {steps} steps, {billions(spent.tokens)} tokens, {size(spent.bytes)}, {time} {GPU_HOURS}"
    total = record.totals
    yield f"all: {billions(total.tokens)} tokens, {size(total.bytes)}, {hours(gpu_hours(record, 'marginal'))} {GPU_HOURS}"


def losses(record: RunRecord) -> Iterator[str]:
    final = record.final()
    if final is None:
        return
    yield f"{loss(final.nats_per_token)}, {loss(final.bits_per_byte)} bits per byte (inner {final.inner}, {final.context:,})"
    other = record.final("off" if final.inner == "on" else "on")
    if other is not None:
        yield f"{loss(other.nats_per_token)} with inner {other.inner}"
    yield from _slices(final)


def _slices(validation: Validation) -> Iterator[str]:
    """First, second and last tenth of the positions; the outermost buckets where tenths were not recorded."""
    tenths = [document.deciles for document in validation.documents if len(document.deciles) == 10]
    if tenths:
        mean = [sum(column) / len(tenths) for column in zip(*tenths, strict=True)]
        yield f"tenths of positions: 1st {loss(mean[0])}, 2nd {loss(mean[1])}, 5th {loss(mean[4])}, last {loss(mean[9])}"
    elif validation.buckets:
        for words, bucket in (("first", validation.buckets[0]), ("last", validation.buckets[-1])):
            yield f"{words} bucket (from {bucket.start:,}): {loss(bucket.nats_per_token)}"


def times(record: RunRecord) -> Iterator[str]:
    for stage in record.stages:
        speed = stage.throughput
        if speed is not None:
            yield f"{stage.name}: {speed.tokens_per_second:,.0f} tokens/s, {speed.seconds_per_1k_tokens:.3g} s per 1K"
    accounts = ", ".join(f"{name} {seconds_as_hours(record.totals.gpu_seconds.get(name))}" for name in ACCOUNTS)
    yield f"{GPU_HOURS}: {accounts}"
    yield f"with parents {hours(gpu_hours(record, 'with_parents'))}"


def differences(arm: Arm, compared: Differences) -> Iterator[str]:
    """Of the arm, over its seeds."""
    for words, role in REFERENCES.items():
        comparison = compared[role]
        over = "" if comparison is None or comparison.interval is None else _seeds(comparison.interval.seeds, arm)
        yield f"Δ {words}: {difference_text(comparison)}{over}"


def _seeds(paired: int, arm: Arm) -> str:
    """How many of the arm's seeds have a partner."""
    every = "1 seed" if len(arm.seeds) == 1 else f"{len(arm.seeds)} seeds"
    return f" ({every})" if paired == len(arm.seeds) else f" ({paired} of {every})"
