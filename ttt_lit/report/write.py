"""The report's files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ttt_lit.record.codec import write_atomic
from ttt_lit.record.schema import RunRecord
from ttt_lit.report.drawing import save_figure
from ttt_lit.report.page import Page, build_page
from ttt_lit.report.pictures import TEMPLATES
from ttt_lit.report.sheets import differences_csv, gates_csv, runs_csv
from ttt_lit.report.table import Folded, Mark, plain
from ttt_lit.verdict.gates import judge_candidates
from ttt_lit.verdict.study import read_study


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
    drawings = {
        picture.stem: save_figure(picture.figure, folder / "figures" / picture.stem)
        for picture in page.pictures
        if not isinstance(picture.figure, str)
    }
    write_atomic(folder / "report.md", markdown(page))
    write_atomic(folder / "runs.csv", runs_csv(ordered))
    write_atomic(folder / "gates.csv", gates_csv(judged))
    write_atomic(folder / "differences.csv", differences_csv(study.families.values()))
    write_atomic(folder / "report.html", html(page, drawings))
    return folder / "report.html"


def html(page: Page, drawings: Mapping[str, str]) -> str:
    """One file that needs nothing else: no script, no font, no picture from elsewhere. ``drawings``: SVG files by stem."""
    alts = {picture.stem: picture.alt for picture in page.pictures}
    inline = {stem: inline_svg(svg, stem, alts[stem]) for stem, svg in drawings.items()}
    return _render("report.html.j2", page=page, drawings=inline)


def markdown(page: Page) -> str:
    """The same in Markdown, with the figures as files beside it."""
    code = "\n".join(section.code for section in page.sections)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return re.sub("\n{3,}", "\n\n", _render("report.md.j2", page=page, fence=fence))


def _render(name: str, **data: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = plain
    environment.tests |= {"mark": lambda cell: isinstance(cell, Mark), "folded": lambda cell: isinstance(cell, Folded)}
    return environment.get_template(name).render(**data).lstrip()


def inline_svg(svg: str, stem: str, alt: str) -> str:
    """An SVG file as an element of a page: no prologue, no metadata or name spaces, ids of its own, a text for those who cannot see it."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{stem}-\1"', svg)
    svg = re.sub(r'(href="|url\()#([^")]+)', rf"\1#{stem}-\2", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt, quote=True)}" ', 1)
