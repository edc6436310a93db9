"""What one run shows, in sentences, from its record alone.

Every statement is computed, so a run in which the method did not help says so. One run has no confidence interval: a
difference below ``MIN_EFFECT`` is called no difference, and none of this replaces a comparison of repeated runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ttt_lit.record.measured import Bucket, Validation
from ttt_lit.record.schema import RunRecord, Stage

MIN_EFFECT = 0.01
"""Nats per token; the gate of the study."""
FLAT = 0.05
"""Nats per token by which the loss beyond the window may differ and still be called flat: documents differ by about
this much from position to position."""
MIN_LEARNT = 1.0
"""Nats per token below the unigram entropy from which a model counts as trained."""
MAX_VALIDATION_SHARE = 0.10
"""Share of a run's device time."""


def findings(record: RunRecord) -> list[str]:
    """Sentences for one run, most important first."""
    sentences = [_status(record), *_learnt(record)]
    for stage in record.stages:
        sentences += _transition(stage)
    for stage, off, on in inner_pairs(record):
        sentences += _inner_loop(stage, off, on)
    for stage in record.stages:
        sentences += _beyond_the_window(stage)
    return [*sentences, *_validation_time(record)]


def inner_pairs(record: RunRecord) -> Iterator[tuple[Stage, Validation, Validation]]:
    """Validations of the same stage and context with the inner loop off and on."""
    for stage in record.stages:
        for off in stage.validations:
            for on in stage.validations:
                if off.inner == "off" and on.inner == "on" and off.context == on.context:
                    yield stage, off, on


def window_of(stage: Stage) -> int | None:
    """The widest window of a stage whose layers are all windowed; None if any is dense."""
    widths = [window for window in stage.windows if window is not None]
    return max(widths) if widths and len(widths) == len(stage.windows) else None


def beyond_window(validation: Validation, window: int) -> float | None:
    """Mean loss beyond the window minus that of the half window before its end; None where it cannot be seen."""
    near = [b for b in validation.buckets if b.start >= window // 2 and b.stop <= window]
    far = [b for b in validation.buckets if b.start >= window]
    return _mean(far) - _mean(near) if near and far else None


def _mean(buckets: list[Bucket]) -> float:
    positions = sum(bucket.stop - bucket.start for bucket in buckets)
    return sum(bucket.nats_per_token * (bucket.stop - bucket.start) for bucket in buckets) / positions


def _status(record: RunRecord) -> str:
    if record.status == "finished":
        return f"The run finished: {record.totals.tokens:,} tokens in {len(record.stages)} stages."
    reason = f" ({record.reason})" if record.reason else ""
    return (
        f"The run did not finish, its status is {record.status}{reason}: what follows is what it had recorded by then."
    )


def _learnt(record: RunRecord) -> Iterator[str]:
    """How far the last measured loss lies below what token frequencies alone explain."""
    measured = [(s, v) for s in record.stages for v in s.validations if v.inner == "off"]
    if record.unigram_entropy is None or not measured:
        return
    stage, validation = measured[-1]
    below = record.unigram_entropy - validation.nats_per_token
    losses = f"{validation.nats_per_token:.3f} nats per token, unigram entropy {record.unigram_entropy:.3f}"
    if not math.isfinite(below):
        yield f"How much the model of {stage.name} has learnt is UNKNOWN: a loss is not a number."
    elif below >= MIN_LEARNT:
        yield f"At the end of {stage.name} the loss without the inner loop is {below:.2f} nats below the unigram entropy ({losses})."
    else:
        yield (
            f"THE MODEL HAS LEARNT TOO LITTLE at the end of {stage.name} to judge a method by: {losses}, "
            f"expected at least {MIN_LEARNT:g} nat below."
        )


def _transition(stage: Stage) -> Iterator[str]:
    proof = stage.transition
    if proof is None:
        return
    change = f"{proof.kind}, into {stage.name}: loss {proof.before:.5f} before, {proof.after:.5f} after"
    if not proof.held:
        yield f"PROMISE BROKEN: {change}; the two had to agree to {proof.tolerance:g}."
    elif proof.preserves:
        yield f"{_capital(change)}: equal to {proof.tolerance:g}, as promised."
    else:
        jump = f"{proof.difference:+.3f} nats per token"
        yield f"{_capital(change)}: a jump of {jump} (this conversion promises no equality)."


def _inner_loop(stage: Stage, off: Validation, on: Validation) -> Iterator[str]:
    where = f"at the end of {stage.name}, context {on.context:,}"
    losses = f"{on.nats_per_token:.3f} nats per token with it, {off.nats_per_token:.3f} without"
    gain = off.nats_per_token - on.nats_per_token
    if not math.isfinite(gain):
        yield f"The effect of the inner loop {where} is UNKNOWN: a loss is not a number."
        return
    if gain >= MIN_EFFECT:
        yield f"The inner loop helps {where}: {losses} ({-gain:+.3f})."
    elif gain <= -MIN_EFFECT:
        yield f"THE INNER LOOP HURTS {where}: {losses} ({-gain:+.3f})."
    else:
        difference = f"{-gain:+.3f}; below {MIN_EFFECT:g} counts as none"
        yield f"THE INNER LOOP MAKES NO DIFFERENCE {where}: {losses} ({difference})."
    if not off.buckets or not on.buckets:
        return
    first = off.buckets[0].nats_per_token - on.buckets[0].nats_per_token
    last = off.buckets[-1].nats_per_token - on.buckets[-1].nats_per_token
    verb = "grows" if last - first >= MIN_EFFECT else "DOES NOT GROW"
    yield (
        f"Its advantage {verb} along the context {where}: {first:.3f} nats per token in the first bucket, "
        f"{last:.3f} in the last."
    )


def _beyond_the_window(stage: Stage) -> Iterator[str]:
    window = window_of(stage)
    if window is None:
        return
    for validation in stage.validations:
        if validation.inner == "on":
            continue
        where = f"{stage.name} with the inner loop off, window {window:,}, context {validation.context:,}"
        change = beyond_window(validation, window)
        if change is None:
            yield f"{where}: the context does not reach beyond the window, so whether the loss is flat cannot be seen."
        elif not math.isfinite(change):
            yield f"{where}: UNKNOWN beyond the window, a loss is not a number."
        elif abs(change) <= FLAT:
            yield f"{where}: the loss is flat beyond the window ({change:+.3f} nats per token against just before it)."
        else:
            direction = "falls" if change < 0 else "rises"
            yield (
                f"{where}: THE LOSS IS NOT FLAT beyond the window, it {direction} by {abs(change):.3f} nats per token "
                f"against just before it (flat means within {FLAT:g})."
            )


def _validation_time(record: RunRecord) -> Iterator[str]:
    seconds = [sum(stage.spent.gpu_seconds.values()) for stage in record.stages]
    validating = sum(stage.spent.gpu_seconds.get("validation", 0.0) for stage in record.stages)
    if sum(seconds) > 0 and validating / sum(seconds) > MAX_VALIDATION_SHARE:
        share = validating / sum(seconds)
        yield f"VALIDATION TOOK {share:.0%} of the run's device time (limit {MAX_VALIDATION_SHARE:.0%})."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
