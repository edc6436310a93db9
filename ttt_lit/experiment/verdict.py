"""What every gate returns. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ttt_lit.experiment.arm import Account

Outcome = Literal["pass", "fail", "insufficient"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One judgement."""

    name: str
    subject: str
    """What was judged: the name of an arm, of a candidate in the primary gate."""
    account: Account | None = None
    """Which GPU-hours were counted; None: the gate counts none."""
    outcome: Outcome
    numbers: tuple[tuple[str, str], ...] = ()
    """Label and formatted value with its unit: what was measured, also where it does not suffice."""
    reasons: tuple[str, ...] = ()
    """Sentences: why the outcome is what it is; with ``insufficient`` everything that is in the way."""
    brief: tuple[str, ...] = ()
    """The reasons in fewer sentences, where there are many of one kind; empty: they are short enough as they are."""
    reduction: float | None = None
    """Primary gate: 1 − the smallest share that holds, also where the evidence is insufficient; None: no share holds."""
    decided_by: str | None = None
    """Primary gate: name of the arm of that share."""


def worst(outcomes: list[Outcome]) -> Outcome:
    """A gate of several parts fails with any part, and passes with all of them; without parts there is no evidence."""
    if "fail" in outcomes:
        return "fail"
    return "insufficient" if "insufficient" in outcomes or not outcomes else "pass"
