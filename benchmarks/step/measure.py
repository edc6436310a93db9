"""All arms at one context, taking turns."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from step.arms import Arm, make_arms
from step.bench import Bench
from step.checks import Reference
from step.console import say
from step.policies import settle


def attempt(bench: Bench, arm: Arm, action: Callable[[Arm], object]) -> None:
    """An arm that does not fit is out, and the others go on."""
    if arm.failure is not None:
        return
    try:
        action(arm)
    except torch.OutOfMemoryError:
        arm.failure = "out of memory"
    # After the handler: until then the traceback keeps the tensors alive.
    if arm.failure is not None:
        bench.clear()


def measure(bench: Bench, context: int) -> tuple[list[Arm], str | None]:
    """All arms at one context, and the name of the arm that gradients were compared with (of the first network with several)."""
    arguments = bench.arguments
    bench.draw(context)
    if bench.compiled:
        # Or the second context would be compiled for lengths that vary.
        torch._dynamo.reset()
    arms = make_arms(arguments.arms, arguments.policy)
    references: dict[str, Reference] = {}

    def first(arm: Arm) -> None:
        settle(bench, arm, arms)
        if arm.failure is None:
            _warm_up(bench, arm, arms, references)
            arm.peak = bench.peak(arm)

    for arm in arms:
        say(f"{context:,} tokens: {arm.name}, first step, check and memory")
        attempt(bench, arm, first)
    for number in range(arguments.rounds):
        turn = number % len(arms)
        for arm in arms[turn:] + arms[:turn]:
            say(f"{context:,} tokens: round {number + 1} of {arguments.rounds}, {arm.name}")
            attempt(bench, arm, lambda arm: _time(bench, arm))
            arm.seconds += [None] * (number + 1 - len(arm.seconds))
    bench.clear()
    return arms, next((found.name for what, found in references.items() if what.startswith("exact")), None)


def _warm_up(bench: Bench, arm: Arm, arms: Sequence[Arm], references: dict[str, Reference]) -> None:
    losses: list[Tensor] = []
    bench.prepare(arm)
    arm.first_seconds = bench.device.timed(lambda: losses.append(bench.step(arm)))
    if arm.mode == "meta" or sum(other.computes == arm.computes for other in arms) > 1:
        loss, gradients = losses[0].item(), bench.take_gradients()
        if arm.computes in references:
            reference = references[arm.computes]
            arm.error, arm.compared_with = reference.require(arm.name, loss, gradients), reference.name
        else:
            references[arm.computes] = Reference(arm.name, loss, gradients, bench.precision)
    for _ in range(bench.arguments.warmup - 1):
        bench.prepare(arm)
        bench.step(arm)
    bench.decoder.zero_grad(set_to_none=True)


def _time(bench: Bench, arm: Arm) -> None:
    bench.prepare(arm)
    arm.seconds.append(bench.device.timed(lambda: bench.step(arm)))
    bench.decoder.zero_grad(set_to_none=True)
