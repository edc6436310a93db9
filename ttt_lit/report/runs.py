"""Tables with a row per run, or per run and stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ttt_lit.metrics import ACCOUNTS
from ttt_lit.record.measured import Validation
from ttt_lit.record.schema import RunRecord, Stage
from ttt_lit.report.table import Cell, Table
from ttt_lit.report.words import REFERENCES, difference
from ttt_lit.verdict.arm import Arm, gpu_hours
from ttt_lit.verdict.comparison import Comparison, Differences
from ttt_lit.verdict.findings import window_of
from ttt_lit.verdict.formats import (
    GPU_HOURS,
    NONE,
    billions,
    count,
    counted,
    hours,
    loss,
    ranges,
    seconds_as_hours,
    size,
)
from ttt_lit.verdict.study import FamilyStudy
from ttt_lit.verdict.unfinished import marked

_SHOWN_HASH = 12


def stages(records: Sequence[RunRecord]) -> Table:
    """What every stage did and spent; runs and stages in the given order."""
    rows = tuple(
        (
            marked(record.name, [record]),
            stage.name,
            stage.mode,
            f"{stage.context:,}",
            windows(stage).removeprefix("window "),
            _of(stage.spent.optimizer_steps, stage.planned.optimizer_steps),
            f"{stage.spent.tokens:,}",
            _number(stage.spent.gpu_seconds.get("compute"), 1),
            _number(stage.spent.gpu_seconds.get("validation"), 1),
            _number(stage.train_loss_first, 3),
            _number(stage.train_loss_last_tenth, 3),
            _number(stage.throughput.tokens_per_second if stage.throughput else None, 0),
        )
        for record in records
        for stage in record.stages
    )
    header = (
        "run, stage, mode, context, window, steps, tokens, GPU-s, validation GPU-s, first loss, last 10 %, tokens/s"
    )
    return Table("Stages (losses in nats per token)", tuple(header.split(", ")), rows)


def _of(done: int, planned: int | None) -> str:
    return f"{done:,}" if planned in (None, done) else f"{done:,} of {planned:,}"


def validations(records: Sequence[RunRecord]) -> Table:
    """The inner loop off and on, of the same stage and context."""
    rows = []
    for record in records:
        for stage in record.stages:
            for context in dict.fromkeys(each.context for each in stage.validations):
                by_inner = {each.inner: each for each in stage.validations if each.context == context}
                off, on = by_inner.get("off"), by_inner.get("on")
                both = f"{on.nats_per_token - off.nats_per_token:+.3f}" if off and on else NONE
                nats = (_number(each.nats_per_token if each else None, 3) for each in (off, on))
                bits = (_number(each.bits_per_byte if each else None, 3) for each in (off, on))
                ends = (_ends(each) for each in (off, on))
                rows.append((marked(record.name, [record]), stage.name, f"{context:,}", *nats, both, *bits, *ends))
    header = "run, stage, context, TTT off, TTT on, on − off, bits/byte off, bits/byte on, off: first → last, on: first → last"
    return Table("Validation (nats per token; first and last position bucket)", tuple(header.split(", ")), tuple(rows))


def _ends(validation: Validation | None) -> str:
    if validation is None or not validation.buckets:
        return NONE
    return f"{validation.buckets[0].nats_per_token:.3f} → {validation.buckets[-1].nats_per_token:.3f}"


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def transitions(records: Sequence[RunRecord]) -> Table:
    """What every conversion between stages did to the function."""
    rows = []
    for record, stage in ((each, stage) for each in records for stage in each.stages):
        proof = stage.transition
        if proof is not None:
            outcome = "jump allowed" if not proof.preserves else "held" if proof.held else "BROKEN"
            numbers = (f"{proof.before:.5f}", f"{proof.after:.5f}", f"{proof.difference:+.1e}")
            rows.append((marked(record.name, [record]), stage.name, proof.kind, *numbers, outcome))
    header = ("run", "into", "conversion", "before", "after", "difference", "equality")
    return Table("Transitions (one fixed batch, float32, nats per token)", header, tuple(rows))


def template(family: FamilyStudy, compared: Mapping[str, Differences]) -> Table:
    """The reporting template: six items for every run."""
    rows = tuple(_items(record, arm, compared[arm.name]) for arm in family.arms for record in arm.records)
    title = f"Runs of {family.family}: source, policy, budgets, loss (nats per token), time, differences"
    header = (
        "run", "1 · checkpoint source", "2 · attention and TTT policy", "3 · stage budgets: spent of planned",
        "4 · long-context loss", "5 · throughput and time", "6 · differences",
    )  # fmt: skip
    return Table(title, header, rows, wide=True)


def _items(record: RunRecord, arm: Arm, compared: Differences) -> tuple[Cell, ...]:
    deltas = tuple(f"Δ {name}: {_with_seeds(compared[role], arm)}" for role, name in REFERENCES.items())
    items = map(tuple, (_source(record), _policy(record), _budgets(record), _losses(record), _times(record)))
    return (marked(record.name, [record]), f"seed {record.seed}, {record.status}"), *items, deltas


def _source(record: RunRecord) -> Iterator[str]:
    yield record.model.family
    if record.start.source is None:
        yield "random weights"
    else:
        digest = record.start.weights_hash
        yield record.start.source
        yield f"sha256 {digest[:_SHOWN_HASH]}…" if digest else "hash not recorded"
    for parent in record.parents:
        yield f"parent {parent.name}: {seconds_as_hours(parent.gpu_seconds)} {GPU_HOURS}"


def _policy(record: RunRecord) -> Iterator[str]:
    layers = record.model.ttt_layers
    yield f"TTT layers: {ranges(layers)} of {record.model.num_layers}" if layers else "no TTT layers"
    for stage in record.stages:
        yield f"{stage.name}: {windows(stage)}, {stage.mode}, {stage.context:,}"
    if record.start.receipt:
        tensors = (
            (number.get("tensors") if isinstance(number, dict) else number, status)
            for status, number in record.start.receipt.items()
        )
        yield "tensors: " + ", ".join(f"{number} {status}" for number, status in tensors)


def windows(stage: Stage) -> str:
    """dense, a width, or how many layers have which; and the sinks before them."""
    if all(width is None for width in stage.windows):
        return "dense"
    widest = window_of(stage)
    sinks = f", {stage.sink_tokens} sinks" if stage.sink_tokens else ""
    if widest is not None and len(set(stage.windows)) == 1:
        return f"window {widest:,}{sinks}"
    kinds = {"dense" if width is None else f"{width:,}": stage.windows.count(width) for width in stage.windows}
    return "windows " + " + ".join(f"{number} × {kind}" for kind, number in kinds.items()) + sinks


def _budgets(record: RunRecord) -> Iterator[str]:
    for stage in record.stages:
        spent, planned = stage.spent, stage.planned
        steps, time = count(spent.optimizer_steps), seconds_as_hours(spent.gpu_seconds.get("compute"))
        steps += "" if planned.optimizer_steps is None else f" of {count(planned.optimizer_steps)}"
        time += "" if planned.gpu_seconds is None else f" of {seconds_as_hours(planned.gpu_seconds)}"
        yield f"{stage.name}: {steps} steps, {billions(spent.tokens)} tokens, {size(spent.bytes)}, {time} {GPU_HOURS}"
    total = record.totals
    yield f"all: {billions(total.tokens)} tokens, {size(total.bytes)}, {hours(gpu_hours(record, 'marginal'))} {GPU_HOURS}"


def _losses(record: RunRecord) -> Iterator[str]:
    final = record.final()
    if final is None:
        yield "not measured"
        return
    yield f"{loss(final.nats_per_token)}, {loss(final.bits_per_byte)} bits per byte (inner {final.inner}, {final.context:,})"
    other = record.final("off" if final.inner == "on" else "on")
    if other is not None:
        yield f"{loss(other.nats_per_token)} with inner {other.inner}"
    tenths = [document.deciles for document in final.documents if len(document.deciles) == 10]
    if tenths:
        mean = [loss(sum(column) / len(tenths)) for column in zip(*tenths, strict=True)]
        yield f"tenths of positions: 1st {mean[0]}, 2nd {mean[1]}, 5th {mean[4]}, last {mean[9]}"
    elif final.buckets:
        for words, bucket in (("first", final.buckets[0]), ("last", final.buckets[-1])):
            yield f"{words} bucket (from {bucket.start:,}): {loss(bucket.nats_per_token)}"


def _times(record: RunRecord) -> Iterator[str]:
    for stage in record.stages:
        speed = stage.throughput
        if speed is not None:
            yield f"{stage.name}: {speed.tokens_per_second:,.0f} tokens/s, {speed.seconds_per_1k_tokens:.3g} s per 1K"
    accounts = ", ".join(f"{name} {seconds_as_hours(record.totals.gpu_seconds.get(name))}" for name in ACCOUNTS)
    yield f"{GPU_HOURS}: {accounts}"
    yield f"with parents {hours(gpu_hours(record, 'with_parents'))}"


def _with_seeds(comparison: Comparison | None, arm: Arm) -> str:
    """Of the arm, over its seeds: how many of them have a partner."""
    text = " ".join(difference(comparison))
    if comparison is None or comparison.interval is None:
        return text
    paired, every = comparison.interval.seeds, counted(len(arm.seeds), "seed")
    return f"{text} ({every})" if paired == len(arm.seeds) else f"{text} ({paired} of {every})"
