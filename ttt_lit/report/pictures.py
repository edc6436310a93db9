"""The page's figures with their titles and captions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ttt_lit.report.compute import frontier_figure, speed_figure, target_figure, timeline_figure, trend_shift
from ttt_lit.report.curves import position_differences_figure, positions_figure, series_figure
from ttt_lit.report.tables import target_words
from ttt_lit.report.words import shared_cores
from ttt_lit.verdict.comparison import Differences
from ttt_lit.verdict.heldout import final_words, subset_words
from ttt_lit.verdict.study import FamilyStudy

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Picture:
    """A figure, or in its place the sentence that says why there is none."""

    figure: Figure | str
    stem: str
    """File name without an ending; unique on the page."""
    title: str
    alt: str
    caption: str


def family_pictures(family: FamilyStudy, differences: Mapping[str, Differences]) -> dict[str, Picture]:
    """Every figure of a family, by its name in ``captions.txt``."""
    control = family.fa_import or family.fa_scratch
    figures = {
        "frontier_marginal": frontier_figure(family, "marginal", differences),
        "frontier_with_parents": frontier_figure(family, "with_parents", differences),
        "loss_tokens": series_figure(family, "tokens"),
        "loss_gpu_hours": series_figure(family, "gpu_hours"),
        "positions": positions_figure(family),
        "position_differences": position_differences_figure(family, control),
        "timeline": timeline_figure(family),
        "target": target_figure(family),
        "speed": speed_figure(family),
    }
    matched = [record for arm in family.arms if not arm.variant and arm.share is None for record in arm.records]
    baseline = () if family.baseline is None else family.baseline.records
    cores = shared_cores(record for arm in family.arms for record in arm.records)
    words = {
        "family": family.family,
        "control": control.name if control else "a full-attention control",
        "target": target_words(family),
        "subset": subset_words(matched),
        "final": final_words(matched),
        "baseline_subset": subset_words(baseline),
        "baseline_final": final_words(baseline),
        "trend": _trend(family),
        "shared": cores and f"{cores[0].upper()}{cores[1:]}.",
    }
    stem, found = re.sub(r"[^A-Za-z0-9]+", "_", family.family), {}
    for block in (TEMPLATES / "captions.txt").read_text(encoding="utf-8").split("\n\n"):
        name, title, alt, caption = block.strip().split("\n", 3)
        texts = (" ".join(text.format(**words).split()) for text in (title, alt, caption))
        found[name] = Picture(figures[name], f"{stem}_{name}", *texts)
    return found


def _trend(family: FamilyStudy) -> str:
    """What the pale line is; empty where none is drawn."""
    records = () if family.baseline is None else family.baseline.records
    shifts = [shift for shift in map(trend_shift, records) if shift is not None]
    if not shifts:
        return ""
    by = " and ".join(f"{shift:+.2f}".replace("-", "−") for shift in shifts)
    return (
        f"Pale line: the baseline's loss on {subset_words(records)} while it trained, shifted by {by} so that its end meets its final "
        f"loss on {final_words(records)}; cut off at the top."
    )
