"""Who is who among many runs: arms, families, the baseline, the candidates. Nothing is judged here.

Arms of one checkpoint family form a family study, and comparisons are made inside it only: losses of different tokenizers cannot be
subtracted. Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ttt_lit.record.schema import Role, RunRecord
from ttt_lit.verdict.arm import Arm
from ttt_lit.verdict.ceiling import StudyCeiling, study_ceiling
from ttt_lit.verdict.matching import found_settings, unequal, unlike_inner_loops

CANDIDATES: tuple[Role, ...] = ("bridge", "direct")
"""Roles that the question is about: conversions of a pretrained model."""


@dataclass(frozen=True, kw_only=True)
class FamilyStudy:
    """The arms of one checkpoint family."""

    family: str
    arms: tuple[Arm, ...]
    """Sorted by experiment, variant and share, the token-matched one first."""
    baseline: Arm | None
    """Token-matched TTT-E2E from scratch; None: not there, or more than one could be it."""
    fa_scratch: Arm | None
    """Token-matched full attention from scratch."""
    fa_import: Arm | None
    """Token-matched full attention from the imported checkpoint."""

    @property
    def candidates(self) -> list[tuple[str, str]]:
        """(experiment, variant) of every conversion."""
        return sorted({(arm.experiment, arm.variant) for arm in self.arms if arm.role in CANDIDATES})

    def matched(self, experiment: str, variant: str) -> Arm | None:
        """The token-matched arm."""
        return next((arm for arm in self._of(experiment, variant) if arm.share is None), None)

    def shares(self, experiment: str, variant: str) -> dict[float, Arm]:
        """Wall-clock-matched arms by their planned share, smallest first."""
        arms = {arm.share: arm for arm in self._of(experiment, variant) if arm.share is not None}
        return dict(sorted(arms.items()))

    @property
    def ceiling(self) -> StudyCeiling:
        """What context beyond the window of baseline and candidates is worth."""
        return study_ceiling(
            [arm for arm in self.arms if arm.role in (*CANDIDATES, "ttt_scratch") and not arm.variant], self.arms
        )

    @property
    def evidence(self) -> int:
        """How much of a comparison is finished: 2, the baseline and a candidate; 1, one of the two; 0, neither."""
        baseline = self.baseline is not None and self.baseline.finished
        return baseline + any(arm.finished for arm in self.arms if arm.role in CANDIDATES)

    def _of(self, experiment: str, variant: str) -> Iterator[Arm]:
        return (arm for arm in self.arms if (arm.experiment, arm.variant) == (experiment, variant))


@dataclass(frozen=True, kw_only=True)
class Study:
    """All runs that were read, sorted into families."""

    families: dict[str, FamilyStudy]
    """By name, those with the most evidence first."""
    external: list[RunRecord] = field(default_factory=list)
    """Runs that made the checkpoints that others start from."""
    others: list[RunRecord] = field(default_factory=list)
    """Runs without a role."""
    problems: list[str] = field(default_factory=list)
    """Sentences: what keeps runs from being compared as they are."""


def read_study(records: Sequence[RunRecord]) -> Study:
    """Sort runs into arms and families. Takes anything that a run can leave behind; what does not fit becomes a problem."""
    compared = [record for record in records if record.role not in (None, "external")]
    families: list[FamilyStudy] = []
    problems = list(_mixed_families(compared))
    for family in sorted({record.model.family for record in compared}):
        arms = _arms([record for record in compared if record.model.family == family])
        study, unclear = _family(family, arms)
        families.append(study)
        problems += [f"{family}: {problem}" for problem in (*unclear, *_family_problems(study))]
    return Study(
        families={study.family: study for study in sorted(families, key=lambda study: (-study.evidence, study.family))},
        external=[record for record in records if record.role == "external"],
        others=[record for record in records if record.role is None],
        problems=problems,
    )


def _arms(records: Sequence[RunRecord]) -> tuple[Arm, ...]:
    groups: dict[tuple[str, str, float | None], list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: (record.seed, record.run_id)):
        groups.setdefault((record.experiment, record.variant, record.share), []).append(record)
    arms = [_arm(group) for group in groups.values()]
    return tuple(sorted(arms, key=lambda arm: (arm.experiment, arm.variant, -1.0 if arm.share is None else arm.share)))


def _arm(records: Sequence[RunRecord]) -> Arm:
    """``records``: sorted by seed and run id. Of runs with the same seed one stands for it, and the arm has a problem."""
    problems, first = [], records[0]
    for seed, count in Counter(record.seed for record in records).items():
        if count > 1:
            runs = ", ".join(record.name for record in records if record.seed == seed)
            problems.append(f"{count} runs of seed {seed}: {runs}; remove all but one")
    roles = sorted({str(record.role) for record in records})
    if len(roles) > 1:
        problems.append(f"its runs have several roles: {', '.join(roles)}")
    problems += [f"its seeds differ in {fact}" for fact, values in found_settings(records).items() if len(values) > 1]
    return Arm(
        experiment=first.experiment,
        variant=first.variant,
        share=first.share,
        role=first.role,
        family=first.model.family,
        records=tuple(_longest([record for record in records if record.seed == seed]) for seed in _seeds(records)),
        problems=tuple(problems),
    )


def _longest(records: Sequence[RunRecord]) -> RunRecord:
    """What stands for several runs of one seed: finished before unfinished, then the one that trained most, then the first."""
    return max(records, key=lambda record: (record.status == "finished", record.totals.tokens))


def _seeds(records: Iterable[RunRecord]) -> list[int]:
    return sorted({record.seed for record in records})


def _family(family: str, arms: tuple[Arm, ...]) -> tuple[FamilyStudy, list[str]]:
    problems: list[str] = []

    def only(role: Role) -> Arm | None:
        found = [arm for arm in arms if arm.role == role and not arm.variant and arm.share is None]
        if len(found) > 1:
            names = ", ".join(arm.name for arm in found)
            problems.append(f"{len(found)} arms have the role {role}: {names}; none is used, leave one")
        return found[0] if len(found) == 1 else None

    study = FamilyStudy(
        family=family,
        arms=arms,
        baseline=only("ttt_scratch"),
        fa_scratch=only("fa_scratch"),
        fa_import=only("fa_import"),
    )
    return study, problems


def _mixed_families(records: Iterable[RunRecord]) -> Iterator[str]:
    families: dict[str, set[str]] = {}
    for record in records:
        families.setdefault(record.experiment, set()).add(record.model.family)
    for experiment, names in sorted(families.items()):
        if len(names) > 1:
            yield f"{experiment} has runs of several families: {', '.join(sorted(names))}; each is compared inside its own"


def _family_problems(study: FamilyStudy) -> Iterator[str]:
    for arm in study.arms:
        yield from (f"{arm.name}: {problem}" for problem in arm.problems)
    if not study.arms:
        return
    yield from unlike_inner_loops(arm for arm in study.arms if not arm.variant)
    ceiling, rows = study.ceiling, (row for arm in study.arms for record in arm.records for row in record.ceiling)
    if ceiling.ceiling is None and any(row.window == ceiling.window for row in rows):
        yield ceiling.problem
    reference = study.baseline or study.arms[0]
    for arm in study.arms:
        if arm is reference:
            continue
        yield from unequal(arm, reference)
