"""How a run that has diverged ends: with the reason, and where to go back to. When one has is said in ``ttt_lit/record/divergence.py``.
Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from ttt_lit.train.resume import checkpoints_folder


class Diverged(RuntimeError):
    """The run is not worth continuing. The message has the reason, the stage, the step and the last good checkpoint."""


def end_diverged(trainer: Any, module: Any, reason: str) -> NoReturn:
    """End a run that has diverged. Every rank must come to it: one that trained on would wait for the others in vain."""
    if module.entered < 0:
        start = module.start_config
        cure = (
            f"the weights to start from are broken ({start.init_from}). Import them again, or start a new run from others"
            if start.init == "checkpoint"
            else f"the network cannot compute as it was drawn (seed {start.seed}). Start a new run with another network"
        )
        raise Diverged(f"{reason}; nothing has been trained, because {cure}")
    raise Diverged(f"{reason}; {_last_good(trainer, module)}. Lower inner.lr or the stage's lr and start a new run")


def stop_unless_finite(trainer: Any, module: Any, what: str, *, context: int, losses: Mapping[str, float]) -> None:
    """End a run that measured a held-out loss (setting of the inner loop → nats per token, the same on every rank) that is no number.

    For whoever measures, once the loss is kept: training itself may never show it, and no record but a diverged run's can hold it.
    """
    reason = non_finite_loss(what, context=context, losses=losses)
    if reason is not None:
        end_diverged(trainer, module, reason)


def non_finite_loss(what: str, *, context: int, losses: Mapping[str, float]) -> str | None:
    """Why these held-out losses end a run, naming all that are not finite; None if none is."""
    bad = [f"with inner updates {inner} is {loss}" for inner, loss in losses.items() if not math.isfinite(loss)]
    return f"{what} at context {context} {' and '.join(bad)}" if bad else None


def _last_good(trainer: Any, module: Any) -> str:
    """In words: the last finished stage's checkpoint, else the run's start. A resume file may hold weights that were on their way out."""
    if module.entered > 0:
        path = checkpoints_folder(trainer.default_root_dir) / module.plans[module.entered - 1].name
    elif module.start_config.init == "checkpoint":
        path = module.start_config.init_from
    else:
        return "there is no good checkpoint, since no stage has been finished"
    return f"the last good checkpoint is {path}"
