"""From records to the blocks of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ttt_lit.record.schema import RunRecord
from ttt_lit.report.blocks import Block, Heading, Page
from ttt_lit.report.closing import across, other_runs, problems, reading
from ttt_lit.report.differences import family_differences
from ttt_lit.report.family import ablations, arms_table, figures
from ttt_lit.report.gates import gate_section
from ttt_lit.report.runs import run_table
from ttt_lit.report.updates import damage_table, two_by_two
from ttt_lit.report.verdicts import verdicts
from ttt_lit.verdict.comparison import Differences
from ttt_lit.verdict.gates import MAX_DELTA, MIN_SAVING, CandidateGates
from ttt_lit.verdict.study import FamilyStudy, Study

TITLE = "Does a pretrained start save TTT-E2E training time?"
QUESTION = (
    f"Does converting a pretrained model reach the long-context loss of TTT-E2E trained from scratch, to {MAX_DELTA:g} nats per token, "
    f"for at least {MIN_SAVING:.0%} fewer GPU-hours?"
)


def build_page(
    study: Study, judged: Mapping[str, Sequence[CandidateGates]], records: Sequence[RunRecord], *, command: str
) -> Page:
    """The whole page, in the order in which it is read; ``judged``: the candidates of every family."""
    differences = {name: family_differences(family) for name, family in study.families.items()}
    blocks: list[Block] = [*verdicts(study, judged, differences), *gate_section(study, judged)]
    for name, family in study.families.items():
        blocks += _family(family, differences[name])
    blocks += [*problems(study, differences), *across(study), *other_runs(study), *reading(records, command)]
    return Page(title=TITLE, question=QUESTION, blocks=tuple(blocks))


def _family(family: FamilyStudy, differences: Mapping[str, Differences]) -> list[Block]:
    return [
        Heading(level=2, text=f"Family {family.family}"),
        *arms_table(family, differences),
        *two_by_two(family),
        *damage_table(family),
        *figures(family, differences),
        *run_table(family, differences),
        *ablations(family),
    ]
