"""From records to the blocks of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ttt_lit.experiment.gates import Gate
from ttt_lit.experiment.page.blocks import Block, Heading, Page, Paragraph
from ttt_lit.experiment.page.differences import family_differences
from ttt_lit.experiment.page.parts.closing import across, other_runs, problems, reading
from ttt_lit.experiment.page.parts.family import ablations, arms_table, figures
from ttt_lit.experiment.page.parts.runs import run_table
from ttt_lit.experiment.page.parts.verdicts import gate_table, verdicts
from ttt_lit.experiment.record import RunRecord
from ttt_lit.experiment.study import FamilyStudy, Study

TITLE = "Does a pretrained start save TTT-E2E training time?"
QUESTION = (
    "Does converting a pretrained model to TTT-E2E reach the long-context loss of TTT-E2E trained from scratch for at least 30 % "
    "fewer GPU-hours?"
)


def build_page(
    study: Study, gates: Mapping[str, Sequence[Gate]], records: Sequence[RunRecord], *, command: str
) -> Page:
    """The whole page, in the order in which it is read; ``gates``: of every family."""
    blocks: list[Block] = [Paragraph(text=QUESTION), *verdicts(study), *gate_table(gates)]
    for family in study.families.values():
        blocks += _family(family)
    blocks += [*problems(study), *across(study), *other_runs(study), *reading(records, command)]
    return Page(title=TITLE, blocks=tuple(blocks))


def _family(family: FamilyStudy) -> list[Block]:
    differences = family_differences(family)
    return [
        Heading(level=2, text=f"Family {family.family}"),
        *arms_table(family, differences),
        *figures(family, differences),
        *run_table(family, differences),
        *ablations(family),
    ]
