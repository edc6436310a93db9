"""The data of the page: what the templates show, in the order in which it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ttt_lit.record.schema import RunRecord
from ttt_lit.report import runs, tables
from ttt_lit.report.pictures import TEMPLATES, Picture, family_pictures
from ttt_lit.report.table import Mark, Table
from ttt_lit.report.words import NOT_USABLE, REFERENCES, ROLE_NAMES, family_differences, verdict
from ttt_lit.verdict.comparison import Differences
from ttt_lit.verdict.gates import MAX_DELTA, MAX_LAST_RISE, MAX_SHARE, MIN_SAVING, CandidateGates, flags
from ttt_lit.verdict.study import FamilyStudy, Study
from ttt_lit.verdict.two_by_two import cells, effects, missing

TITLE = "Does a pretrained start save TTT-E2E training time?"
QUESTION = (
    f"Does converting a pretrained model reach the long-context loss of TTT-E2E trained from scratch, to {MAX_DELTA:g} nats per token, "
    f"for at least {MIN_SAVING:.0%} fewer GPU-hours?"
)
_DAMAGE = (
    "Damage is the loss without inner updates minus that of the imported model on the same tokens, inside the stage's window and beyond "
    "it. What falls from a stage's start to its end is healing: the conversion gives back what it broke, which is no gain. Gain is "
    "on − off at the stage's end: what updates add to the same weights; below zero they help."
)
_ACROSS = (
    "Families have tokenizers of their own, so their nats per token cannot be compared. Bits per byte can, but only as orientation: each "
    "family's held-out blocks are cut by its own tokenizer, so they do not hold the same text, not even the same amount of it, and the "
    "models differ too."
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Shown in this order; without a title it goes on the one before."""

    title: str = ""
    level: int = 3
    verdict: Mark | None = None
    """Of a family, whose picture then stands beside all else."""
    text: Sequence[str] = ()
    items: Sequence[str] = ()
    tables: Sequence[Table] = ()
    lines: Sequence[tuple[str, str]] = ()
    """Label and sentence."""
    pictures: Sequence[Picture] = ()
    code: str = ""


@dataclass(frozen=True)
class Page:
    """Title and question, then the sections."""

    sections: Sequence[Section]
    title: str = TITLE
    question: str = QUESTION

    @property
    def pictures(self) -> list[Picture]:
        return [picture for section in self.sections for picture in section.pictures]

    @property
    def tables(self) -> list[Table]:
        return [table for section in self.sections for table in section.tables]


def build_page(
    study: Study, judged: Mapping[str, Sequence[CandidateGates]], records: Sequence[RunRecord], *, command: str
) -> Page:
    """The whole page; ``judged``: the candidates of every family."""
    families = study.families
    differences = {name: family_differences(family) for name, family in families.items()}
    drawn = {name: family_pictures(family, differences[name]) for name, family in families.items()}
    sections = [_answer(family, judged[name], differences[name], drawn[name]) for name, family in families.items()]
    if not families:
        sections.append(Section(text=["No run has a role in a comparison, so there is nothing to decide."]))
    sections += _gates(study, judged)
    sections += [part for name, each in families.items() for part in _family(each, differences[name], drawn[name])]
    sections.append(problems(study, differences))
    if len(families) > 1:
        sections.append(across(study))
    if study.external or study.others:
        sections.append(Section(title="Other runs", level=2, tables=[tables.other_runs(study)]))
    sections.append(Section(title="How to read this", level=2, text=reading()))
    sections.append(Section(title="Environment", level=2, items=list(_environments(records))))
    sections.append(Section(title="Made with", level=2, code=command))
    return Page(sections)


def _answer(
    family: FamilyStudy,
    judged: Sequence[CandidateGates],
    differences: Mapping[str, Differences],
    drawn: Mapping[str, Picture],
) -> Section:
    """The first screen: the verdict, what was measured, and the frontier."""
    mark, lines = verdict(family, judged)
    measured = tables.measured(family, judged, differences)
    shown, frontier = [measured] if measured else [], [drawn["frontier_marginal"]]
    return Section(title=family.family, level=2, verdict=mark, tables=shown, lines=lines, pictures=frontier)


def _gates(study: Study, judged: Mapping[str, Sequence[CandidateGates]]) -> Iterator[Section]:
    if not any(judged.values()):
        yield Section(title="Gates", level=2, text=["No bridge and no direct conversion: no gate applies."])
        return
    yield Section(title="Gates", level=2, tables=[tables.gate_outcomes(judged)])
    for name, found in judged.items():
        if found:
            family = study.families[name]
            both = tables.gate_reasons(family, found), tables.gate_numbers(family, found)
            yield Section(title=f"{name}: what decided each gate", tables=both)


def _family(
    family: FamilyStudy, differences: Mapping[str, Differences], drawn: Mapping[str, Picture]
) -> Iterator[Section]:
    name, four, arms = family.family, cells(family), tables.arms(family, differences)
    note = [f"{NOT_USABLE} may not be used as evidence; the reasons stand under Flags and problems."]
    yield Section(title=f"Family {name}", level=2, text=note, tables=[arms])
    if four:
        pairs = effects(family)
        both = [tables.readings(family, four), *([tables.trained_with(family, pairs)] if pairs else [])]
        yield Section(title=f"{name}: trained with and without inner updates, read with and without", tables=both)
        compared = [each.gain for each in four] + [each for pair in pairs for each in pair.comparisons]
        flagged = (
            f"{NOT_USABLE} {reason}" for each in compared if each.interval is not None for reason in each.reasons
        )
        if gaps := list(dict.fromkeys([*missing(family, four), *flagged])):
            yield Section(text=["Missing, or no evidence:"], items=gaps)
    if (damage := tables.damage(family)).rows:
        yield Section(title=f"{name}: damage and gain", text=[_DAMAGE], tables=[damage])
    for title, shown in (
        ("quality against compute, parents included", ["frontier_with_parents"]),
        ("loss while training", ["loss_tokens", "loss_gpu_hours"]),
        ("loss by token position", ["positions", "position_differences"]),
        ("where the time went", ["timeline", "target", "speed"]),
    ):
        yield Section(title=f"{name}: {title}", pictures=[drawn[each] for each in shown])
    if (target := tables.to_target(family)) is not None:
        yield Section(tables=[target])
    yield Section(title=f"{name}: every run", tables=[runs.template(family, differences)])
    if (ablations := tables.ablations(family)).rows:
        yield Section(title=f"{name}: ablations", tables=[ablations])


def problems(study: Study, differences: Mapping[str, Mapping[str, Differences]]) -> Section:
    """Everything that keeps a run or a comparison from being taken at face value; ``differences``: by family and arm."""
    arms = [arm for family in study.families.values() for arm in family.arms]
    compared = [each for family in differences.values() for arm in family.values() for each in arm.values() if each]
    reasons = [flag for arm in arms for flag in flags(arm)] + [reason for each in compared for reason in each.reasons]
    # A family's problem is said with its name; the same without it would be said twice.
    known = {problem.partition(": ")[2] for problem in study.problems}
    found = dict.fromkeys([*study.problems, *_missing(study), *(each for each in reasons if each not in known)])
    unfinished = tables.unfinished(study)
    shown = [unfinished] if unfinished.rows else []
    text = [] if found else ["None."]
    return Section(title="Flags and problems", level=2, text=text, items=list(found), tables=shown)


def _missing(study: Study) -> Iterator[str]:
    """Roles that a decision needs and no run has."""
    for family in study.families.values():
        present = {arm.role for arm in family.arms if not arm.variant and arm.share is None}
        for role in REFERENCES:
            if role not in present:
                yield f"{family.family}: no run of role {role} ({ROLE_NAMES[role]}), matched by tokens, without a variant"
        if not family.candidates:
            yield f"{family.family}: no bridge and no direct conversion"


def across(study: Study) -> Section:
    return Section(title="Across families", level=2, text=[_ACROSS], tables=[tables.across(study)])


def reading() -> list[str]:
    """How to read the page, a paragraph each."""
    text = (TEMPLATES / "reading.txt").read_text(encoding="utf-8")
    limits = {"max_delta": MAX_DELTA, "min_saving": MIN_SAVING, "max_share": MAX_SHARE, "max_last_rise": MAX_LAST_RISE}
    return [" ".join(part.split()) for part in text.format(**limits, kept=1 - MIN_SAVING).split("\n\n")]


def _environments(records: Sequence[RunRecord]) -> Iterator[str]:
    """Each environment once, with how many runs had it."""
    found: Counter[str] = Counter()
    for record in records:
        environment = record.environment
        versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
        tree = f"revision {record.git.revision[:12]}" if record.git.revision else "no revision"
        parts = (
            f"{environment.num_devices} × {environment.device}",
            versions or "versions not recorded",
            f"kernels {', '.join(environment.kernels) or 'not recorded'}",
            tree + (" with changes" if record.git.dirty else ""),
        )
        found["; ".join(parts)] += 1
    for text, number in sorted(found.items()):
        yield f"{text} ({number} {'run' if number == 1 else 'runs'})"
