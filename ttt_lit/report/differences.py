"""Every arm's loss against its family's references, and how a cell shows it."""

from __future__ import annotations

from ttt_lit.verdict.comparison import Comparison, Differences, compare_all
from ttt_lit.verdict.formats import NONE, interval
from ttt_lit.verdict.study import FamilyStudy

NOT_USABLE = "†"
"""Behind a difference that may not be used as evidence."""


def family_differences(family: FamilyStudy) -> dict[str, Differences]:
    """Arm name → its differences."""
    return {arm.name: compare_all(family, arm) for arm in family.arms}


def difference_text(comparison: Comparison | None) -> str:
    """Estimate and interval, with ``NOT_USABLE`` where something forbids the comparison."""
    return " ".join(difference_lines(comparison))


def difference_lines(comparison: Comparison | None) -> tuple[str, ...]:
    """The same as two lines, for a narrow column, with its share of the ceiling as a third where that is known."""
    if comparison is None or comparison.interval is None:
        return (NONE,)
    estimate, ends = interval(comparison.interval)
    share = (f"({comparison.of_ceiling})",) if comparison.of_ceiling else ()
    return estimate + (f" {NOT_USABLE}" if comparison.reasons else ""), ends, *share
