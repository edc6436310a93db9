"""TTT's own part in a loss: what the same model has not that never updates anything. Asked for where a model without memory could pass.

``docs/decision.md`` has the rules. Standard library only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ttt_lit.record.measured import Ceiling
from ttt_lit.record.schema import Headline
from ttt_lit.verdict.arm import Arm
from ttt_lit.verdict.ceiling import arm_windows
from ttt_lit.verdict.comparison import MAX_DELTA, Comparison, compare
from ttt_lit.verdict.evidence import MIN_SEEDS
from ttt_lit.verdict.formats import counted, nats
from ttt_lit.verdict.gate import Finding, Gate, gate_of
from ttt_lit.verdict.matching import unequal
from ttt_lit.verdict.statistics import MIN_DOCUMENTS, RESAMPLES
from ttt_lit.verdict.study import FamilyStudy

MIN_CEILING = 2 * MAX_DELTA
"""Nats per token that context beyond the window must be worth, by the whole interval, for the primary gate to tell a memory from none."""
GATE_NAME = "TTT's own part"
OTHER_HARM = "training without updates is better, by what updates do or by the other training"


def excludes_none(ceiling: Ceiling) -> bool:
    """Whether a ceiling is high enough, and well enough known, that a model without memory would not pass as one that has all of it."""
    return ceiling.low is not None and ceiling.low >= MIN_CEILING and ceiling.documents >= MIN_DOCUMENTS


def is_required(family: FamilyStudy, arm: Arm, *, resamples: int = RESAMPLES) -> bool:
    """Whether the primary gate alone does not suffice for this arm."""
    known = family.ceiling
    if known.ceiling is None or not excludes_none(known.ceiling) or arm_windows(arm) != {known.window}:
        return True
    return not _baseline_memory(family, resamples)[0]


def _baseline_memory(family: FamilyStudy, resamples: int) -> tuple[bool, str]:
    """Whether inner updates win the baseline more than the gate forgives, and why: however much there is to win, a baseline that wins
    less than that is equalled by a model without memory."""
    if family.baseline is None:
        return False, "there is no baseline"
    what = f"{family.baseline.name} with − without inner updates"
    gain = on_minus_off(family, family.baseline, resamples=resamples)
    findings = list(_helps(gain, what, seeds=1, limit=-MAX_DELTA))
    return all(outcome == "pass" for outcome, _ in findings), "; ".join(reason for _, reason in findings)


def ceiling_sentence(family: FamilyStudy, *, resamples: int = RESAMPLES) -> str:
    """What the ceiling is and what the gate can therefore tell."""
    ceiling = family.ceiling.ceiling
    asks = "a model without memory could pass, and scaling up needs TTT's own part as well"
    if ceiling is None:
        problem = family.ceiling.problem
        return f"{problem[:1].upper()}{problem[1:]}. Nothing excludes that {asks}."
    ends = "" if ceiling.low is None or ceiling.high is None else f" [{ceiling.low:.4f}, {ceiling.high:.4f}]"
    worth = (
        f"All context beyond the window of {ceiling.window:,} tokens is worth {ceiling.nats:.4f}{ends} nats per token to the imported "
        f"model, {ceiling.checkpoint} ({counted(ceiling.blocks, 'block')} of {counted(ceiling.documents, 'document')}), and so to a "
        "memory as good as its full attention"
    )
    if excludes_none(ceiling):
        enough, why = _baseline_memory(family, resamples)
        high = f"{worth}. That is at least {MIN_CEILING:g}, twice the gate's {MAX_DELTA:g}"
        if enough:
            return f"{high}, and the baseline uses more than {MAX_DELTA:g} of it ({why}): its equal without memory would fail."
        return f"{high}, but it is not shown that the baseline uses more than {MAX_DELTA:g} of it ({why}): {asks}."
    if ceiling.documents < MIN_DOCUMENTS:
        return f"{worth}. With fewer than {MIN_DOCUMENTS} documents this excludes nothing: {asks}."
    return f"{worth}. This does not exclude less than {MIN_CEILING:g}, twice the gate's {MAX_DELTA:g}: {asks}."


def read(arm: Arm, inner: Headline) -> Arm:
    """The same runs, judged by their loss with (on) or without (off) inner updates."""
    return dataclasses.replace(arm, records=tuple(dataclasses.replace(each, headline=inner) for each in arm.records))


def on_minus_off(family: FamilyStudy, arm: Arm, *, resamples: int = RESAMPLES) -> Comparison:
    """The same weights read with − without inner updates; below zero they help."""
    return compare(read(arm, "on"), read(arm, "off"), resamples=resamples, ceiling=family.ceiling.ceiling)


def against_control(family: FamilyStudy, arm: Arm, control: Arm, *, resamples: int = RESAMPLES) -> Comparison:
    """An arm read with updates − a control read without: all that updates, in training and in reading, have brought."""
    return compare(read(arm, "on"), read(control, "off"), resamples=resamples, ceiling=family.ceiling.ceiling)


def controls(family: FamilyStudy, arm: Arm) -> list[Arm]:
    """The arms that are ``arm`` without updates in training: token-matched, from the same start, the same attention in the last stage.

    First the best for the gate: what is comparable at all, attention alone before prime MLPs that are trained but never updated, more
    common seeds, the name.
    """
    found = [
        each
        for each in family.arms
        if each.share is None and not each.variant and not each.trains_with_updates and _network(each) == _network(arm)
    ]

    def order(each: Arm) -> tuple[int, bool, int, str]:
        static = any(stage.mode == "static" for record in each.records for stage in record.stages)
        return len(unequal(arm, each)), static, -len(set(each.seeds) & set(arm.seeds)), each.name

    return sorted(found, key=order)


def _network(arm: Arm) -> set[object]:
    """What a control must share: the weights that it began with, and what the last stage's attention sees."""
    return {
        (r.start.source is None, r.start.weights_hash, tuple(r.stages[-1].windows), r.stages[-1].sink_tokens)
        for r in arm.records
        if r.stages
    }


def own_part_gate(
    family: FamilyStudy, experiment: str, variant: str, judged: Arm, *, resamples: int = RESAMPLES
) -> Gate:
    """Whether inner updates lower the loss of ``judged``, and that of the token-matched arm below the matched control without them."""
    gain = on_minus_off(family, judged, resamples=resamples)
    what = f"{judged.name} with − without inner updates"
    findings, numbers = list(_helps(gain, what, seeds=1)), [(what, _number(gain))]
    matched = family.matched(experiment, variant)
    found = [] if matched is None else controls(family, matched)
    if matched is None:
        findings.append(("insufficient", f"there is no token-matched run of {experiment} to hold against a control"))
    elif not found:
        findings.append(
            (
                "insufficient",
                f"{matched.name} has no matched control: a token-matched run from the same start with the same attention that never "
                "updates, as configs/q_ttt_at_evaluation.yaml or configs/q_swa_only.yaml",
            )
        )
    else:
        whole = against_control(family, matched, found[0], resamples=resamples)
        what = f"{matched.name} − {found[0].name} read without updates"
        findings += _helps(whole, what, seeds=MIN_SEEDS, harm=OTHER_HARM)
        numbers.append((what, _number(whole)))
    return gate_of(GATE_NAME, judged, findings, numbers)


def _helps(
    comparison: Comparison, what: str, *, seeds: int, harm: str = "updates do harm", limit: float = 0.0
) -> Iterator[Finding]:
    """Evidence needs all of the interval below ``limit``. One set of weights is compared with itself by one seed, two trainings by
    several. ``harm``: what an interval above 0 shows."""
    interval = comparison.interval
    yield from (("insufficient", reason) for reason in comparison.reasons)
    if comparison.reasons:
        return
    if interval is None:
        yield "insufficient", f"{what}: the two were not measured on the same documents"
        return
    text = f"{what}: {nats(interval)}"
    if interval.documents < MIN_DOCUMENTS:
        few = f"measured on {counted(interval.documents, 'document')}, an interval needs at least {MIN_DOCUMENTS}"
        yield "insufficient", f"{text}, {few}"
    elif interval.seeds < seeds:
        yield "insufficient", f"{text}, a single seed of both; run at least {seeds}"
    elif interval.high < limit:
        yield "pass", f"{text}, wholly below {limit:g}"
    elif interval.low > 0:
        yield "fail", f"{text}, wholly above 0: {harm}"
    else:
        yield "insufficient", f"{text}, not wholly below {limit:g}"


def _number(comparison: Comparison) -> str:
    if comparison.interval is None:
        return "not measured"
    parts = [comparison.of_ceiling, counted(comparison.interval.seeds, "seed")]
    return f"{nats(comparison.interval)} ({', '.join(filter(None, parts))})"
