"""What can be done at the size of a demo, which never decides: the first evidence that this size can still give. Standard library only.

A record names its arm, but not the matrix file that it came from. So a command is given only where the one file that is known holds what
is missing; otherwise words say what to write into the file that the runs came from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ttt_lit.verdict.arm import Arm
from ttt_lit.verdict.evidence import MIN_SEEDS, SHARES, demo_reasons, missing_shares, single_seeds
from ttt_lit.verdict.gates import CandidateGates
from ttt_lit.verdict.study import FamilyStudy

Kind = Literal["reason", "wall-clock runs", "seeds", "nothing"]
EXAMPLE = "configs/matrix/demo_wallclock.yaml"
"""The matrix file of wall-clock-matched runs at the size of a demo."""
EXAMPLE_BASELINE, EXAMPLE_CANDIDATE = "q_ttt_scratch", "q_p1_bridge"
"""The arms that it holds: one seed, every share, no variant."""
EXAMPLE_OF = "configs/matrix/demo.yaml"
"""The matrix file whose runs it continues."""


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """The first thing to do without changing the size."""

    kind: Kind
    """reason: what the gate names first; nothing: all that this size can show is there."""
    limit: str
    """The first reason why this size cannot decide."""
    sentence: str
    command: str | None = None
    """To copy, where it does what the sentence says as it stands; None: something has to be written or mended first."""


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
            return _wall_clock(family.baseline, candidate, [s for s in SHARES if s not in arms], limits[0])
        if reason in single:
            return _seeds(family.baseline, candidate, arms.values(), limits[0])
        return NextStep(kind="reason", limit=limits[0], sentence=reason)
    return NextStep(kind="nothing", limit=limits[0], sentence="all that this size can show is there")


def _in_example(baseline: Arm, candidate: CandidateGates) -> bool:
    names = (baseline.experiment, candidate.experiment, candidate.variant)
    return names == (EXAMPLE_BASELINE, EXAMPLE_CANDIDATE, "")


def _wall_clock(baseline: Arm, candidate: CandidateGates, shares: list[float], limit: str) -> NextStep:
    wanted = ", ".join(f"{share:g}" for share in shares)
    entry = f"gpu_hours: {{of: {baseline.experiment}, shares: [{wanted}]}}"
    run = f"run {candidate.name} at {wanted} of the GPU-hours of {baseline.name}"
    if _in_example(baseline, candidate):
        return NextStep(
            kind="wall-clock runs",
            limit=limit,
            sentence=f"{run}; for the runs of {EXAMPLE_OF} there is a file with {entry}",
            command=f"python cli.py matrix --config {EXAMPLE}",
        )
    return NextStep(
        kind="wall-clock runs",
        limit=limit,
        sentence=f"{run}: in the matrix file that both came from, add an entry for {candidate.experiment} alone, with the settings of "
        f"its present one and {entry}, as {EXAMPLE} has for {EXAMPLE_CANDIDATE}; then run python cli.py matrix with that file",
    )


def _seeds(baseline: Arm, candidate: CandidateGates, arms: Iterable[Arm], limit: str) -> NextStep:
    seeds = sorted(set(baseline.seeds).union(*(arm.seeds for arm in arms)))
    unused = [seed for seed in range(MIN_SEEDS) if seed not in seeds]
    wanted = ", ".join(map(str, sorted([*seeds, *unused[: max(0, MIN_SEEDS - len(seeds))]])))
    where = "the matrix file that they came from"
    if _in_example(baseline, candidate):
        where += f" (for the runs of {EXAMPLE_OF}: {EXAMPLE})"
    return NextStep(
        kind="seeds",
        limit=limit,
        sentence=f"train the baseline and the wall-clock-matched runs with a second seed: add seeds: [{wanted}] to the entries of both "
        f"in {where}, and then run python cli.py matrix with that file",
    )
