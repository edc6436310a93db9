"""What the gates mean for the next step: scale up, not yet, or no, with the one measurement that would change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ttt_lit.verdict.gate import Gate
from ttt_lit.verdict.gates import MAX_DELTA, MAX_SHARE, CandidateGates
from ttt_lit.verdict.next_step import NextStep, demo_step
from ttt_lit.verdict.own_part import GATE_NAME, MIN_CEILING
from ttt_lit.verdict.study import FamilyStudy

MAX_FAILURE = 80
"""Characters of a failed run's own words in a verdict."""

Verdict = Literal["scale up", "not yet", "no"]


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """For one family."""

    family: str
    verdict: Verdict
    why: str
    """One sentence."""
    would_change: str
    """The one measurement that would change the verdict."""
    step: NextStep | None = None
    """Where the size is a demo's: what can be done at this size; ``would_change`` says it in words."""


def recommend_scaling(family: FamilyStudy, candidates: Sequence[CandidateGates]) -> Recommendation:
    """One verdict for a family, from the gates of its candidates as ``judge_candidates`` makes them.

    Scale up: a candidate passes the primary gate under the marginal account and all secondary gates, does not fail the gate of TTT's own
    part, and passes it where a model without memory could pass the primary gate too. No: every candidate fails the primary gate. Not yet:
    anything else. Ablations without wall-clock-matched runs are left out where any candidate has them.
    """
    judged = _deciding(family, candidates)
    if not judged:
        return _recommendation(
            family,
            "not yet",
            "There is no conversion of a pretrained model among the runs.",
            "A bridged or direct run.",
        )
    passed = [each for each in judged if each.marginal.outcome == "pass"]
    good = [each for each in passed if not each.open]
    if good:
        return _scale_up(family, max(good, key=lambda each: each.marginal.reduction or 0.0))
    if passed:
        return _almost(family, max(passed, key=lambda each: each.marginal.reduction or 0.0))
    undecided = [each for each in judged if each.marginal.outcome == "insufficient"]
    if undecided:
        return _undecided(family, min(undecided, key=lambda each: len(each.marginal.reasons)))
    return _no(family, judged)


def _deciding(family: FamilyStudy, judged: Sequence[CandidateGates]) -> list[CandidateGates]:
    by_time = {each.name for each in judged if family.shares(each.experiment, each.variant)}
    return [each for each in judged if not by_time or each.name in by_time or not each.variant]


def _scale_up(family: FamilyStudy, best: CandidateGates) -> Recommendation:
    parents = best.with_parents
    why = f"{best.name} {best.marginal.reasons[0]}, and its secondary gates pass. {_own_part(best)}"
    if parents.outcome == "pass":
        return _recommendation(
            family,
            "scale up",
            why + f"With its parent runs it {parents.reasons[0]}.",
            f"The same comparison at the next size, with an interval wholly above {MAX_DELTA:g}.",
        )
    if parents.outcome == "fail":
        why += f"With its parent runs the gate fails ({parents.reasons[0]}): the saving exists only where the checkpoint is there already."
    else:
        why += f"With its parent runs the evidence is insufficient ({parents.reasons[0]})."
    return _recommendation(
        family,
        "scale up",
        why,
        f"The GPU-hours of the parent runs, if they are to be counted: together with the run they must stay within {MAX_SHARE:.2f} of "
        "the baseline's.",
    )


def _own_part(best: CandidateGates) -> str:
    """That TTT's own part was needed and shown, or was not needed and is not shown."""
    gate = best.own_part
    if gate is None or (gate.outcome == "pass") != best.own_part_required:
        return ""
    if best.own_part_required:
        return "A model without memory could pass too, but TTT's own part is shown. "
    return f"{GATE_NAME} is {_said(gate)}, which ceiling and baseline do not ask for. "


def _almost(family: FamilyStudy, best: CandidateGates) -> Recommendation:
    gate = best.open[0]
    why = f"{best.name} {best.marginal.reasons[0]}, but the gate of {gate.name} is {_said(gate)} for {gate.subject}"
    if gate is not best.own_part:
        return _recommendation(
            family, "not yet", f"{why}.", f"A run of {gate.subject} without this: {gate.reasons[0]}."
        )
    elsewhere = (
        f" Or a study with a ceiling of at least {MIN_CEILING:g}, as at a smaller window, of which the baseline uses more than "
        f"{MAX_DELTA:g}."
    )
    return _recommendation(
        family,
        "not yet",
        why + (", and a model without memory could pass." if best.own_part_required else "."),
        "That inner updates lower the loss, alone and against the control, by intervals wholly below 0; what is in the way: "
        f"{gate.reasons[0]}.{'' if gate.outcome == 'fail' else elsewhere}",
    )


def _undecided(family: FamilyStudy, best: CandidateGates) -> Recommendation:
    count, step = len(best.marginal.reasons), demo_step(family, best)
    first = f"{'First of all' if count > 1 else 'Only'} this has to change: {best.marginal.reasons[0]}."
    gaps = "one reason" if count == 1 else f"{count} reasons"
    return _recommendation(
        family,
        "not yet",
        f"The evidence on {best.name} is insufficient for {gaps}, which stand under Gates.",
        first if step is None else _at_demo_size(step),
        step,
    )


def _at_demo_size(step: NextStep) -> str:
    """That the size cannot decide, then what it can still show."""
    command = f": {step.command}" if step.command else ""
    return f"A demo's size can never decide ({step.limit}). At this size, first: {step.sentence}{command}."


def _no(family: FamilyStudy, judged: list[CandidateGates]) -> Recommendation:
    failed = "; ".join(f"{each.name}: {each.marginal.reasons[0]}" for each in judged)
    return _recommendation(
        family,
        "no",
        f"No candidate saves enough. {failed}.",
        f"A run within {MAX_SHARE:.2f} of the baseline's GPU-hours whose whole interval is at or below {MAX_DELTA:g} nats per token.",
    )


def _said(gate: Gate) -> str:
    return "insufficient in evidence" if gate.outcome == "insufficient" else "failed"


def _recommendation(
    family: FamilyStudy, verdict: Verdict, why: str, would_change: str, step: NextStep | None = None
) -> Recommendation:
    return Recommendation(
        family=family.family,
        verdict=verdict,
        why=shorten_failures(why, family),
        would_change=shorten_failures(would_change, family),
        step=step,
    )


def shorten_failures(sentence: str, family: FamilyStudy) -> str:
    """A sentence in which what a failed run of the family left behind, often the text of an exception, is at most 80 characters long."""
    for record in (record for arm in family.arms for record in arm.records):
        reason = record.reason or ""
        if len(reason) > MAX_FAILURE:
            sentence = sentence.replace(f"({reason})", f"({reason[: MAX_FAILURE - 1].rstrip()}…)")
    return sentence
