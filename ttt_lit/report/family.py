"""One family: figures, arms and ablations."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ttt_lit.report.bars import speed_figure, target_figure
from ttt_lit.report.blocks import Block, Cell, Gallery, Grid, Heading, Paragraph, Picture
from ttt_lit.report.differences import NOT_USABLE, difference_lines, difference_text
from ttt_lit.report.figure_style import ROLE_NAMES
from ttt_lit.report.frontier import ACCOUNT_NAMES, frontier_figure, trend_shift
from ttt_lit.report.lines import Against, series_figure
from ttt_lit.report.positions import position_differences_figure, positions_figure
from ttt_lit.report.target import UPPER_BOUND, hours_to_reach, target_arms
from ttt_lit.report.timeline import timeline_figure
from ttt_lit.verdict.arm import ACCOUNTS, Arm
from ttt_lit.verdict.comparison import Differences, compare, target_loss
from ttt_lit.verdict.formats import billions, count, hours, loss
from ttt_lit.verdict.heldout import final_words, subset_loss, subset_words
from ttt_lit.verdict.measured import ACCOUNT_WORDS, shared_cores
from ttt_lit.verdict.study import FamilyStudy
from ttt_lit.verdict.unfinished import marked

_AGAINST: dict[Against, str] = {"tokens": "tokens", "gpu_hours": "GPU-hours"}


def arms_table(family: FamilyStudy, differences: Mapping[str, Differences]) -> list[Block]:
    """One row per arm, ablations left out: what most readers compare."""
    arms = [arm for arm in family.arms if not arm.variant]
    header = (
        "arm", "role", "loss", "bits per byte", "tokens", "GPU-h alone", "with parents",
        "Δ baseline", "Δ FA from scratch", "Δ FA imported",
    )  # fmt: skip
    rows = tuple(_arm_row(arm, differences[arm.name]) for arm in arms)
    caption = f"Arms of {family.family}: final long-context loss in nats per token, Δ with 95% interval (below zero is better)"
    note = f"{NOT_USABLE} may not be used as evidence; the reasons stand under Flags and problems."
    return [Grid(caption=caption, header=header, rows=rows), *([Paragraph(text=note)] if _any_unusable(rows) else [])]


def _any_unusable(rows: tuple[tuple[Cell, ...], ...]) -> bool:
    return any(isinstance(cell, tuple) and cell[0].endswith(NOT_USABLE) for row in rows for cell in row)


def _arm_row(arm: Arm, difference: Differences) -> tuple[Cell, ...]:
    return (
        marked(arm.name, arm.records),
        (ROLE_NAMES.get(arm.role, "none"), _seeds(arm)),
        loss(arm.loss),
        loss(arm.bits_per_byte),
        billions(arm.tokens),
        hours(arm.gpu_hours("marginal")),
        hours(arm.gpu_hours("with_parents")),
        difference_lines(difference["ttt_scratch"]),
        difference_lines(difference["fa_scratch"]),
        difference_lines(difference["fa_import"]),
    )


def ablations(family: FamilyStudy) -> list[Block]:
    """Variants against the default of the same experiment."""
    variants = [arm for arm in family.arms if arm.variant]
    if not variants:
        return []
    rows = tuple(_ablation_row(family, arm) for arm in variants)
    header = ("experiment", "variant", "loss", "Δ default variant", "GPU-h, run alone", "seeds")
    return [
        Heading(level=3, text=f"{family.family}: ablations"),
        Grid(caption="Variants against the default of the same experiment (nats per token)", header=header, rows=rows),
    ]


def _seeds(arm: Arm) -> str:
    return "1 seed" if len(arm.records) == 1 else f"{len(arm.records)} seeds"


def _ablation_row(family: FamilyStudy, arm: Arm) -> tuple[Cell, ...]:
    default = (
        family.matched(arm.experiment, "") if arm.share is None else family.shares(arm.experiment, "").get(arm.share)
    )
    variant = arm.variant if arm.share is None else f"{arm.variant} at {arm.share:g}"
    delta = difference_text(compare(arm, default, ceiling=family.ceiling.ceiling) if default else None)
    return arm.experiment, variant, loss(arm.loss), delta, hours(arm.gpu_hours("marginal")), count(len(arm.records))


def figures(family: FamilyStudy, differences: Mapping[str, Differences]) -> list[Block]:
    """The figures of one family, frontier first."""
    name = family.family
    return [
        Heading(level=3, text=f"{name}: quality against compute"),
        Gallery(pictures=tuple(_frontiers(family, differences))),
        Heading(level=3, text=f"{name}: loss while training"),
        Gallery(pictures=tuple(_series(family))),
        Heading(level=3, text=f"{name}: loss by token position"),
        Gallery(pictures=tuple(_positions(family))),
        Heading(level=3, text=f"{name}: where the time went"),
        Gallery(pictures=tuple(_time(family))),
        *_target_table(family),
    ]


def stem(family: FamilyStudy, figure: str) -> str:
    """A file name for any family's name."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', family.family)}_{figure}"


def _frontiers(family: FamilyStudy, differences: Mapping[str, Differences]) -> list[Picture]:
    made = []
    for account in ACCOUNTS:
        made.append(
            Picture(
                stem=stem(family, f"frontier_{account}"),
                title=f"Final loss against GPU-hours, {ACCOUNT_NAMES[account]}",
                caption="Lower and further left is better. Ringed and dotted: the Pareto front. Hollow, joined: budgets that are "
                f"a share of the baseline's GPU-hours. Bars: 95% interval of the difference to the baseline. {_trend(family)}"
                f"Ablations are left out.{_shared_cores(family)}",
                alt=f"Scatter plot of final loss against GPU-hours ({ACCOUNT_NAMES[account]}) of every arm of {family.family}; "
                "the same numbers stand in the table of arms.",
                figure=frontier_figure(family, account, differences),
            )
        )
    return made


def _trend(family: FamilyStudy) -> str:
    """What the pale line is; empty where none is drawn."""
    records = () if family.baseline is None else family.baseline.records
    shifts = [shift for shift in map(trend_shift, records) if shift is not None]
    if not shifts:
        return ""
    by = " and ".join(f"{shift:+.2f}".replace("-", "−") for shift in shifts)
    return (
        f"Pale line: the baseline's loss on {subset_words(records)} while it trained, shifted by {by} so that its end meets its final "
        f"loss on {final_words(records)}; cut off at the top. "
    )


def _shared_cores(family: FamilyStudy) -> str:
    """Of figures of time, as a sentence."""
    words = shared_cores(record for arm in family.arms for record in arm.records)
    return f" {words[0].upper()}{words[1:]}." if words else ""


def _series(family: FamilyStudy) -> list[Picture]:
    records = [record for arm in family.arms if not arm.variant and arm.share is None for record in arm.records]
    caption = (
        f"Lines: the fixed subset of {subset_words(records)}, one line per run. Hollow marks: final loss on {final_words(records)}, "
        "which is why a line need not end at its mark. Losses far above the final ones are cut off. Token-matched arms."
    )
    return [
        Picture(
            stem=stem(family, f"loss_{against}"),
            title=f"Held-out loss against {words}",
            caption=caption + (_shared_cores(family) if against == "gpu_hours" else ""),
            alt=f"Line plot of held-out loss against {words} for the token-matched arms of {family.family}.",
            figure=series_figure(family, against),
        )
        for against, words in _AGAINST.items()
    ]


def _positions(family: FamilyStudy) -> list[Picture]:
    control = family.fa_import or family.fa_scratch
    return [
        Picture(
            stem=stem(family, "positions"),
            title="Final loss by token position",
            caption="Means over position buckets and over seeds, with the inner loop as in the loss that the arm is judged by. "
            "Falling to the right: context helps.",
            alt=f"Line plot of final loss by token position for the token-matched arms of {family.family}.",
            figure=positions_figure(family),
        ),
        Picture(
            stem=stem(family, "position_differences"),
            title=f"The same, minus {control.name}" if control else "The same, minus a full-attention control",
            caption="Below zero: better than full attention at that position. The control is the imported model under full "
            "attention, or where there is none the one from scratch.",
            alt=f"Line plot of the difference in loss to the full-attention control by position for arms of {family.family}.",
            figure=position_differences_figure(family, control),
        ),
    ]


def _target_table(family: FamilyStudy) -> list[Block]:
    """The numbers of the figure."""
    arms, target = target_arms(family), None if family.baseline is None else target_loss(family.baseline)
    if target is None or not arms:
        return []
    rows = tuple((marked(arm.name, arm.records), *hours_to_reach(arm, target).texts) for arm in arms)
    caption = f"GPU-hours to {_reached(family)}"
    if any(cell.startswith(UPPER_BOUND) for row in rows for cell in row[1:]):
        caption += f". {UPPER_BOUND}: at the target at the first evaluation, so it was reached there or before"
    return [Grid(caption=caption, header=("arm", *ACCOUNT_WORDS.values()), rows=rows)]


def _reached(family: FamilyStudy) -> str:
    target = None if family.baseline is None else target_loss(family.baseline)
    if family.baseline is None or target is None:
        return "a target loss"
    records = family.baseline.records
    return f"{subset_loss(target, records)} nats per token on {subset_words(records)}"


def _time(family: FamilyStudy) -> list[Picture]:
    records = () if family.baseline is None else family.baseline.records
    shared = _shared_cores(family)
    return [
        Picture(
            stem=stem(family, "timeline"),
            title="Stages over GPU-hours",
            caption="Below each bar, its stages; in brackets the loss of one fixed batch before and after the conversion into the "
            "stage: = equal as promised, → a jump that the conversion allows, ≠ a broken promise. Hatched: parent runs of known "
            f"cost. First seed.{shared}",
            alt=f"Bars of the stages of every token-matched arm of {family.family} over GPU-hours.",
            figure=timeline_figure(family),
        ),
        Picture(
            stem=stem(family, "target"),
            title=f"GPU-hours to {_reached(family)}",
            caption=f"The target is what the baseline had reached at its last evaluation, on the fixed subset of "
            f"{subset_words(records)} and "
            f"not on the {final_words(records)} of the final loss. Coloured: the run alone; hatched in front: its parent runs, so that a "
            "whole bar is the account with parents (numbers: alone / with parents). "
            f"Between evaluations losses are interpolated. {UPPER_BOUND}: the arm was at the target at its first evaluation, where the bar "
            f"ends; it got there then or before.{shared}",
            alt=f"Bars of GPU-hours until the target loss for the arms of {family.family}.",
            figure=target_figure(family),
        ),
        Picture(
            stem=stem(family, "speed"),
            title="Seconds per 1,000 tokens, by stage",
            caption=f"Compute time of all devices together. First seed.{shared}",
            alt=f"Bars of seconds per 1,000 tokens of every stage for the arms of {family.family}.",
            figure=speed_figure(family),
        ),
    ]
