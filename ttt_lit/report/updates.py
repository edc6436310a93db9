"""What inner updates are worth, and what of a change in loss is only healing: the 2 × 2, and damage beside gain."""

from __future__ import annotations

from collections.abc import Iterator

from ttt_lit.record.measured import Damage
from ttt_lit.record.schema import RunRecord, Stage
from ttt_lit.report.blocks import Block, Cell, Grid, Heading, Listing, Paragraph
from ttt_lit.report.differences import NOT_USABLE, difference_lines
from ttt_lit.verdict.formats import change, loss
from ttt_lit.verdict.study import FamilyStudy
from ttt_lit.verdict.two_by_two import Cells, Effects, cells, effects, missing
from ttt_lit.verdict.unfinished import marked

Pair = tuple[float | None, float | None]
"""Nats per token inside the window and beyond it; None: not measured."""


def two_by_two(family: FamilyStudy) -> list[Block]:
    """Nothing where no arm trains with updates."""
    every, pairs = cells(family), effects(family)
    if not every:
        return []
    blocks: list[Block] = [
        Heading(level=3, text=f"{family.family}: trained with and without inner updates, read with and without"),
        Grid(
            caption="Final long-context loss of token-matched arms (nats per token; on − off below zero: updates help)",
            header=("arm", "trained with updates?", "read without", "read with", "on − off"),
            rows=tuple(_cells_row(each) for each in every),
        ),
    ]
    if pairs:
        blocks.append(
            Grid(
                caption="Trained with − trained without, same start, attention and tokens (nats per token, 95% interval)",
                header=("trained with", "trained without", "with both − without both", "read with", "read without", "interaction"),
                rows=tuple(_effects_row(each) for each in pairs),
            )
        )  # fmt: skip
    differences = [each.gain for each in every] + [each for pair in pairs for each in pair.comparisons]
    used = [each for each in differences if each.interval is not None]
    gaps = [*missing(family, every), *(f"{NOT_USABLE} {reason}" for each in used for reason in each.reasons)]
    if gaps:
        blocks += [Paragraph(text="Missing, or no evidence:"), Listing(items=tuple(dict.fromkeys(gaps)))]
    return blocks


def _cells_row(each: Cells) -> tuple[Cell, ...]:
    name = marked(each.arm.name, each.arm.records)
    return name, each.trained, loss(each.off), loss(each.on), difference_lines(each.gain)


def _effects_row(each: Effects) -> tuple[Cell, ...]:
    return each.arm.name, each.control.name, *map(difference_lines, each.comparisons)


def damage_table(family: FamilyStudy) -> list[Block]:
    """Per run, stage and context; nothing where no run has measured it."""
    records = [record for arm in family.arms for record in arm.records]
    rows = [row for record in records for stage in record.stages for row in _damage_rows(record, stage)]
    if not rows:
        return []
    return [
        Heading(level=3, text=f"{family.family}: damage and gain"),
        Paragraph(
            text="Damage is the loss without inner updates minus that of the imported model on the same tokens, inside the stage's window "
            "and beyond it. What falls from a stage's start to its end is healing: the conversion gives back what it broke, which is no "
            "gain. Gain is on − off at the stage's end: what updates add to the same weights; below zero they help."
        ),
        Grid(
            caption="Nats per token: inside the window, beyond it",
            header=("run", "stage", "context", "damage at the start", "damage at the end", "change", "gain, on − off"),
            rows=tuple(rows),
        ),
    ]


def _damage_rows(record: RunRecord, stage: Stage) -> Iterator[tuple[Cell, ...]]:
    for context in dict.fromkeys(each.context for each in stage.damage):
        found = {(each.when, each.inner): each for each in stage.damage if each.context == context}
        start, off, on = (found.get(key) for key in (("start", "off"), ("end", "off"), ("end", "on")))
        at_start, at_end, with_updates = map(_inside_and_beyond, (start, off, on))
        pairs = (at_start, at_end, _minus(at_end, at_start), _minus(with_updates, at_end))
        yield marked(record.name, [record]), stage.name, context, *map(_lines, pairs)


def _inside_and_beyond(damage: Damage | None) -> Pair:
    return (None, None) if damage is None else (damage.inside, damage.beyond)


def _minus(after: Pair, before: Pair) -> Pair:
    differences = [None if a is None or b is None else a - b for a, b in zip(after, before, strict=True)]
    return differences[0], differences[1]


def _lines(pair: Pair) -> tuple[str, str]:
    return f"inside {change(pair[0])}", f"beyond {change(pair[1])}"
