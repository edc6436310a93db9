"""Stops a run that has diverged, and says where and from which checkpoint to go on."""

from __future__ import annotations

import math
from typing import Any

import lightning as L

from ttt_lit.record.divergence import DivergenceDetector
from ttt_lit.train.divergence import end_diverged
from ttt_lit.train.module import TTTModule


class DivergenceGuard(L.Callback):
    """Watches the loss and gradient norm of every optimiser step, and that the inner loop of a TTT stage moves its weights.

    Held-out losses are judged by the callbacks that measure them, before anything else is made of them.

    Args:
        window: losses in the running median.
        margin_nats: limit above the stage's lowest running median, in nats per token.
        min_history: steps of a stage before that limit exists.
        patience: steps in a row above the limit.
    """

    def __init__(self, window: int = 32, margin_nats: float = 1.5, min_history: int = 8, patience: int = 3) -> None:
        self.detector = DivergenceDetector(
            window=window, margin_nats=margin_nats, min_history=min_history, patience=patience
        )

    def on_train_epoch_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self.detector.reset()

    def on_train_batch_end(self, trainer: L.Trainer, module: TTTModule, *_: Any) -> None:  # type: ignore[override]
        if not module.at_boundary:
            return
        report = module.report
        assert report is not None
        reason = self.detector.update(report.loss, report.grad_norm)
        updates = module.plan.config.mode in ("meta", "first_order")
        if reason is None and updates and not any(report.update_norms):
            reason = "the inner loop changed no fast weight in any chunk"
        if reason is None and any(not math.isfinite(norm) for norm in report.update_norms):
            reason = "an inner update is not finite"
        if reason is not None:
            step = module.ledger.spent(module.plan.name).optimizer_steps
            end_diverged(trainer, module, f"stage {module.plan.name}, step {step}: {reason}")

    def state_dict(self) -> dict[str, Any]:
        return self.detector.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.detector.load_state_dict(state)
