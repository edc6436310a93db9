"""What every gate returns. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ttt_lit.verdict.arm import Account, Arm

Outcome = Literal["pass", "fail", "insufficient"]
Finding = tuple[Outcome, str]
"""What one part of a gate says, and why."""


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


def gate_of(
    name: str, arm: Arm, findings: list[Finding], numbers: Sequence[tuple[str, str]] = (), brief: Sequence[str] = ()
) -> Gate:
    """A gate of one arm. Reasons: those findings that made the outcome; beside a failure also what could not be told."""
    findings = [("insufficient", problem) for problem in arm.problems] + findings
    outcome = worst([each for each, _ in findings])
    order = ("pass",) if outcome == "pass" else ("fail", "insufficient")
    reasons = [reason for wanted in order for each, reason in findings if each == wanted]
    return Gate(
        name=name,
        subject=arm.name,
        outcome=outcome,
        numbers=tuple(numbers),
        reasons=tuple(dict.fromkeys(reasons)),
        brief=tuple(brief),
    )
