"""When has a run diverged? Judged from one loss and one gradient norm per optimiser step, and from every held-out loss.

Too high an inner learning rate diverges without any NaN, over a hundred steps. A running median would climb along with
the loss and never notice, so the limit stands relative to the *lowest* running median of the stage so far.
Standard library only.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
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


class DivergenceDetector:
    """Feed it every optimiser step; it answers with a reason to stop, or None.

    Parameters:
        window: losses in the running median.
        margin_nats: a loss counts as too high above (lowest running median of the stage) + this, in nats per token.
        min_history: losses of a stage before the limit exists; only non-finite values count until then.
        patience: consecutive losses that must be too high, so that one odd batch does not end a long run.
    """

    def __init__(self, *, window: int = 32, margin_nats: float = 1.5, min_history: int = 8, patience: int = 3) -> None:
        if window < 1 or patience < 1 or not 1 <= min_history <= window:
            raise ValueError(
                f"DivergenceDetector: got window {window}, min_history {min_history}, patience {patience}, "
                "expected patience ≥ 1 and 1 ≤ min_history ≤ window"
            )
        if not (math.isfinite(margin_nats) and margin_nats > 0):
            raise ValueError(f"DivergenceDetector: got margin_nats {margin_nats}, expected a positive number of nats")
        self.window, self.margin_nats = window, margin_nats
        self.min_history, self.patience = min_history, patience
        self._losses: deque[float] = deque(maxlen=window)
        self._lowest_median: float | None = None
        self._too_high = 0

    def reset(self) -> None:
        """Forget the past. Call at every stage start: a transition may move the loss by its nature."""
        self._losses.clear()
        self._lowest_median = None
        self._too_high = 0

    @property
    def limit(self) -> float | None:
        """Loss (nats per token) above which a step counts as too high. None: not enough history yet."""
        return None if self._lowest_median is None else self._lowest_median + self.margin_nats

    def update(self, loss: float, grad_norm: float | None = None) -> str | None:
        """Take one optimiser step's mean loss (nats per token) and outer gradient norm; return why to stop, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        limit = self.limit
        self._too_high = self._too_high + 1 if limit is not None and loss > limit else 0
        if self._too_high >= self.patience:
            return (
                f"the loss is {loss:.3f} nats per token, {self._too_high} steps in a row more than "
                f"{self.margin_nats:g} above the lowest running median of this stage ({self._lowest_median:.3f})"
            )
        self._losses.append(loss)
        if len(self._losses) >= self.min_history:
            median = statistics.median(self._losses)
            self._lowest_median = median if self._lowest_median is None else min(self._lowest_median, median)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {"losses": list(self._losses), "lowest_median": self._lowest_median, "too_high": self._too_high}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self._losses = deque(state["losses"], maxlen=self.window)
        self._lowest_median = state["lowest_median"]
        self._too_high = state["too_high"]
