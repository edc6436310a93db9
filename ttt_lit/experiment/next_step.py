"""What can be done at the size of a demo, which never decides: the first evidence that this size can still give. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ttt_lit.experiment.evidence import MIN_SEEDS, SHARES, demo_reasons, missing_shares, single_seeds
from ttt_lit.experiment.gates import CandidateGates
from ttt_lit.experiment.study import FamilyStudy

Kind = Literal["reason", "wall-clock runs", "seeds", "nothing"]
EXAMPLE = "configs/matrix/demo_wallclock.yaml"
"""The matrix file of wall-clock-matched runs at the size of a demo."""


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """The first thing to do without changing the size."""

    kind: Kind
    """reason: what the gate names first; nothing: all that this size can show is there."""
    limit: str
    """The first reason why this size cannot decide."""
    sentence: str
    command: str | None = None
    """To copy; None: it depends on what is wrong."""


def demo_step(family: FamilyStudy, candidate: CandidateGates) -> NextStep | None:
    """None where the baseline's size is not that of a demo, or there is no finished baseline to tell it by."""
    if family.baseline is None or not family.baseline.finished:
        return None
    limits = list(demo_reasons(family.baseline))
    if not limits:
        return None
    arms = family.shares(candidate.experiment, candidate.variant)
    missing = set(missing_shares(arms))
    single = set(single_seeds(family.baseline, list(arms.values())))
    for reason in candidate.marginal.reasons:
        if reason in limits:
            continue
        if reason in missing:
            return _wall_clock(family.baseline.name, candidate, [s for s in SHARES if s not in arms], limits[0])
        if reason in single:
            return _seeds(limits[0])
        return NextStep(kind="reason", limit=limits[0], sentence=reason)
    return NextStep(kind="nothing", limit=limits[0], sentence="all that this size can show is there")


def _wall_clock(baseline: str, candidate: CandidateGates, shares: list[float], limit: str) -> NextStep:
    wanted = ", ".join(f"{share:g}" for share in shares)
    return NextStep(
        kind="wall-clock runs",
        limit=limit,
        sentence=f"run {candidate.name} at {wanted} of the GPU-hours of {baseline} (in a matrix file: gpu_hours: {{of: {baseline}, "
        f"shares: [{wanted}]}}; {EXAMPLE} is one, for the arm that it names)",
        command=f"python cli.py matrix --config {EXAMPLE}",
    )


def _seeds(limit: str) -> NextStep:
    seeds = ", ".join(map(str, range(MIN_SEEDS)))
    return NextStep(
        kind="seeds",
        limit=limit,
        sentence=f"run a second seed of the baseline and of the wall-clock-matched runs: seeds: [{seeds}] in both items of {EXAMPLE}",
        command=f"python cli.py matrix --config {EXAMPLE}",
    )
