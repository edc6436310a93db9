"""When has a run diverged? Judged from one loss and one gradient norm per optimiser step, while it trains and from its record.

Too high an inner learning rate diverges without any NaN, over a hundred steps. A running median would climb along with
the loss and never notice, so the limit stands relative to the *lowest* running median of the stage so far.
Standard library only.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any


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
