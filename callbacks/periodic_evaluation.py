"""Measures a fixed held-out subset while a stage runs: the series behind GPU-hours to a target loss."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from ttt_lit import metrics
from ttt_lit.metrics import Inner
from ttt_lit.record.measured import EvaluationPoint
from ttt_lit.train.divergence import stop_unless_finite
from ttt_lit.train.module import TTTModule


class PeriodicEvaluation(L.Callback):
    """Every ``validation.every_share`` of a stage's budget, in the stages ``validation.during``, at optimiser-step boundaries.

    Its time is booked on the validation account.
    """

    def __init__(self) -> None:
        self.done: dict[str, int] = {}
        """Stage name → how many shares have been measured."""

    def on_train_batch_end(self, trainer: L.Trainer, module: TTTModule, *_: Any) -> None:  # type: ignore[override]
        config, name = module.validation, module.plan.name
        if name not in config.during or not config.every_share or not module.at_boundary:
            return
        share = module.spent_fraction()
        due = int(share / config.every_share + 1e-9)
        if share >= 1 or due <= self.done.get(name, 0):  # the end of a stage is measured in full
            return
        self.done[name] = due
        with module.ledger.account("validation"):
            losses = self._measure(trainer, module)
        what = f"evaluation loss of stage {name} after {module.ledger.total().tokens} tokens"
        stop_unless_finite(trainer, module, what, context=module.size.long, losses=losses)

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, module: TTTModule) -> dict[Inner, float]:
        evaluation = module.new_evaluation().to(module.device)
        request = module.validation_request(module.validation.subset)
        for batch in module.datamodule.open(request, rank=trainer.global_rank, world_size=trainer.world_size):
            with trainer.precision_plugin.val_step_context():
                module.measure(batch, evaluation)
        losses = {inner: result.nats_per_token for inner, result in evaluation.compute().items()}
        total = module.ledger.total()
        module.history.evaluations.append(
            EvaluationPoint(
                stage=module.plan.name,
                tokens=total.tokens,
                gpu_seconds=total.gpu_seconds["compute"],
                inner_on=losses.get("on"),
                inner_off=losses.get("off"),
            )
        )
        if trainer.is_global_zero and trainer.logger is not None:
            for inner, loss in losses.items():
                name = metrics.val_loss(inner)
                trainer.logger.log_metrics({metrics.on_tokens_axis(name): loss}, step=total.tokens)
                step = metrics.gpu_hours_step(total.gpu_seconds["compute"])
                trainer.logger.log_metrics({metrics.on_gpu_hours_axis(name): loss}, step=step)
        return losses

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
