"""The first screen: what to do, and the gates that decided it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ttt_lit.experiment.gates import Gate, Outcome, convergence_gate, long_token_gate, primary_gate
from ttt_lit.experiment.page.blocks import Block, Cell, Folded, Grid, Heading, Mark, Paragraph, State, Verdict
from ttt_lit.experiment.recommendation import Verdict as Advice
from ttt_lit.experiment.recommendation import recommend_scaling
from ttt_lit.experiment.study import ACCOUNTS, Account, FamilyStudy, Study

_ADVICE: dict[Advice, State] = {"scale up": "good", "not yet": "open", "no": "bad"}
_OUTCOMES: dict[Outcome, State] = {"pass": "good", "fail": "bad", "insufficient": "open"}
_SHOWN_REASONS = 3
"""Up to which the reasons of a passed gate are shown at once; those of any other always are."""
ACCOUNT_WORDS: dict[Account, str] = {"marginal": "run alone", "with_parents": "with parents"}


def verdicts(study: Study) -> list[Block]:
    """One verdict per family."""
    blocks: list[Block] = []
    for family in study.families.values():
        advice = recommend_scaling(family)
        lines = (("Why", advice.why), ("What would change it", advice.would_change))
        mark = Mark(state=_ADVICE[advice.verdict], word=advice.verdict)
        blocks.append(Verdict(family=family.family, mark=mark, lines=lines))
    if not blocks:
        blocks.append(Paragraph(text="No run has a role in a comparison, so there is nothing to decide."))
    return blocks


def gates_of(family: FamilyStudy) -> list[Gate]:
    """Every candidate's gates: primary under both accounts, then convergence and long tokens of its token-matched arm."""
    gates = []
    for experiment, variant in family.candidates:
        gates += [primary_gate(family, experiment, variant, account) for account in ACCOUNTS]
        matched = family.matched(experiment, variant)
        if matched is not None:
            gates += [convergence_gate(matched), long_token_gate(matched)]
    return gates


def gate_table(gates: Mapping[str, Sequence[Gate]]) -> list[Block]:
    """All outcomes at a glance, then one row per gate; ``gates``: of every family."""
    if not any(gates.values()):
        return [Heading(level=2, text="Gates"), Paragraph(text="No bridge and no direct conversion: no gate applies.")]
    header = ("candidate", "gate", "outcome", "numbers", "reasons")
    rows = tuple(_row(family, gate) for family, found in gates.items() for gate in found)
    return [
        Heading(level=2, text="Gates"),
        _overview(gates),
        Heading(level=3, text="What decided each gate"),
        Grid(caption="Numbers and reasons of every gate", header=header, rows=rows, wide=True),
    ]


def _overview(gates: Mapping[str, Sequence[Gate]]) -> Grid:
    """One row per candidate, one column per gate and account."""
    found = [(family, gate) for family, of_family in gates.items() for gate in of_family]
    columns = list(dict.fromkeys(_column(gate) for _, gate in found))
    by_place = {(family, gate.subject, _column(gate)): gate for family, gate in found}
    rows = tuple(
        (subject, family, *(_outcome(by_place.get((family, subject, column))) for column in columns))
        for family, subject in dict.fromkeys((family, gate.subject) for family, gate in found)
    )
    return Grid(caption="Outcome of every gate", header=("candidate", "family", *columns), rows=rows)


def _column(gate: Gate) -> str:
    return gate.name if gate.account is None else f"{gate.name}, {ACCOUNT_WORDS[gate.account]}"


def _outcome(gate: Gate | None) -> Cell:
    return "–" if gate is None else Mark(state=_OUTCOMES[gate.outcome], word=gate.outcome)


def _row(family: str, gate: Gate) -> tuple[Cell, ...]:
    outcome = Mark(state=_OUTCOMES[gate.outcome], word=gate.outcome)
    numbers = tuple(f"{name}: {value}" for name, value in gate.numbers)
    reasons = _lines(gate.reasons)
    if gate.outcome == "pass" and len(gate.reasons) > _SHOWN_REASONS:
        reasons = Folded(title=f"{len(gate.reasons)} reasons, all met", lines=gate.reasons)
    return (gate.subject, family), _column(gate), outcome, _lines(numbers), reasons


def _lines(lines: Sequence[str]) -> Cell:
    return tuple(lines) or "–"
