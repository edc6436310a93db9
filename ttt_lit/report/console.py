"""The summary for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ttt_lit.record.measured import Validation
from ttt_lit.record.schema import RunRecord, Stage
from ttt_lit.report.decision import decision
from ttt_lit.report.table import Table
from ttt_lit.verdict.findings import findings, window_of
from ttt_lit.verdict.unfinished import marked

FEW = 3
"""Runs up to which each is described in sentences."""


def console(records: Sequence[RunRecord], *, unreadable: Sequence[str] = ()) -> str:
    """Tables of all runs; then what each shows in sentences, or of more than ``FEW`` runs what they decide together.

    ``unreadable``: sentences on records that could not be read; they come first.
    """
    blocks = ["\n".join(["Problems", *(f"  - {line}" for line in unreadable)])] if unreadable else []
    blocks += [table.text() for table in tables(records)]
    if len(records) > FEW:
        return "\n\n".join([*blocks, *decision(records)])
    for record in records:
        blocks.append("\n".join([f"What {record.name} shows", *(f"  - {line}" for line in findings(record))]))
    return "\n\n".join(blocks)


def tables(records: Sequence[RunRecord]) -> list[Table]:
    """The tables that have at least one row; runs and stages in the given order, a run that did not finish with its status."""
    made = [_stages(records), _validations(records), _transitions(records)]
    return [table for table in made if table.rows]


def _stages(records: Sequence[RunRecord]) -> Table:
    rows = []
    for record in records:
        for stage in record.stages:
            speed = stage.throughput.tokens_per_second if stage.throughput else None
            seconds = stage.spent.gpu_seconds
            rows.append(
                (
                    marked(record.name, [record]),
                    stage.name,
                    stage.mode,
                    f"{stage.context:,}",
                    _windows(stage),
                    _steps(stage),
                    f"{stage.spent.tokens:,}",
                    _number(seconds.get("compute"), 1),
                    _number(seconds.get("validation"), 1),
                    _number(stage.train_loss_first, 3),
                    _number(stage.train_loss_last_tenth, 3),
                    _number(speed, 0),
                )
            )
    header = ("run", "stage", "mode", "context", "window", "steps", "tokens", "GPU-s", "validation GPU-s")
    return Table(
        title="Stages (losses in nats per token)",
        header=(*header, "first loss", "last 10 %", "tokens/s"),
        rows=tuple(rows),
    )


def _validations(records: Sequence[RunRecord]) -> Table:
    rows = []
    for record in records:
        for stage in record.stages:
            for context in dict.fromkeys(validation.context for validation in stage.validations):
                by_inner = {v.inner: v for v in stage.validations if v.context == context}
                off, on = by_inner.get("off"), by_inner.get("on")
                rows.append((marked(record.name, [record]), stage.name, f"{context:,}", *_off_and_on(off, on)))
    header = ("run", "stage", "context", "TTT off", "TTT on", "on − off", "bits/byte off", "bits/byte on")
    return Table(
        title="Validation (nats per token; first and last position bucket)",
        header=(*header, "off: first → last", "on: first → last"),
        rows=tuple(rows),
    )


def _off_and_on(off: Validation | None, on: Validation | None) -> tuple[str, ...]:
    difference = f"{on.nats_per_token - off.nats_per_token:+.3f}" if off and on else "–"
    return (
        _number(off.nats_per_token if off else None, 3),
        _number(on.nats_per_token if on else None, 3),
        difference,
        _number(off.bits_per_byte if off else None, 3),
        _number(on.bits_per_byte if on else None, 3),
        _ends(off),
        _ends(on),
    )


def _transitions(records: Sequence[RunRecord]) -> Table:
    rows = []
    for record in records:
        for stage in record.stages:
            proof = stage.transition
            if proof is None:
                continue
            outcome = "jump allowed" if not proof.preserves else "held" if proof.held else "BROKEN"
            before, after = f"{proof.before:.5f}", f"{proof.after:.5f}"
            name = marked(record.name, [record])
            rows.append((name, stage.name, proof.kind, before, after, f"{proof.difference:+.1e}", outcome))
    return Table(
        title="Transitions (one fixed batch, float32, nats per token)",
        header=("run", "into", "conversion", "before", "after", "difference", "equality"),
        rows=tuple(rows),
    )


def _steps(stage: Stage) -> str:
    planned = stage.planned.optimizer_steps
    done = f"{stage.spent.optimizer_steps:,}"
    return done if planned in (None, stage.spent.optimizer_steps) else f"{done} of {planned:,}"


def _windows(stage: Stage) -> str:
    if all(window is None for window in stage.windows):
        return "dense"
    window = window_of(stage)
    return f"{window:,}" if window is not None and len(set(stage.windows)) == 1 else "mixed"


def _ends(validation: Validation | None) -> str:
    if validation is None or not validation.buckets:
        return "–"
    first, last = validation.buckets[0], validation.buckets[-1]
    return f"{first.nats_per_token:.3f} → {last.nats_per_token:.3f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
