"""The summary for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ttt_lit.record.schema import RunRecord
from ttt_lit.report import tables
from ttt_lit.report.runs import stages, transitions, validations
from ttt_lit.report.table import Table
from ttt_lit.report.words import NOT_USABLE, family_differences, verdict
from ttt_lit.verdict.findings import findings
from ttt_lit.verdict.gates import judge_candidates
from ttt_lit.verdict.study import FamilyStudy, read_study
from ttt_lit.verdict.two_by_two import cells, effects

FEW = 3
"""Runs up to which each is described in sentences."""
MAX_REASONS = 12
"""Up to which a family's reasons are printed."""


def console(records: Sequence[RunRecord], *, unreadable: Sequence[str] = ()) -> str:
    """Tables of all runs; then what each shows in sentences, or of more than ``FEW`` runs what they decide together.

    ``unreadable``: sentences on records that could not be read; they come first.
    """
    blocks = ["\n".join(["Problems", *(f"  - {line}" for line in unreadable)])] if unreadable else []
    blocks += [table.text() for table in run_tables(records)]
    if len(records) > FEW:
        return "\n\n".join([*blocks, *decision(records)])
    for record in records:
        blocks.append("\n".join([f"What {record.name} shows", *(f"  - {line}" for line in findings(record))]))
    return "\n\n".join(blocks)


def run_tables(records: Sequence[RunRecord]) -> list[Table]:
    """Those that have a row; transitions only of many runs: of few, the sentences have the same."""
    made = [stages(records), validations(records), *([transitions(records)] if len(records) > FEW else [])]
    return [table for table in made if table.rows]


def decision(records: Sequence[RunRecord]) -> list[str]:
    """Per family the verdict, what was measured, and every gate; a sentence where no run takes part in a comparison."""
    families = read_study(records).families.values()
    texts = ["\n\n".join(_family(family)) for family in families]
    return texts or ["No run has a role in a comparison: nothing is decided."]


def _family(family: FamilyStudy) -> Iterator[str]:
    judged, differences = judge_candidates(family), family_differences(family)
    mark, lines = verdict(family, judged)
    yield "\n".join([f"{family.family}: {mark}", *(f"  {label}: {sentence}" for label, sentence in lines)])
    measured, outcomes = tables.measured(family, judged, differences), tables.gate_outcomes({family.family: judged})
    updates = (tables.readings(family, cells(family)), tables.trained_with(family, effects(family)))
    shown = [table.text() for table in (measured, *updates, outcomes) if table is not None and table.rows]
    yield from shown
    reasons = tables.gate_reasons(family, judged, passed=False)
    if len(reasons.rows) > MAX_REASONS:
        where = "report.md and gates.csv, which --output FOLDER writes"
        yield f"{reasons.title}: {len(reasons.rows)} different ones, all of them in {where}"
    elif reasons.rows:
        yield reasons.text()
    if any(NOT_USABLE in text for text in shown):
        yield f"{NOT_USABLE} may not be used as evidence; --output FOLDER writes a page with the reasons."
