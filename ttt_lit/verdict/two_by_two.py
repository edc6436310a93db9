"""Trained with or without inner updates × read with or without: the four cells, their differences and the interaction.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ttt_lit.record.schema import Headline
from ttt_lit.verdict.arm import Arm
from ttt_lit.verdict.comparison import Comparison, compare
from ttt_lit.verdict.own_part import against_control, controls, on_minus_off, read
from ttt_lit.verdict.statistics import Interval, paired_difference
from ttt_lit.verdict.study import FamilyStudy

READINGS: tuple[Headline, ...] = ("on", "off")


@dataclass(frozen=True, kw_only=True)
class Cells:
    """One training, read in both settings."""

    arm: Arm
    trained: str
    """with, without, or that its prime MLPs were trained without ever being updated."""
    off: float | None
    """Nats per token, mean over seeds; None: not measured."""
    on: float | None
    gain: Comparison
    """On − off: of the same weights."""


@dataclass(frozen=True, kw_only=True)
class Effects:
    """A training with updates against one without, from the same start with the same attention. Below zero: better with."""

    arm: Arm
    control: Arm
    whole: Comparison
    """Trained and read with − trained and read without: all that updates bring."""
    read_on: Comparison
    """Both read with updates: what training with them adds."""
    read_off: Comparison
    """Both read without: what training with updates costs a reader who makes none."""
    interaction: Comparison
    """(On − off) trained with − (on − off) trained without: how much more updates are worth to a network trained for them."""

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        return self.whole, self.read_on, self.read_off, self.interaction


def cells(family: FamilyStudy) -> list[Cells]:
    """Every token-matched arm that trains with updates, ablations left out, then every control of one of them."""
    arms = _updating(family)
    without = {control.name: control for arm in arms for control in controls(family, arm)}
    return [_cells(family, arm) for arm in (*arms, *sorted(without.values(), key=lambda arm: arm.name))]


def effects(family: FamilyStudy) -> list[Effects]:
    """Every pair of them."""
    return [_effects(family, arm, control) for arm in _updating(family) for control in controls(family, arm)]


def missing(family: FamilyStudy, found: Sequence[Cells]) -> Iterator[str]:
    """Cells that nothing fills, in sentences; ``found``: those of the family."""
    for each in found:
        for loss, how in ((each.off, "without"), (each.on, "with")):
            if loss is None:
                layers = any(record.model.ttt_layers for record in each.arm.records)
                why = "not measured" if layers or how == "without" else "it has no TTT layers"
                yield f"{each.arm.name} read {how} updates: {why}"
    for arm in _updating(family):
        if not controls(family, arm):
            yield f"{arm.name} trained without updates: no token-matched run from the same start with the same attention"


def _updating(family: FamilyStudy) -> list[Arm]:
    return [arm for arm in family.arms if arm.share is None and not arm.variant and arm.trains_with_updates]


def _cells(family: FamilyStudy, arm: Arm) -> Cells:
    static = any(stage.mode == "static" for record in arm.records for stage in record.stages)
    return Cells(
        arm=arm,
        trained="with" if arm.trains_with_updates else "without, prime MLPs trained" if static else "without",
        off=read(arm, "off").loss,
        on=read(arm, "on").loss,
        gain=on_minus_off(family, arm),
    )


def _effects(family: FamilyStudy, arm: Arm, control: Arm) -> Effects:
    ceiling = family.ceiling.ceiling
    read_on, read_off = (compare(read(arm, each), read(control, each), ceiling=ceiling) for each in READINGS)
    return Effects(
        arm=arm,
        control=control,
        whole=against_control(family, arm, control),
        read_on=read_on,
        read_off=read_off,
        interaction=Comparison(
            candidate=arm.name,
            reference=control.name,
            interval=_interaction(arm, control),
            reasons=tuple(dict.fromkeys((*read_on.reasons, *read_off.reasons))),
            ceiling=ceiling,
        ),
    )


def _interaction(arm: Arm, control: Arm) -> Interval | None:
    """Paired by block and seed; None: a cell is missing, or they do not pair."""
    both = [_gains(each) for each in (arm, control)]
    seeds = sorted(both[0].keys() & both[1].keys())
    ours, theirs = ([gains[seed] for seed in seeds] for gains in both)
    tables = [*ours, *theirs]
    if not tables or any(table.keys() != tables[0].keys() for table in tables):
        return None
    if not all(math.isfinite(gain) for table in tables for gain in table.values()):
        return None
    return paired_difference(ours, theirs, documents=arm.sources)


def _gains(arm: Arm) -> Mapping[int, dict[str, float]]:
    """Seed → block id → on − off; without the seeds that were not read in both settings."""
    read_both = zip(arm.seeds, arm.documents("on"), arm.documents("off"), strict=True)
    return {
        seed: {block: on[block] - off[block] for block in on}
        for seed, on, off in read_both
        if on and on.keys() == off.keys()
    }
