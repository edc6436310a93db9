"""What a run asks of its data module: a stage's stream, and held-out blocks that are the same for every stage, arm and rank count."""

from __future__ import annotations

from collections.abc import Callable

from ttt_lit.data.stream import StreamRequest
from ttt_lit.train.stages import Context, SizeConfig, StagePlan


def training_request(plan: StagePlan, trained: int, *, should_stop: Callable[[], bool]) -> StreamRequest:
    """A stage's stream, from its micro-batch number ``trained`` on; ``should_stop`` ends it where time decides."""
    return StreamRequest(
        dataset=plan.config.context,
        split="train",
        block_tokens=plan.context + 1,
        batch_size=plan.sequences,
        num_batches=plan.micro_batches,
        start_batch=trained,
        accumulate=plan.accumulate,
        stage=plan.order,
        should_stop=should_stop if plan.micro_batches is None else None,
    )


def held_out_request(size: SizeConfig, context: Context, blocks: int, *, world_size: int) -> StreamRequest:
    """``blocks`` held-out blocks of a context, spread evenly over the validation split, in as large batches as fit.

    Raises:
        ValueError: the ranks cannot have equally many.
    """
    tokens = size.context(context)
    if blocks % world_size:
        raise ValueError(
            f"validation: {blocks} blocks cannot be split over {world_size} ranks; use a multiple of {world_size}"
        )
    share, fitting = blocks // world_size, max(1, size.micro_batch_tokens // tokens)
    batch = next(n for n in range(min(fitting, share), 0, -1) if share % n == 0)
    return StreamRequest(
        dataset=context,
        split="validation",
        block_tokens=tokens + 1,
        batch_size=batch,
        num_batches=share // batch,
    )
