"""The secondary gates: did training converge without accidents, and does the loss hold to the end of the context?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from ttt_lit.record.divergence import DivergenceDetector
from ttt_lit.record.schema import RunRecord, Stage
from ttt_lit.verdict.arm import Arm
from ttt_lit.verdict.formats import counted, nats
from ttt_lit.verdict.gate import Finding, Gate, Outcome, gate_of
from ttt_lit.verdict.statistics import MIN_DOCUMENTS, RESAMPLES, Interval, level_change, mean_interval

SPIKE_NATS = 0.5
"""Nats per token above the lowest running median of the stage so far from which an optimiser step counts as high."""
SPIKE_STEPS = 20
"""Consecutive high optimiser steps that are a spike."""
SPIKE_WINDOW = 32
"""Losses in the running median. The limit exists once the window is full, so a stage's first 32 steps, in which the rate warms up and a
conversion is digested, are not judged."""
TREND_STAGE = "C"
"""The stage whose last third must not rise: the one at the long context."""
MIN_LAST_THIRD = 40
"""Optimiser steps in the last third, below which its trend cannot be told: of flat curves whose neighbours are correlated by 0.3, 9 %
would fail as rising with 12 steps, 5 % with 40."""
MAX_LAST_RISE = 0.05
"""Nats per token by which the last third may rise at most, as far as can be told. A converged run is flat, so its interval lies around 0:
without a margin it could never pass."""
MAX_DECILE_RISE = 0.02
"""Nats per token by which the loss may rise from one tenth of the positions to the next."""
DECILES = 10


def convergence_gate(arm: Arm, *, resamples: int = RESAMPLES) -> Gate:
    """Stable training: no divergence, no spike in any stage, and a last third of stage C that does not rise. Every seed must pass."""
    findings: list[Finding] = []
    numbers: list[tuple[str, str]] = []
    for record in arm.records:
        who = f"seed {record.seed}: "
        findings += [(outcome, who + reason) for outcome, reason in _accidents(record)]
        outcome, reason, change = _trend(record, resamples)
        findings.append((outcome, who + reason))
        if change is not None:
            numbers.append((f"change over the last third of {TREND_STAGE}, seed {record.seed}", change))
    return gate_of("stable convergence", arm, findings, numbers)


def _accidents(record: RunRecord) -> Iterator[Finding]:
    if record.status == "diverged":
        yield "fail", f"the run diverged ({record.reason})"
    elif record.status != "finished":
        yield "insufficient", f"the run did not finish: {record.status}"
    for stage in record.stages:
        if not stage.train_losses:
            yield "insufficient", f"stage {stage.name} has no training losses"
        elif (spike := _spike(stage)) is not None:
            yield "fail", spike


def _spike(stage: Stage) -> str | None:
    """The first spike in words, by the rule that stops a diverging run, at this gate's limits."""
    detector = DivergenceDetector(
        window=SPIKE_WINDOW, min_history=SPIKE_WINDOW, margin_nats=SPIKE_NATS, patience=SPIKE_STEPS
    )
    for step, loss in enumerate(stage.train_losses, start=1):
        reason = detector.update(loss)
        if reason is not None:
            return f"stage {stage.name}, step {step}: {reason}"
    return None


def _trend(record: RunRecord, resamples: int) -> tuple[Outcome, str, str | None]:
    losses = next((stage.train_losses for stage in record.stages if stage.name == TREND_STAGE), None)
    if losses is None:
        return "insufficient", f"there is no stage {TREND_STAGE}", None
    last = losses[len(losses) - len(losses) // 3 :]
    if len(last) < MIN_LAST_THIRD:
        return (
            "insufficient",
            f"the last third of {TREND_STAGE} has {len(last)} steps, at least {MIN_LAST_THIRD} are needed",
            None,
        )
    if not all(math.isfinite(loss) for loss in last):
        return "insufficient", f"the last third of {TREND_STAGE} has losses that are not finite", None
    change = level_change(last, resamples=resamples)
    text = nats(change)
    if change.low > 0:
        return "fail", f"the training loss rises over the last third of {TREND_STAGE}: {text}", text
    if change.high > MAX_LAST_RISE:
        reason = f"a rise of more than {MAX_LAST_RISE:g} nats per token over the last third of {TREND_STAGE} cannot be excluded: {text}"
        return "insufficient", reason, text
    return "pass", f"no rise of the training loss over the last third of {TREND_STAGE}: {text}", text


def long_token_gate(arm: Arm, *, resamples: int = RESAMPLES) -> Gate:
    """No degradation at late positions: the last tenth is not above the second, and no tenth is much above the one before it."""
    tables = _deciles(arm)
    if tables is None:
        reason = f"not every seed has finite losses in {DECILES} tenths of the positions for the same documents"
        return gate_of("long-token loss", arm, [("insufficient", reason)])
    whole = _step(tables, 1, DECILES - 1, arm.sources, resamples)
    steps = {later: _step(tables, later - 1, later, arm.sources, resamples) for later in range(1, DECILES)}
    steepest = max(steps, key=lambda later: steps[later].estimate)
    overall = [_bounded(whole, 0.0, "last tenth of the positions minus the second")]
    rises = {
        later: _bounded(interval, MAX_DECILE_RISE, f"tenth {later + 1} of the positions minus tenth {later}")
        for later, interval in steps.items()
    }
    if whole.documents < MIN_DOCUMENTS:
        few = f"measured on {counted(whole.documents, 'document')}, an interval needs at least {MIN_DOCUMENTS}"
        overall = [("insufficient", few), *map(_unsure, overall)]
        rises = {later: _unsure(finding) for later, finding in rises.items()}
    numbers = [
        ("last tenth minus second", nats(whole)),
        (f"largest rise between neighbours (tenth {steepest} to {steepest + 1})", nats(steps[steepest])),
    ]
    findings = [*overall, *rises.values()]
    return gate_of("long-token loss", arm, findings, numbers, list(_brief(overall, rises, steps)))


def _brief(overall: Sequence[Finding], rises: Mapping[int, Finding], steps: Mapping[int, Interval]) -> Iterator[str]:
    """The open neighbours of an undecided gate in one sentence; nothing where something failed or they are few."""
    unclear = [later for later, (outcome, _) in rises.items() if outcome == "insufficient"]
    if len(unclear) < 2 or "fail" in (outcome for outcome, _ in (*overall, *rises.values())):
        return
    yield from (text for outcome, text in overall if outcome == "insufficient")
    worst_pair = max(unclear, key=lambda later: steps[later].high)
    yield (
        f"for {len(unclear)} of {len(rises)} pairs of neighbouring tenths a rise of more than {MAX_DECILE_RISE:g} nats per token "
        f"cannot be excluded; the highest bound is that of tenth {worst_pair} to {worst_pair + 1}: {nats(steps[worst_pair])}"
    )


def _deciles(arm: Arm) -> list[dict[str, list[float]]] | None:
    tables = [{d.id: d.deciles for d in final.documents} if final else {} for final in arm.finals()]
    same = all(table.keys() == tables[0].keys() for table in tables)
    rows = [row for table in tables for row in table.values()]
    sound = all(len(row) == DECILES and all(map(math.isfinite, row)) for row in rows)
    return tables if rows and same and sound else None


def _step(
    tables: list[dict[str, list[float]]], earlier: int, later: int, sources: Mapping[str, int], resamples: int
) -> Interval:
    """Loss of one tenth minus that of another, paired inside each block."""
    return mean_interval(
        [{each: row[later] - row[earlier] for each, row in table.items()} for table in tables],
        documents=sources,
        resamples=resamples,
    )


def _bounded(interval: Interval, limit: float, what: str) -> Finding:
    text = f"{what}: {nats(interval)}"
    if interval.high <= limit:
        return "pass", f"{text}, at most {limit:g}"
    if interval.low > limit:
        return "fail", f"{text}, above {limit:g}"
    return "insufficient", f"{text}, the interval crosses {limit:g}" if interval.bounded else text


def _unsure(finding: Finding) -> Finding:
    """Too few documents cannot fail a gate."""
    outcome, text = finding
    return ("insufficient" if outcome == "fail" else outcome), text
