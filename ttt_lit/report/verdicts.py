"""The first screen: what was measured, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ttt_lit.report.blocks import Block, Cell, Grid, Mark, Paragraph, State, Verdict
from ttt_lit.report.differences import difference_lines
from ttt_lit.verdict.comparison import Differences
from ttt_lit.verdict.formats import loss
from ttt_lit.verdict.gates import CandidateGates
from ttt_lit.verdict.measured import ACCOUNT_WORDS, NOT_PROVED, Budget, budgets, measured, shared_cores
from ttt_lit.verdict.own_part import ceiling_sentence
from ttt_lit.verdict.recommendation import Verdict as Advice
from ttt_lit.verdict.recommendation import recommend_scaling
from ttt_lit.verdict.study import FamilyStudy, Study
from ttt_lit.verdict.unfinished import marked

_ADVICE: dict[Advice, State] = {"scale up": "good", "not yet": "open", "no": "bad"}


def verdicts(
    study: Study,
    judged: Mapping[str, Sequence[CandidateGates]],
    differences: Mapping[str, Mapping[str, Differences]],
) -> list[Block]:
    """One card per family; ``judged`` and ``differences``: of every family, differences also by arm."""
    blocks: list[Block] = [_card(family, judged[name], differences[name]) for name, family in study.families.items()]
    return blocks or [Paragraph(text="No run has a role in a comparison, so there is nothing to decide.")]


def _card(family: FamilyStudy, judged: Sequence[CandidateGates], differences: Mapping[str, Differences]) -> Verdict:
    advice = recommend_scaling(family, judged)
    return Verdict(
        family=family.family,
        mark=Mark(state=_ADVICE[advice.verdict], word=advice.verdict),
        measured=tuple((each.title, each.sentences) for each in measured(family, judged, differences)),
        budgets=_budgets(family, budgets(family, judged, differences)),
        lines=(
            *((("What the gate can tell", ceiling_sentence(family)),) if judged else ()),
            ("Why", advice.why),
            ("What would change it", advice.would_change),
        ),
    )


def _budgets(family: FamilyStudy, found: Sequence[Budget]) -> Grid | None:
    if not found:
        return None
    baseline = "no baseline" if family.baseline is None else f"baseline {loss(family.baseline.loss)}"
    unproved = "" if all(each.proved for each in found) else f"; {NOT_PROVED}"
    shared = shared_cores(record for each in found for record in each.records)
    return Grid(
        caption=f"Budgets that are a share of the baseline's GPU-hours{unproved} (nats per token, {baseline})"
        + (f"; {shared}" if shared else ""),
        header=("run", "GPU-hours ÷ baseline's", "loss", "Δ baseline, 95% interval"),
        rows=tuple(_budget_row(each) for each in found),
        wide=True,
    )


def _budget_row(budget: Budget) -> tuple[Cell, ...]:
    shares = tuple(f"{share} {words}" for share, words in zip(budget.shares, ACCOUNT_WORDS.values(), strict=True))
    return marked(budget.arm, budget.records), shares, budget.loss, difference_lines(budget.difference)
