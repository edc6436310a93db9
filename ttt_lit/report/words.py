"""What several tables say alike: names of roles and accounts, differences, and hours against the baseline's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ttt_lit.record.schema import Role, RunRecord
from ttt_lit.report.table import Mark
from ttt_lit.verdict.arm import Account, Arm
from ttt_lit.verdict.comparison import Comparison, Differences, compare_all
from ttt_lit.verdict.formats import NONE, interval
from ttt_lit.verdict.gates import CandidateGates
from ttt_lit.verdict.own_part import ceiling_sentence
from ttt_lit.verdict.recommendation import recommend_scaling
from ttt_lit.verdict.study import FamilyStudy

ROLE_NAMES: dict[Role | None, str] = {
    "ttt_scratch": "baseline",
    "fa_scratch": "FA from scratch",
    "fa_import": "FA imported",
    "bridge": "bridge",
    "direct": "direct",
    "control": "control",
}
ACCOUNT_WORDS: dict[Account, str] = {"marginal": "run alone", "with_parents": "with parents"}
REFERENCES: dict[Role, str] = {"ttt_scratch": "baseline", "fa_scratch": "FA from scratch", "fa_import": "FA imported"}
NOT_PROVED = "measured, not proved"
"""Beside numbers whose evidence is insufficient for a decision."""
NOT_USABLE = "†"
"""Behind a difference that may not be used as evidence."""


def family_differences(family: FamilyStudy) -> dict[str, Differences]:
    """Arm name → its differences to the family's references."""
    return {arm.name: compare_all(family, arm) for arm in family.arms}


def verdict(family: FamilyStudy, judged: Sequence[CandidateGates]) -> tuple[Mark, list[tuple[str, str]]]:
    """The verdict, and what is to be said of it: label and sentence."""
    advice = recommend_scaling(family, judged)
    lines = [("Mind", remark) for remark in remarks(family, judged)]
    lines += [("Why", advice.why), ("What would change it", advice.would_change)]
    return Mark(advice.verdict), lines + ([("What the gate can tell", ceiling_sentence(family))] if judged else [])


def difference(comparison: Comparison | None) -> tuple[str, ...]:
    """Estimate, interval, and its share of the ceiling where that is known; ``NOT_USABLE`` where something forbids the comparison."""
    if comparison is None or comparison.interval is None:
        return (NONE,)
    estimate, ends = interval(comparison.interval)
    share = (f"({comparison.of_ceiling})",) if comparison.of_ceiling else ()
    return estimate + (f" {NOT_USABLE}" if comparison.reasons else ""), ends, *share


def shared_cores(records: Iterable[RunRecord]) -> str:
    """What else is in the times of runs that are processes on a CPU; empty where none is."""
    if not any(record.environment.device.endswith("cpu") for record in records):
        return ""
    return "processes on CPU cores: other work on the machine is in these times"


def remarks(family: FamilyStudy, judged: Sequence[CandidateGates]) -> Iterator[str]:
    """What the numbers of the conversions cannot say: that some are missing, flagged, or of other devices."""
    if judged and family.baseline is None:
        yield "There is no baseline to compare with."
    elif judged and family.baseline is not None and family.baseline.loss is None:
        yield f"{family.baseline.name}: the baseline has no loss."
    for each in judged:
        arm = family.matched(each.experiment, each.variant)
        if each.variant:
            continue
        if arm is None:
            yield f"{each.name}: there is no run at the baseline's number of tokens."
        elif arm.loss is None:
            yield f"{each.name}: no loss was measured{'' if arm.finished else ', the run did not finish'}."
        elif family.baseline is not None:
            yield from _against(arm, family.baseline)
    for control, role in ((family.fa_scratch, "fa_scratch"), (family.fa_import, "fa_import")):
        if judged and control is None:
            yield f"There is no run with the role {role}: differences to it are missing."


def _against(arm: Arm, baseline: Arm) -> Iterator[str]:
    flagged = [f"{each.name}: {problem}" for each in (arm, baseline) for problem in each.problems]
    if flagged:
        yield f"Flagged, so {arm.name} is no evidence: {'; '.join(flagged)}."
    unfinished = [each.name for each in (arm, baseline) if not each.finished]
    if unfinished:
        yield f"GPU-hours of {arm.name} are not compared: {' and '.join(unfinished)} did not finish."
    devices = {record.environment.device for each in (arm, baseline) for record in each.records}
    if len(devices) > 1:
        yield f"GPU-hours of {arm.name} and the baseline are of different devices: {', '.join(sorted(devices))}."
