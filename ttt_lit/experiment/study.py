"""Who is who among many runs: arms, families, the baseline, the candidates. Nothing is judged here.

An arm is a set of runs that differ in nothing but the seed. Arms of one checkpoint family form a family study, and comparisons are made
inside it only: losses of different tokenizers cannot be subtracted. Standard library only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ttt_lit.experiment.record import Headline, Role, RunRecord, Validation

Account = Literal["marginal", "with_parents"]
ACCOUNTS: tuple[Account, ...] = ("marginal", "with_parents")
"""GPU-hours of the run itself, and the same with every run that made its start checkpoint."""
CANDIDATES: tuple[Role, ...] = ("bridge", "direct")
"""Roles that the question is about: conversions of a pretrained model."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One setting, run once per seed."""

    experiment: str
    variant: str
    share: float | None
    """Planned budget as a share of the baseline's GPU-hours; None: matched by tokens."""
    role: Role | None
    family: str
    records: tuple[RunRecord, ...]
    """Sorted by seed, one per seed, at least one."""
    problems: tuple[str, ...] = ()
    """Why these runs are not one arm: a seed that was run twice, several roles."""

    @property
    def name(self) -> str:
        """For people: ``q_p1_bridge``, ``q_p1_bridge b2_budget=5``, ``q_p1_bridge at 0.35``."""
        variant = f" {self.variant}" if self.variant else ""
        return f"{self.experiment}{variant}" + ("" if self.share is None else f" at {self.share:g}")

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.seed for record in self.records)

    @property
    def finished(self) -> bool:
        return all(record.status == "finished" for record in self.records)

    def finals(self, inner: Headline | None = None) -> list[Validation | None]:
        """Per seed, the validation that speaks for the run, or that of ``inner``; None where it was not measured."""
        return [record.final(inner) for record in self.records]

    def documents(self, inner: Headline | None = None) -> list[dict[str, float]]:
        """Per seed, held-out block id → nats per token; empty where it was not measured. A diverged run's may be NaN."""
        return [
            {document.id: document.nats_per_token for document in final.documents} if final else {}
            for final in self.finals(inner)
        ]

    @property
    def sources(self) -> dict[str, int]:
        """Held-out block id → the document it was cut from, over all seeds, with what was measured at the start."""
        validations = [v for record in self.records for v in (record.final(), record.start_validation) if v]
        return {block.id: block.source for validation in validations for block in validation.documents}

    @property
    def loss(self) -> float | None:
        """Headline loss in nats per token, mean over seeds; None where a seed has none or it is not finite."""
        return _mean(None if final is None else final.nats_per_token for final in self.finals())

    @property
    def bits_per_byte(self) -> float | None:
        """Headline loss in bits per byte, mean over seeds; None as for ``loss``."""
        return _mean(None if final is None else final.bits_per_byte for final in self.finals())

    @property
    def tokens(self) -> float:
        """Trained tokens, mean over seeds."""
        return sum(record.totals.tokens for record in self.records) / len(self.records)

    @property
    def bytes(self) -> float:
        """Bytes of the trained text, mean over seeds."""
        return sum(record.totals.bytes for record in self.records) / len(self.records)

    def gpu_hours(self, account: Account) -> float | None:
        """Device-hours, mean over seeds; None where a seed's, or under ``with_parents`` a parent's, are not known."""
        return _mean(gpu_hours(record, account) for record in self.records)


def gpu_hours(record: RunRecord, account: Account) -> float | None:
    """Device-hours of one run: its compute account, under ``with_parents`` with that of every parent; None: not known.

    A run that started from weights has parents; where its record names none, they are not known.
    """
    seconds: list[float | None] = [record.totals.gpu_seconds.get("compute")]
    if account == "with_parents":
        seconds += [parent.gpu_seconds for parent in record.parents]
        if record.start.source is not None and not record.parents:
            seconds.append(None)
    known = [each for each in seconds if each is not None and math.isfinite(each)]
    return sum(known) / 3600 if len(known) == len(seconds) else None


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
    """``records``: sorted by seed and run id. Of runs with the same seed the first by id stands for it, and the arm has a problem."""
    problems, first = [], records[0]
    for seed, count in Counter(record.seed for record in records).items():
        if count > 1:
            runs = ", ".join(record.name for record in records if record.seed == seed)
            problems.append(f"{count} runs of seed {seed}: {runs}; remove all but one")
    roles = sorted({str(record.role) for record in records})
    if len(roles) > 1:
        problems.append(f"its runs have several roles: {', '.join(roles)}")
    problems += [f"its seeds differ in {fact}" for fact, values in _settings(records).items() if len(values) > 1]
    return Arm(
        experiment=first.experiment,
        variant=first.variant,
        share=first.share,
        role=first.role,
        family=first.model.family,
        records=tuple({record.seed: record for record in reversed(records)}[seed] for seed in _seeds(records)),
        problems=tuple(problems),
    )


def _settings(records: Sequence[RunRecord]) -> dict[str, set[object]]:
    """What the runs of an arm have alike, with the values that were found."""
    return {
        "the network": {(each.model.num_parameters, tuple(each.model.ttt_layers)) for each in records},
        "the setting that they are judged by": {each.headline for each in records},
        "the number of devices": {each.environment.num_devices for each in records},
        "their stages": {_plan(each) for each in records if each.status == "finished"},
    }


def _plan(record: RunRecord) -> tuple[object, ...]:
    return tuple((stage.name, stage.mode, stage.context, tuple(stage.windows), stage.carry) for stage in record.stages)


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
    reference = study.baseline or study.arms[0]
    for arm in study.arms:
        if arm is reference:
            continue
        yield from unequal(arm, reference)


def unequal(arm: Arm, other: Arm) -> list[str]:
    """What two arms must share to be compared and do not: held-out documents, data, tokenizer, tokens per optimiser step.

    Two token-matched arms must also have trained on the same number of tokens. What a run has not got (it stopped before, or reads no
    short documents) is not unequal.
    """
    problems: list[str] = []
    ours, theirs = _document_ids(arm), _document_ids(other)
    if ours and theirs and (len(ours) > 1 or ours != theirs):
        sizes = " and ".join(str(len(ids)) for ids in (max(ours, key=len), max(theirs, key=len)))
        shared = len(frozenset.intersection(*ours, *theirs))
        problems.append(
            f"{arm.name} and {other.name} were measured on different documents ({sizes}, {shared} in common)"
        )
    facts: Mapping[str, tuple[set[object], set[object]]] = {
        "tokenizer": (_known(r.data.tokenizer for r in arm.records), _known(r.data.tokenizer for r in other.records)),
        "short documents": (_known(r.data.short for r in arm.records), _known(r.data.short for r in other.records)),
        "long documents": (_known(r.data.long for r in arm.records), _known(r.data.long for r in other.records)),
        "number of tokens per optimiser step": (_tokens_per_step(arm), _tokens_per_step(other)),
    }
    for fact, (here, there) in facts.items():
        if here and there and len(here | there) > 1:
            problems.append(f"{arm.name} and {other.name} do not have the same {fact}")
    if arm.share is None and other.share is None:
        problems += _unequal_tokens(arm, other)
    return problems


def _unequal_tokens(arm: Arm, other: Arm) -> Iterator[str]:
    """Token-matched arms train on the same number of tokens. Runs that did not finish are another problem."""
    ours, theirs = ({r.totals.tokens for r in each.records if r.status == "finished"} for each in (arm, other))
    if ours and theirs and len(ours | theirs) > 1:
        counts = " and ".join(" or ".join(f"{tokens:,}" for tokens in sorted(each)) for each in (ours, theirs))
        yield f"{arm.name} and {other.name} are matched by tokens but trained on {counts} tokens"


def _document_ids(arm: Arm) -> set[frozenset[str]]:
    return {frozenset(documents) for documents in arm.documents() if documents}


def _tokens_per_step(arm: Arm) -> set[object]:
    spent = [stage.spent for record in arm.records for stage in record.stages]
    return {each.tokens / each.optimizer_steps for each in spent if each.optimizer_steps}


def _known(values: Iterable[object]) -> set[object]:
    return {value for value in values if value is not None}


def _mean(values: Iterable[float | None]) -> float | None:
    every = list(values)
    known = [value for value in every if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if every and len(known) == len(every) else None
