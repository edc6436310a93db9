"""Two arms against each other: the paired difference, what forbids it, and GPU-hours to a target loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ttt_lit.record.measured import Ceiling, EvaluationPoint, Validation
from ttt_lit.record.schema import Headline, Role, RunRecord
from ttt_lit.verdict.arm import Account, Arm, gpu_hours
from ttt_lit.verdict.ceiling import share_of_ceiling
from ttt_lit.verdict.formats import nats
from ttt_lit.verdict.matching import unequal
from ttt_lit.verdict.statistics import RESAMPLES, Interval, paired_difference
from ttt_lit.verdict.study import FamilyStudy

MAX_DELTA = 0.01
"""Nats per token by which a candidate may be worse than the baseline, and a control worse than its own start."""
CONTROLS: tuple[Role, ...] = ("fa_import", "control")
"""Roles that must not be worse than the checkpoint that they started from: further training that harms says nothing about a method."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Candidate − reference, headline loss in nats per token, paired by held-out block and seed."""

    candidate: str
    reference: str
    interval: Interval | None
    """Over the seeds that both have; None: nothing could be paired."""
    reasons: tuple[str, ...]
    """Why the difference may not be used, even where it could be computed; empty: it may."""
    ceiling: Ceiling | None = None
    """What context beyond the window is worth, to hold the difference against; None: not known."""

    @property
    def of_ceiling(self) -> str:
        """The share in words, ``−19% of the ceiling``; empty where there is none."""
        return "" if self.share is None else f"{self.share:+.0%} of the ceiling".replace("-", "−")

    @property
    def share(self) -> float | None:
        """The difference as a share of the ceiling; None where the difference is not known, or the ceiling not above 0."""
        return None if self.interval is None else share_of_ceiling(self.interval.estimate, self.ceiling)


Differences = dict[Role, Comparison | None]
"""Role of the reference → the comparison; None: no such reference, or it is the arm itself."""


def compare(
    candidate: Arm, reference: Arm, *, resamples: int = RESAMPLES, ceiling: Ceiling | None = None
) -> Comparison:
    """Compare two arms of one family, however broken they are; ``ceiling``: of the family."""
    reasons = [*flags(candidate, resamples=resamples), *flags(reference, resamples=resamples)]
    reasons += unequal(candidate, reference)
    for arm, other in ((candidate, reference), (reference, candidate)):
        alone = sorted(set(arm.seeds) - set(other.seeds))
        if alone:
            seeds = ", ".join(map(str, alone))
            reasons.append(f"{arm.name} has runs without a partner of the same seed in {other.name}: seed {seeds}")
    ours, theirs = (dict(zip(arm.seeds, arm.documents(), strict=True)) for arm in (candidate, reference))
    common = sorted(ours.keys() & theirs.keys())
    return Comparison(
        candidate=candidate.name,
        reference=reference.name,
        interval=_paired(
            [ours[seed] for seed in common], [theirs[seed] for seed in common], candidate.sources, resamples
        ),
        reasons=tuple(dict.fromkeys(reasons)),
        ceiling=ceiling,
    )


def compare_all(family: FamilyStudy, arm: Arm, *, resamples: int = RESAMPLES) -> Differences:
    """An arm against the family's three references: the baseline and both full-attention controls. None: there is none, or it is the arm.

    Against ``fa_import`` the difference is what the conversion costs a pretrained model, against ``fa_scratch`` what the pretrained
    model has brought.
    """
    references: dict[Role, Arm | None] = {
        "ttt_scratch": family.baseline,
        "fa_scratch": family.fa_scratch,
        "fa_import": family.fa_import,
    }
    return {
        role: None
        if reference is None or reference is arm
        else compare(arm, reference, resamples=resamples, ceiling=family.ceiling.ceiling)
        for role, reference in references.items()
    }


def flags(arm: Arm, *, resamples: int = RESAMPLES) -> list[str]:
    """Why an arm's runs may not be used in a comparison; empty: they may."""
    found = [f"{arm.name}: {problem}" for problem in arm.problems]
    for record in arm.records:
        found += [f"{arm.name}, seed {record.seed}: {problem}" for problem in _unusable(record)]
    if arm.role in CONTROLS:
        found += [f"{arm.name}: {problem}" for problem in _worse_than_start(arm, resamples)]
    return found


def _unusable(record: RunRecord) -> Iterator[str]:
    if record.status != "finished":
        yield f"the run did not finish: {record.status}" + (f" ({record.reason})" if record.reason else "")
    final = record.final()
    if final is None:
        yield f"the loss that it is judged by (inner loop {record.headline}) was not measured at the end of the last stage"
    elif not final.documents:
        yield "no document was measured at the end of the last stage"
    elif not all(math.isfinite(document.nats_per_token) for document in final.documents):
        yield "a document's loss is not finite"


def _worse_than_start(arm: Arm, resamples: int) -> Iterator[str]:
    """On the positions of the short context, which is what the start checkpoint was made for. Whether training did harm: what updates do
    to a network that was not trained for them is another question."""
    inner: Headline | None = None if arm.trains_with_updates else "off"
    starts, finals = [], []
    for record, final in zip(arm.records, arm.finals(inner), strict=True):
        if record.start.source is None and record.start_validation is None:
            continue  # random weights: there is no start to be worse than
        starts.append(_short(record.start_validation))
        finals.append(_short(final))
    if not starts:
        return
    interval = _paired(finals, starts, arm.sources, resamples)
    if interval is None:
        yield "whether it is worse than the checkpoint that it started from cannot be told: the two were not measured on the same documents"
    elif not interval.bounded:
        yield "whether it is worse than the checkpoint that it started from cannot be told: the two were measured on 1 document"
    elif interval.estimate > MAX_DELTA and interval.low > 0:
        yield (
            f"worse than the checkpoint that it started from, by {nats(interval)} on the short context; "
            "lower its learning rate and run it again"
        )


def _short(validation: Validation | None) -> dict[str, float]:
    return {document.id: document.short for document in validation.documents} if validation else {}


def _paired(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], sources: Mapping[str, int], resamples: int
) -> Interval | None:
    """The interval, or None where there is nothing to pair: other documents, none at all, or a loss that is not finite."""
    tables = [*ours, *theirs]
    comparable = bool(tables) and bool(tables[0]) and all(table.keys() == tables[0].keys() for table in tables)
    if not comparable or not all(math.isfinite(loss) for table in tables for loss in table.values()):
        return None
    return paired_difference(ours, theirs, documents=sources, resamples=resamples)


def hours_ratio(arm: Arm, baseline: Arm, account: Account) -> float | None:
    """GPU-hours of an arm over those of the baseline; None: not known, or none were spent."""
    hours, of = arm.gpu_hours(account), baseline.gpu_hours(account)
    return None if hours is None or of is None or of <= 0 or hours <= 0 else hours / of


def target_loss(baseline: Arm) -> float | None:
    """The default target: the baseline's last loss on the fixed subset, mean over seeds; None where a seed has none."""
    last = [series[-1][1] for series in map(_series, baseline.records) if series]
    return sum(last) / len(last) if last and len(last) == len(baseline.records) else None


def hours_to_target(arm: Arm, target: float, account: Account) -> float | None:
    """GPU-hours until the loss on the fixed subset first reached ``target``, mean over seeds; None: a seed never did, or not known.

    Between two measurements the loss is taken as linear in GPU-hours. A run whose first measurement is already there gets the hours of
    that measurement, which is an upper bound.
    """
    hours = [run_hours_to_target(record, target, account) for record in arm.records]
    known = [each for each in hours if each is not None]
    return sum(known) / len(known) if len(known) == len(hours) else None


def run_hours_to_target(record: RunRecord, target: float, account: Account) -> float | None:
    """The same of one run."""
    whole, own = gpu_hours(record, account), gpu_hours(record, "marginal")
    seconds = _first_crossing(_series(record), target)
    if seconds is None or whole is None or own is None:
        return None
    return seconds / 3600 + (whole - own)


def reached_at_once(record: RunRecord, target: float) -> bool:
    """Whether a run's first measurement was already at the target, so that its GPU-hours to it are an upper bound."""
    series = _series(record)
    return bool(series) and series[0][1] <= target


def _first_crossing(series: Sequence[tuple[float, float]], target: float) -> float | None:
    before: tuple[float, float] | None = None
    for seconds, loss in series:
        if loss <= target:
            if before is None:
                return seconds
            start, high = before
            return start + (seconds - start) * (high - target) / (high - loss)
        before = (seconds, loss)
    return None


def _series(record: RunRecord) -> list[tuple[float, float]]:
    """(compute device-seconds, headline loss) of every measurement of the subset; what is missing or not finite is left out."""
    points = [(point.gpu_seconds, _headline(point, record)) for point in record.evaluations]
    return [(seconds, loss) for seconds, loss in points if loss is not None and math.isfinite(loss)]


def _headline(point: EvaluationPoint, record: RunRecord) -> float | None:
    return point.inner_on if record.headline == "on" else point.inner_off
