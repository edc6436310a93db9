"""The report's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ttt_lit.record.schema import RunRecord
from ttt_lit.report.blocks import Picture
from ttt_lit.report.build import build_page
from ttt_lit.report.drawing import png_bytes, replace_file, svg_text
from ttt_lit.report.html import html_page
from ttt_lit.report.markdown import markdown_page
from ttt_lit.report.sheets import differences_csv, gates_csv, runs_csv
from ttt_lit.verdict.gates import judge_candidates
from ttt_lit.verdict.study import read_study

FIGURES = "figures"


def write_report(records: Sequence[RunRecord], folder: Path, *, command: str, unreadable: Sequence[str] = ()) -> Path:
    """Write ``report.html``, ``report.md``, ``runs.csv``, ``gates.csv``, ``differences.csv`` and ``figures/*.png`` and ``.svg``.

    Returns the HTML page. The same records and the same command give the same bytes. Figures of an earlier report in the folder are
    replaced, not removed.

    Parameters:
        records: runs in any order.
        folder: made where it does not exist.
        command: as the page shows it, for whoever wants to make it again.
        unreadable: sentences on records that could not be read, listed first among the problems.
    """
    ordered = sorted(records, key=lambda record: (record.name, record.seed))
    study = read_study(ordered)
    study = dataclasses.replace(study, problems=[*unreadable, *study.problems])
    judged = {name: judge_candidates(family) for name, family in study.families.items()}
    page = build_page(study, judged, ordered, command=command)
    drawings = {picture.stem: _draw(picture, folder) for picture in page.pictures}
    _write(folder / "report.md", markdown_page(page, figures=FIGURES))
    _write(folder / "runs.csv", runs_csv(ordered))
    _write(folder / "gates.csv", gates_csv(judged))
    _write(folder / "differences.csv", differences_csv(study.families.values()))
    return _write(folder / "report.html", html_page(page, drawings))


def _draw(picture: Picture, folder: Path) -> str:
    """Write the figure's two files; returns the SVG, empty where there is no figure."""
    if isinstance(picture.figure, str):
        return ""
    picture.figure.draw_without_rendering()
    picture.figure.set_layout_engine("none")  # laid out once, not once per file
    svg = svg_text(picture.figure, salt=picture.stem)
    replace_file(folder / FIGURES / f"{picture.stem}.png", png_bytes(picture.figure))
    replace_file(folder / FIGURES / f"{picture.stem}.svg", svg.encode("utf-8"))
    return svg


def _write(path: Path, text: str) -> Path:
    """Line ends as they are."""
    replace_file(path, text.encode("utf-8"))
    return path
