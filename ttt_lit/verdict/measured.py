"""What was measured, in words: conversions against the baseline and the full-attention controls, whatever the gates say of it.

A reader's first question. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ttt_lit.record.schema import RunRecord
from ttt_lit.verdict.arm import ACCOUNTS, Account, Arm
from ttt_lit.verdict.comparison import Comparison, Differences, hours_ratio
from ttt_lit.verdict.formats import NONE, billions, interval_text, loss
from ttt_lit.verdict.gates import CandidateGates
from ttt_lit.verdict.study import FamilyStudy

ACCOUNT_WORDS: dict[Account, str] = {"marginal": "run alone", "with_parents": "with parents"}
NOT_PROVED = "measured, not proved"
"""Of numbers whose evidence is insufficient for a decision."""
_NO_DIFFERENCE = "no difference can be formed"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One conversion at the baseline's number of tokens."""

    candidate: str
    state: str
    """``NOT_PROVED`` where the wall-clock gate of the run alone has insufficient evidence."""
    sentences: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.candidate}: {self.state}"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One wall-clock-matched arm."""

    arm: str
    records: tuple[RunRecord, ...]
    """Its runs, one per seed."""
    shares: tuple[str, ...]
    """Measured GPU-hours as a share of the baseline's, one per account."""
    loss: str
    """Nats per token."""
    difference: Comparison | None
    """To the baseline."""
    proved: bool


def measured(
    family: FamilyStudy, judged: Sequence[CandidateGates], differences: Mapping[str, Differences]
) -> list[Measured]:
    """Every conversion but ablations; ``differences``: of every arm, by name."""
    return [
        Measured(
            candidate=each.name, state=_state(family, each), sentences=tuple(_sentences(family, each, differences))
        )
        for each in judged
        if not each.variant
    ]


def budgets(
    family: FamilyStudy, judged: Sequence[CandidateGates], differences: Mapping[str, Differences]
) -> list[Budget]:
    """Every wall-clock-matched arm of a conversion, smallest budget first."""
    return [
        Budget(
            arm=arm.name,
            records=arm.records,
            shares=tuple(_ratio(arm, family.baseline, account) for account in ACCOUNTS),
            loss=loss(arm.loss),
            difference=differences[arm.name]["ttt_scratch"],
            proved=_proved(each),
        )
        for each in judged
        for arm in family.shares(each.experiment, each.variant).values()
    ]


def shared_cores(records: Iterable[RunRecord]) -> str:
    """What else is in the times of runs that are processes on a CPU; empty where none is."""
    if not any(record.environment.device.endswith("cpu") for record in records):
        return ""
    return "processes on CPU cores: other work on the machine is in these times"


def _proved(each: CandidateGates) -> bool:
    return each.marginal.outcome != "insufficient"


def _state(family: FamilyStudy, each: CandidateGates) -> str:
    arm = family.matched(each.experiment, each.variant)
    if arm is None or arm.loss is None:
        return "not measured"
    return "measured" if _proved(each) else NOT_PROVED


def _sentences(family: FamilyStudy, each: CandidateGates, differences: Mapping[str, Differences]) -> Iterator[str]:
    arm, baseline = family.matched(each.experiment, each.variant), family.baseline
    if arm is None:
        yield "There is no run at the baseline's number of tokens."
        return
    if arm.loss is None:
        yield f"No loss was measured{'' if arm.finished else ', the run did not finish'}."
        return
    found = differences[arm.name]
    yield f"{loss(arm.loss)} nats per token after {billions(arm.tokens)} tokens, {_to_baseline(arm, baseline, found)}"
    yield (
        f"Against full attention: {_to_control('imported', family.fa_import, found['fa_import'])}; "
        f"{_to_control('from scratch', family.fa_scratch, found['fa_scratch'])}."
    )
    if baseline is not None and baseline.problems + arm.problems:
        flagged = [f"{each.name}: {problem}" for each in (arm, baseline) for problem in each.problems]
        yield f"Flagged, so it is no evidence: {'; '.join(flagged)}."


def _to_control(words: str, control: Arm | None, comparison: Comparison | None) -> str:
    if control is None:
        return f"{words}, no run"
    difference = difference_words(comparison)
    return f"{words} ({control.name}) {difference}" if difference else f"{words} ({control.name}), {_NO_DIFFERENCE}"


def _to_baseline(arm: Arm, baseline: Arm | None, found: Differences) -> str:
    if baseline is None:
        return "and there is no baseline to compare with."
    if baseline.loss is None:
        return f"and the baseline ({baseline.name}) has no loss to compare with."
    difference = difference_words(found["ttt_scratch"])
    said = f"difference {difference}{_sample(found['ttt_scratch'])}" if difference else _NO_DIFFERENCE
    return (
        f"against {loss(baseline.loss)} of the baseline ({baseline.name}) after {billions(baseline.tokens)}: {said}. "
        f"{_hours(arm, baseline)}"
    )


def _hours(arm: Arm, baseline: Arm) -> str:
    unfinished = [each.name for each in (arm, baseline) if not each.finished]
    if unfinished:
        return f"GPU-hours are not compared: {' and '.join(unfinished)} did not finish."
    times = ", ".join(f"{_ratio(arm, baseline, account)} {words}" for account, words in ACCOUNT_WORDS.items())
    records = [record for each in (arm, baseline) for record in each.records]
    devices = {record.environment.device for record in records}
    doubts = [f"on different devices: {', '.join(sorted(devices))}"] if len(devices) > 1 else []
    doubts += [shared_cores(records)] if shared_cores(records) else []
    return f"GPU-hours as a multiple of the baseline's: {times}" + (f" ({'; '.join(doubts)})." if doubts else ".")


def _ratio(arm: Arm, baseline: Arm | None, account: Account) -> str:
    """A dash unless both are finished: the hours of a run that is cut off or still running are not what it costs."""
    if baseline is None or not (arm.finished and baseline.finished):
        return NONE
    ratio = hours_ratio(arm, baseline, account)
    return NONE if ratio is None else f"{ratio:.3f}" if ratio < 1 else f"{ratio:.2f}"


def difference_words(comparison: Comparison | None) -> str:
    """With its share of the ceiling, and whether it is flagged; empty where there is none."""
    if comparison is None or comparison.interval is None:
        return ""
    notes = filter(None, (comparison.of_ceiling, "flagged" if comparison.reasons else ""))
    return " ".join([interval_text(comparison.interval), *(f"({note})" for note in notes)])


def _sample(comparison: Comparison | None) -> str:
    if comparison is None or comparison.interval is None or not comparison.interval.bounded:
        return ""
    over = comparison.interval
    seeds = "1 seed" if over.seeds == 1 else f"{over.seeds} seeds"
    return f" ({over.level:.0%} interval over {over.blocks} blocks of {over.documents} documents, {seeds})"
