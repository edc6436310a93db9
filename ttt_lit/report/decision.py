"""What many runs decide together, in short: per family what was measured, the verdict, and the outcome of every gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ttt_lit.record.schema import RunRecord
from ttt_lit.report.table import Table
from ttt_lit.verdict.comparison import Differences, compare_all
from ttt_lit.verdict.formats import NONE, loss
from ttt_lit.verdict.gate import Gate
from ttt_lit.verdict.gates import CandidateGates, judge_candidates
from ttt_lit.verdict.measured import ACCOUNT_WORDS, NOT_PROVED, budgets, difference_words, measured
from ttt_lit.verdict.own_part import ceiling_sentence
from ttt_lit.verdict.recommendation import recommend_scaling, shorten_failures
from ttt_lit.verdict.study import FamilyStudy, read_study
from ttt_lit.verdict.two_by_two import cells, effects
from ttt_lit.verdict.unfinished import marked

MAX_REASONS = 12
"""Up to which a family's reasons are printed."""


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
    if judged:
        lines.append(f"  What the gate can tell: {ceiling_sentence(family)}")
    lines += [f"  Why: {advice.why}", f"  What would change it: {advice.would_change}"]
    tables = (_budgets(family, judged, differences), _updates(family), _pairs(family), _gates(family, judged))
    return "\n\n".join(
        ["\n".join(lines), *(table.text() for table in tables if table.rows), *reason_lines(family, judged)]
    )


def _budgets(family: FamilyStudy, judged: Sequence[CandidateGates], differences: Mapping[str, Differences]) -> Table:
    rows = tuple(
        (
            marked(each.arm, each.records),
            *each.shares,
            each.loss,
            difference_words(each.difference) or NONE,
            "" if each.proved else NOT_PROVED,
        )
        for each in budgets(family, judged, differences)
    )
    shares = (f"GPU-hours ÷ baseline's, {words}" for words in ACCOUNT_WORDS.values())
    return Table(
        title=f"Wall-clock budgets of {family.family} (nats per token)",
        header=("run", *shares, "loss", "Δ baseline, 95% interval", "evidence"),
        rows=rows,
    )


def _updates(family: FamilyStudy) -> Table:
    rows = tuple(
        (
            marked(each.arm.name, each.arm.records),
            each.trained,
            loss(each.off),
            loss(each.on),
            difference_words(each.gain) or NONE,
        )
        for each in cells(family)
    )
    header = ("arm", "trained with updates?", "read without", "read with", "on − off")
    return Table(title=f"Inner updates of {family.family} (nats per token)", header=header, rows=rows)


def _pairs(family: FamilyStudy) -> Table:
    rows = tuple(
        (f"{pair.arm.name} − {pair.control.name}", *(difference_words(each) or NONE for each in pair.comparisons))
        for pair in effects(family)
    )
    return Table(
        title=f"Trained with − trained without updates, {family.family} (nats per token)",
        header=("arms", "with both − without both", "read with", "read without", "interaction"),
        rows=rows,
    )


def _gates(family: FamilyStudy, judged: Sequence[CandidateGates]) -> Table:
    rows = tuple(
        (marked(each.name, _judged(family, each)), _name(gate), gate.outcome, _count(gate))
        for each in judged
        for gate in each.gates
    )
    return Table(title=f"Gates of {family.family}", header=("candidate", "gate", "outcome", "reasons"), rows=rows)


def _count(gate: Gate) -> str:
    return NONE if gate.outcome == "pass" else str(len(gate.brief or gate.reasons))


def _judged(family: FamilyStudy, each: CandidateGates) -> list[RunRecord]:
    """The candidate's runs: the token-matched ones, and those of every budget."""
    arms = [arm for arm in family.arms if (arm.experiment, arm.variant) == (each.experiment, each.variant)]
    return [record for arm in arms for record in arm.records]


def reason_lines(family: FamilyStudy, judged: Sequence[CandidateGates]) -> list[str]:
    """Every reason of the gates that did not pass, once, with what it is about; where they are many, the file that has them."""
    candidates: dict[tuple[str, str], list[str]] = {}
    for each in judged:
        for gate in each.gates:
            for reason in () if gate.outcome == "pass" else gate.brief or gate.reasons:
                names = candidates.setdefault((gate.name, reason), [])
                names += [each.name] if each.name not in names else []
    if not candidates:
        return []
    if len(candidates) > MAX_REASONS:
        where = "report.md and gates.csv, which --output FOLDER writes"
        return [f"Gates of {family.family}: {len(candidates)} different reasons, all of them in {where}"]
    lines = [f"Gates of {family.family}: reasons"]
    for (gate_name, reason), names in candidates.items():
        about = "" if len(names) == len(judged) else f" of {', '.join(names)}"
        lines.append(f"  - {gate_name}{about}: {shorten_failures(reason, family)}")
    return ["\n".join(lines)]


def _name(gate: Gate) -> str:
    return gate.name if gate.account is None else f"{gate.name}, {ACCOUNT_WORDS[gate.account]}"
