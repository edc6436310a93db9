"""What many runs decide together, in short: per family what was measured, the verdict, and the outcome of every gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ttt_lit.experiment.comparison import Comparison, Differences, compare_all
from ttt_lit.experiment.formats import NONE, interval_text
from ttt_lit.experiment.gates import CandidateGates, judge_candidates
from ttt_lit.experiment.measured import ACCOUNT_WORDS, NOT_PROVED, budgets, measured
from ttt_lit.experiment.recommendation import recommend_scaling
from ttt_lit.experiment.record import RunRecord
from ttt_lit.experiment.report.table import Table
from ttt_lit.experiment.study import FamilyStudy, read_study
from ttt_lit.experiment.verdict import Gate


def decision(records: Sequence[RunRecord]) -> list[str]:
    """One text per family; a sentence where no run takes part in a comparison."""
    families = read_study(records).families.values()
    return [_family(family) for family in families] or ["No run has a role in a comparison: nothing is decided."]


def _family(family: FamilyStudy) -> str:
    judged = judge_candidates(family)
    differences = {arm.name: compare_all(family, arm) for arm in family.arms}
    advice = recommend_scaling(family, judged)
    lines = [f"{family.family}: {advice.verdict}"]
    for each in measured(family, judged, differences):
        lines += [f"  {each.title}", *(f"    {sentence}" for sentence in each.sentences)]
    lines += [f"  Why: {advice.why}", f"  What would change it: {advice.would_change}"]
    tables = (_budgets(family, judged, differences), _gates(family, judged))
    return "\n\n".join(["\n".join(lines), *(table.text() for table in tables if table.rows)])


def _budgets(family: FamilyStudy, judged: Sequence[CandidateGates], differences: Mapping[str, Differences]) -> Table:
    rows = tuple(
        (each.arm, *each.shares, each.loss, _difference(each.difference), "" if each.proved else NOT_PROVED)
        for each in budgets(family, judged, differences)
    )
    shares = (f"GPU-hours ÷ baseline's, {words}" for words in ACCOUNT_WORDS.values())
    return Table(
        title=f"Wall-clock budgets of {family.family} (nats per token)",
        header=("run", *shares, "loss", "Δ baseline, 95% interval", ""),
        rows=rows,
    )


def _difference(comparison: Comparison | None) -> str:
    if comparison is None or comparison.interval is None:
        return NONE
    return interval_text(comparison.interval) + (" (flagged)" if comparison.reasons else "")


def _gates(family: FamilyStudy, judged: Sequence[CandidateGates]) -> Table:
    rows = tuple(
        (each.name, _name(gate), gate.outcome, "–" if gate.outcome == "pass" else str(len(gate.brief or gate.reasons)))
        for each in judged
        for gate in each.gates
    )
    return Table(title=f"Gates of {family.family}", header=("candidate", "gate", "outcome", "reasons"), rows=rows)


def _name(gate: Gate) -> str:
    return gate.name if gate.account is None else f"{gate.name}, {ACCOUNT_WORDS[gate.account]}"
