"""The numbers as CSV: one row per run and stage, one per gate, one per difference."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ttt_lit.metrics import ACCOUNTS
from ttt_lit.record.schema import RunRecord, Stage
from ttt_lit.report.runs import windows
from ttt_lit.report.words import family_differences
from ttt_lit.verdict.arm import ACCOUNTS as GPU_HOUR_ACCOUNTS
from ttt_lit.verdict.comparison import Comparison, reached_at_once, run_hours_to_target, target_loss
from ttt_lit.verdict.gates import CandidateGates, Gate
from ttt_lit.verdict.study import FamilyStudy, read_study
from ttt_lit.verdict.two_by_two import cells, effects

Value = str | float | int | None

RUN_HEADER = (
    "run", "experiment", "role", "variant", "share", "seed", "family", "status", "reason", "headline", "source", "weights_sha256",
    "num_parameters", "target_loss", "gpu_hours_to_target", "gpu_hours_to_target_with_parents",
    "gpu_hours_to_target_is_upper_bound",
    "stage", "mode", "context", "windows", "steps", "planned_steps", "tokens", "planned_tokens", "bytes",
    *(f"gpu_seconds_{account}" for account in ACCOUNTS), "planned_gpu_seconds", "transition_before", "transition_after",
    "transition_held", "loss_inner_off", "loss_inner_on", "bits_per_byte_inner_off", "bits_per_byte_inner_on", "tokens_per_second",
    "seconds_per_1k_tokens", "peak_memory_gib",
)  # fmt: skip
GATE_HEADER = ("family", "candidate", "judged", "gate", "account", "outcome", "numbers", "reasons")
DIFFERENCE_HEADER = (
    "family", "difference", "of", "minus", "nats", "low", "high", "blocks", "documents", "seeds", "ceiling_window", "ceiling_nats",
    "ceiling_low", "ceiling_high", "share_of_ceiling", "usable", "reasons",
)  # fmt: skip
_NO_STAGE: tuple[None] = (None,)
# A spreadsheet takes a cell that begins with one of these for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def runs_csv(records: Iterable[RunRecord]) -> str:
    """Seconds, tokens and losses (nats per token) unrounded; a run without stages has one row with empty stage columns."""
    ordered = sorted(records, key=lambda record: (record.model.family, record.name))
    targets = _targets(ordered)
    rows = (_run_row(r, stage, targets.get(r.model.family)) for r in ordered for stage in r.stages or _NO_STAGE)
    return _write(RUN_HEADER, rows)


def _targets(records: Sequence[RunRecord]) -> dict[str, float | None]:
    """Per family, the loss on the fixed subset that GPU-hours are counted to."""
    families = read_study(records).families.items()
    return {name: None if family.baseline is None else target_loss(family.baseline) for name, family in families}


def gates_csv(judged: Mapping[str, Sequence[CandidateGates]]) -> str:
    """Every number and reason of every gate; ``judged``: the candidates of every family."""
    gates = ((family, each, gate) for family, found in judged.items() for each in found for gate in each.gates)
    return _write(GATE_HEADER, (_gate_row(*row) for row in gates))


def differences_csv(families: Iterable[FamilyStudy]) -> str:
    """Every difference in loss that the page shows: arms to the family's references, and the 2 × 2."""
    rows = (_difference_row(family.family, *each) for family in families for each in _differences(family))
    return _write(DIFFERENCE_HEADER, rows)


def _differences(family: FamilyStudy) -> Iterator[tuple[str, Comparison]]:
    for differences in family_differences(family).values():
        for role, each in differences.items():
            if each is not None:
                yield f"to {role}", each
    for cell in cells(family):
        yield "read with updates − read without", cell.gain
    for pair in effects(family):
        yield "trained and read with updates − trained and read without", pair.whole
        yield "trained with updates − trained without, read with", pair.read_on
        yield "trained with updates − trained without, read without", pair.read_off
        yield "interaction", pair.interaction


def _difference_row(family: str, name: str, each: Comparison) -> Iterator[Value]:
    yield from (family, name, each.candidate, each.reference)
    over, ceiling = each.interval, each.ceiling
    yield from (over.estimate, over.low, over.high, over.blocks, over.documents, over.seeds) if over else (None,) * 6
    yield from (ceiling.window, ceiling.nats, ceiling.low, ceiling.high) if ceiling else (None,) * 4
    yield each.share
    yield from (str(over is not None and not each.reasons).lower(), "; ".join(each.reasons))


def _run_row(record: RunRecord, stage: Stage | None, target: float | None) -> Iterator[Value]:
    """``target``: of the run's family; None: it has none."""
    yield from (record.name, record.experiment, record.role, record.variant, record.share, record.seed)
    yield from (record.model.family, record.status, record.reason, record.headline, record.start.source)
    yield from (record.start.weights_hash, record.model.num_parameters)
    yield from _to_target(record, target)
    if stage is None:
        return
    spent, planned, proof, speed = stage.spent, stage.planned, stage.transition, stage.throughput
    yield from (stage.name, stage.mode, stage.context, windows(stage), spent.optimizer_steps, planned.optimizer_steps)
    yield from (spent.tokens, planned.tokens, spent.bytes, *(spent.gpu_seconds.get(account) for account in ACCOUNTS))
    yield planned.gpu_seconds
    yield from (proof.before, proof.after, str(proof.held).lower()) if proof else (None, None, None)
    off_and_on = stage.validated("off"), stage.validated("on")
    yield from (each.nats_per_token if each else None for each in off_and_on)
    yield from (each.bits_per_byte if each else None for each in off_and_on)
    yield from (speed.tokens_per_second, speed.seconds_per_1k_tokens, speed.peak_memory_gib) if speed else ()


def _to_target(record: RunRecord, target: float | None) -> Iterator[Value]:
    """The target and the GPU-hours to it; no hours for a run that never got there, none at all for one that is not compared."""
    if target is None or record.role in (None, "external"):
        yield from (None,) * 4
        return
    alone, whole = (run_hours_to_target(record, target, account) for account in GPU_HOUR_ACCOUNTS)
    yield from (target, alone, whole, None if alone is None else str(reached_at_once(record, target)).lower())


def _gate_row(family: str, candidate: CandidateGates, gate: Gate) -> Iterator[Value]:
    yield from (family, candidate.name, gate.subject, gate.name, gate.account, gate.outcome)
    yield "; ".join(f"{name}: {value}" for name, value in gate.numbers)
    yield "; ".join(gate.reasons)


def _write(header: Sequence[str], rows: Iterable[Iterable[Value]]) -> str:
    """Every row as long as the header; RFC 4180 quoting."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(header)
    for row in rows:
        cells = [_value(value) for value in row]
        writer.writerow(cells + [""] * (len(header) - len(cells)))
    return buffer.getvalue()


def _value(value: Value) -> str:
    if isinstance(value, str):
        return "'" + value if value.startswith(_FORMULA) else value
    if value is None or not math.isfinite(value):
        return ""
    return repr(value)
