"""What the gates mean for the next step: scale up, not yet, or no, with the one measurement that would change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ttt_lit.experiment.gates import MAX_DELTA, MAX_SHARE, convergence_gate, long_token_gate, primary_gate
from ttt_lit.experiment.statistics import RESAMPLES
from ttt_lit.experiment.study import Arm, FamilyStudy
from ttt_lit.experiment.verdict import Gate

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


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A candidate with its gates."""

    marginal: Gate
    with_parents: Gate
    secondary: tuple[Gate, ...]
    """Of the arm that decided the primary gate, else of the token-matched one; empty: there is neither."""

    @property
    def name(self) -> str:
        return self.marginal.subject

    @property
    def open(self) -> list[Gate]:
        """Secondary gates that did not pass."""
        return [gate for gate in self.secondary if gate.outcome != "pass"]


def recommend_scaling(family: FamilyStudy, *, resamples: int = RESAMPLES) -> Recommendation:
    """One verdict for a family, from the gates of its candidates.

    Scale up: a candidate passes the primary gate under the marginal account and all secondary gates. No: every candidate fails the
    primary gate. Not yet: anything else. Candidates with wall-clock-matched runs are judged; without any, all of them are.
    """
    judged = [_judge(family, *candidate, resamples) for candidate in _candidates(family)]
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


def _candidates(family: FamilyStudy) -> list[tuple[str, str]]:
    by_time = [candidate for candidate in family.candidates if family.shares(*candidate)]
    return by_time or family.candidates


def _judge(family: FamilyStudy, experiment: str, variant: str, resamples: int) -> _Judged:
    marginal = primary_gate(family, experiment, variant, "marginal", resamples=resamples)
    by_name = {arm.name: arm for arm in family.shares(experiment, variant).values()}
    arm: Arm | None = by_name.get(marginal.decided_by or "") or family.matched(experiment, variant)
    return _Judged(
        marginal=marginal,
        with_parents=primary_gate(family, experiment, variant, "with_parents", resamples=resamples),
        secondary=()
        if arm is None
        else (convergence_gate(arm, resamples=resamples), long_token_gate(arm, resamples=resamples)),
    )


def _scale_up(family: FamilyStudy, best: _Judged) -> Recommendation:
    parents = best.with_parents
    why = f"{best.name} {best.marginal.reasons[0]}, and its secondary gates pass. "
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


def _almost(family: FamilyStudy, best: _Judged) -> Recommendation:
    gate = best.open[0]
    return _recommendation(
        family,
        "not yet",
        f"{best.name} {best.marginal.reasons[0]}, but the gate of {gate.name} is {_said(gate)} for {gate.subject}.",
        f"A run of {gate.subject} without this: {gate.reasons[0]}.",
    )


def _undecided(family: FamilyStudy, best: _Judged) -> Recommendation:
    count = len(best.marginal.reasons)
    others = f" and {count - 1} more" if count > 1 else ""
    return _recommendation(
        family,
        "not yet",
        f"The evidence on {best.name} is insufficient: {best.marginal.reasons[0]}{others}.",
        f"What is in the way first: {best.marginal.reasons[0]}.",
    )


def _no(family: FamilyStudy, judged: list[_Judged]) -> Recommendation:
    failed = "; ".join(f"{each.name}: {each.marginal.reasons[0]}" for each in judged)
    return _recommendation(
        family,
        "no",
        f"No candidate saves enough. {failed}.",
        f"A run within {MAX_SHARE:.2f} of the baseline's GPU-hours whose whole interval is at or below {MAX_DELTA:g} nats per token.",
    )


def _said(gate: Gate) -> str:
    return "insufficient in evidence" if gate.outcome == "insufficient" else "failed"


def _recommendation(family: FamilyStudy, verdict: Verdict, why: str, would_change: str) -> Recommendation:
    return Recommendation(family=family.family, verdict=verdict, why=why, would_change=would_change)
