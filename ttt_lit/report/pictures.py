"""The page's figures with their titles and captions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure

from ttt_lit.report.compute import (
    ACCOUNT_NAMES,
    frontier_figure,
    speed_figure,
    target_figure,
    timeline_figure,
    trend_shift,
)
from ttt_lit.report.curves import Against, position_differences_figure, positions_figure, series_figure
from ttt_lit.report.tables import UPPER_BOUND, target_words
from ttt_lit.report.words import shared_cores
from ttt_lit.verdict.arm import Account
from ttt_lit.verdict.comparison import Differences
from ttt_lit.verdict.heldout import final_words, subset_words
from ttt_lit.verdict.study import FamilyStudy


@dataclass(frozen=True)
class Picture:
    """A figure, or in its place the sentence that says why there is none."""

    stem: str
    """File name without an ending; unique on the page."""
    title: str
    caption: str
    alt: str
    figure: Figure | str


def _picture(family: FamilyStudy, name: str, figure: Figure | str, title: str, alt: str, caption: str) -> Picture:
    stem = f"{re.sub(r'[^A-Za-z0-9]+', '_', family.family)}_{name}"
    return Picture(stem, title, caption.strip(), f"{alt} of {family.family}.", figure)


def frontier(family: FamilyStudy, differences: Mapping[str, Differences], account: Account) -> Picture:
    name = ACCOUNT_NAMES[account]
    return _picture(
        family,
        f"frontier_{account}",
        frontier_figure(family, account, differences),
        f"Final loss against GPU-hours, {name}",
        f"Scatter plot of final loss against GPU-hours ({name}); the same numbers stand in the table of arms",
        "Lower and further left is better. Ringed and dotted: the Pareto front. Hollow, joined: budgets that are a share of the "
        f"baseline's GPU-hours. Bars: 95% interval of the difference to the baseline. {_trend(family)}Ablations are left out. "
        f"{_shared_cores(family)}",
    )


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
    return words and f"{words[0].upper()}{words[1:]}."


def training(family: FamilyStudy) -> list[Picture]:
    records = [record for arm in family.arms if not arm.variant and arm.share is None for record in arm.records]
    caption = (
        f"Lines: the fixed subset of {subset_words(records)}, one line per run. Hollow marks: final loss on {final_words(records)}, "
        "which is why a line need not end at its mark. Losses far above the final ones are cut off. Token-matched arms. "
    )
    against: dict[Against, tuple[str, str]] = {
        "tokens": ("tokens", caption),
        "gpu_hours": ("GPU-hours", caption + _shared_cores(family)),
    }
    return [
        _picture(
            family,
            f"loss_{each}",
            series_figure(family, each),
            f"Held-out loss against {words}",
            f"Line plot of held-out loss against {words} for the token-matched arms",
            text,
        )
        for each, (words, text) in against.items()
    ]


def positions(family: FamilyStudy) -> list[Picture]:
    control = family.fa_import or family.fa_scratch
    return [
        _picture(
            family,
            "positions",
            positions_figure(family),
            "Final loss by token position",
            "Line plot of final loss by token position for the token-matched arms",
            "Means over position buckets and over seeds, with the inner loop as in the loss that the arm is judged by. Falling to the "
            "right: context helps. How far documents leave the means open is shown beside it, where they are paired.",
        ),
        _picture(
            family,
            "position_differences",
            position_differences_figure(family, control),
            f"The same, minus {control.name}" if control else "The same, minus a full-attention control",
            "Line plot of the difference in loss to the full-attention control by position for arms",
            "Below zero: better than full attention at that position. Bands: 95% interval over documents, of each tenth of the "
            "positions. The control is the imported model under full attention, or where there is none the one from scratch.",
        ),
    ]


def time(family: FamilyStudy) -> list[Picture]:
    records = () if family.baseline is None else family.baseline.records
    return [
        _picture(
            family,
            "timeline",
            timeline_figure(family),
            "Stages over GPU-hours",
            "Bars of the stages of every token-matched arm over GPU-hours",
            "Below each bar, its stages; in brackets the loss of one fixed batch before and after the conversion into the stage: = equal "
            "as promised, → a jump that the conversion allows, ≠ a broken promise. Hatched: parent runs of known cost. First seed. "
            f"{_shared_cores(family)}",
        ),
        _picture(
            family,
            "target",
            target_figure(family),
            f"GPU-hours to {target_words(family)}",
            "Bars of GPU-hours until the target loss for the arms",
            f"The target is what the baseline had reached at its last evaluation, on the fixed subset of {subset_words(records)} and not "
            f"on the {final_words(records)} of the final loss. Coloured: the run alone; hatched in front: its parent runs, so that a "
            "whole bar is the account with parents (numbers: alone / with parents). Between evaluations losses are interpolated. "
            f"{UPPER_BOUND}: the arm was at the target at its first evaluation, where the bar ends; it got there then or before. "
            f"{_shared_cores(family)}",
        ),
        _picture(
            family,
            "speed",
            speed_figure(family),
            "Seconds per 1,000 tokens, by stage",
            "Bars of seconds per 1,000 tokens of every stage for the arms",
            f"Compute time of all devices together. First seed. {_shared_cores(family)}",
        ),
    ]
