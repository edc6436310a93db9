"""The gates: all outcomes at a glance, then the numbers and reasons of each, what several share said once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ttt_lit.report.blocks import Block, Cell, Folded, Grid, Heading, Listing, Mark, Paragraph, State
from ttt_lit.verdict.gates import CandidateGates, Gate, Outcome
from ttt_lit.verdict.measured import ACCOUNT_WORDS
from ttt_lit.verdict.recommendation import shorten_failures
from ttt_lit.verdict.study import FamilyStudy, Study

_OUTCOMES: dict[Outcome, State] = {"pass": "good", "fail": "bad", "insufficient": "open"}
_SHOWN_REASONS = 3
"""Up to which the reasons of a passed gate are shown at once; those of any other always are."""
_HEADER = ("judged", "gate", "outcome", "numbers", "reasons")


@dataclass(frozen=True, kw_only=True)
class _Common:
    """What all gates of one name in a family say alike."""

    reasons: tuple[str, ...] = ()
    numbers: tuple[tuple[str, str], ...] = ()


def gate_section(study: Study, judged: Mapping[str, Sequence[CandidateGates]]) -> list[Block]:
    """``judged``: of every family."""
    heading = Heading(level=2, text="Gates")
    if not any(judged.values()):
        return [heading, Paragraph(text="No bridge and no direct conversion: no gate applies.")]
    details = [_details(study.families[name], found) for name, found in judged.items() if found]
    return [heading, _overview(judged), *(block for blocks in details for block in blocks)]


def _overview(judged: Mapping[str, Sequence[CandidateGates]]) -> Grid:
    """One row per candidate, one column per gate and account."""
    found = [(family, each) for family, of_family in judged.items() for each in of_family]
    columns = list(dict.fromkeys(_column(gate) for _, each in found for gate in each.gates))
    rows = tuple((each.name, family, *_outcomes(each, columns)) for family, each in found)
    return Grid(caption="Outcome of every gate", header=("candidate", "family", *columns), rows=rows, wide=True)


def _outcomes(each: CandidateGates, columns: Sequence[str]) -> list[Cell]:
    by_column = {_column(gate): gate for gate in each.gates}
    return [_mark(by_column[column]) if column in by_column else "–" for column in columns]


def _column(gate: Gate) -> str:
    return gate.name if gate.account is None else f"{gate.name}, {ACCOUNT_WORDS[gate.account]}"


def _mark(gate: Gate) -> Mark:
    return Mark(state=_OUTCOMES[gate.outcome], word=gate.outcome)


def _details(family: FamilyStudy, judged: Sequence[CandidateGates]) -> list[Block]:
    gates = [gate for each in judged for gate in each.gates]
    by_name = {name: [gate for gate in gates if gate.name == name] for name in dict.fromkeys(g.name for g in gates)}
    common = {name: _common(same) if len(judged) > 1 else _Common() for name, same in by_name.items()}
    blocks: list[Block] = [Heading(level=3, text=f"{family.family}: what decided each gate")]
    for name, shared in common.items():
        lines = (*_reasons(shared.reasons, family), *map(": ".join, shared.numbers))
        if lines:
            blocks += [Paragraph(text=f"For every {name} gate of {family.family}:"), Listing(items=lines)]
    rows = [row for each in judged for row in _rows(each, common, family)]
    caption = f"Gates of {family.family}: numbers and reasons" + (
        ", without those above" if any(c.reasons or c.numbers for c in common.values()) else ""
    )
    return [*blocks, Grid(caption=caption, header=_HEADER, rows=tuple(rows), wide=True)]


def _common(gates: Sequence[Gate]) -> _Common:
    """Reasons of gates none of which passed, and of the gates that count GPU-hours the numbers: those are the baseline's."""
    first, *others = gates
    open_reasons = () if any(gate.outcome == "pass" for gate in gates) else _said(first)
    numbers = () if first.account is None else first.numbers
    return _Common(
        reasons=tuple(each for each in open_reasons if all(each in _said(other) for other in others)),
        numbers=tuple(each for each in numbers if all(each in other.numbers for other in others)),
    )


def _said(gate: Gate) -> tuple[str, ...]:
    return gate.brief or gate.reasons


def _rows(each: CandidateGates, common: Mapping[str, _Common], family: FamilyStudy) -> list[tuple[Cell, ...]]:
    """One per gate; gates of two accounts that say the same share a row."""
    rows: dict[tuple[object, ...], list[Gate]] = {}
    for gate in each.gates:
        rows.setdefault((gate.name, gate.outcome, _without_common(gate, common[gate.name])), []).append(gate)
    return [_row(gates, common[gates[0].name], family) for gates in rows.values()]


def _without_common(gate: Gate, common: _Common) -> _Common:
    return _Common(
        reasons=tuple(each for each in _said(gate) if each not in common.reasons),
        numbers=tuple(each for each in gate.numbers if each not in common.numbers),
    )


def _row(gates: Sequence[Gate], common: _Common, family: FamilyStudy) -> tuple[Cell, ...]:
    gate, own = gates[0], _without_common(gates[0], common)
    name = ", ".join([gate.name, " and ".join(ACCOUNT_WORDS[each.account] for each in gates if each.account)])
    reasons: Cell = _reasons(own.reasons, family) or ("as above" if common.reasons else "–")
    if gate.outcome == "pass" and len(own.reasons) > _SHOWN_REASONS:
        reasons = Folded(title=f"{len(own.reasons)} reasons, all met", lines=own.reasons)
    numbers: Cell = tuple(map(": ".join, own.numbers)) or "–"
    return gate.subject, name.removesuffix(", "), _mark(gate), numbers, reasons


def _reasons(reasons: Iterable[str], family: FamilyStudy) -> tuple[str, ...]:
    return tuple(shorten_failures(reason, family) for reason in reasons)
