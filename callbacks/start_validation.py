"""Measures the start checkpoint, as it came: on the blocks that every stage end is measured on, which a control must not be worse on, and
on those that damage is measured on, if it is an imported model."""

from __future__ import annotations

import lightning as L
import torch

from ttt_lit.model.spec import Mode
from ttt_lit.record.measured import Validation
from ttt_lit.train.damage import position_curves
from ttt_lit.train.divergence import stop_unless_finite
from ttt_lit.train.evaluation import validation
from ttt_lit.train.module import TTTModule


class StartValidation(L.Callback):
    """Once per run, before the first stage is entered; runs from random weights have nothing to measure. Booked as validation."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        if module.entered >= 0 or module.start.origin.checkpoint is None:
            return
        module.model.decoder.set_spec(module.start.stored)
        # Prime MLPs that came with the checkpoint belong to it; those that this run adds do not.
        mode: Mode = "static" if module.came_with_prime else "none"
        with module.ledger.account("validation"):
            entry = module.history.start_validation = self._measure(trainer, module, mode)
            losses = {entry.inner: entry.nats_per_token}
            stop_unless_finite(trainer, module, "start validation loss", context=entry.context, losses=losses)
            for context in module.damage_contexts:
                curve = position_curves(trainer, module, context, {"off": "none"})["off"]
                losses, tokens = {"off": float(curve.mean())}, len(curve)
                stop_unless_finite(trainer, module, "start validation loss", context=tokens, losses=losses)
                module.history.imported[context] = curve.tolist()

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, module: TTTModule, mode: Mode) -> Validation:
        evaluation = module.new_evaluation().to(module.device)
        request = module.validation_request()
        for batch in module.datamodule.open(request, rank=trainer.global_rank, world_size=trainer.world_size):
            tokens = batch["tokens"].to(module.device)
            with trainer.precision_plugin.val_step_context():
                nll = module.read(tokens, mode=mode, inner_lr=0.0).token_nll
            module.add_losses(evaluation, {"off": nll}, batch)
        return validation("off", evaluation.metrics["off"].compute())  # type: ignore[operator]
