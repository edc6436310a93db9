"""Tells TensorBoard's HPARAMS page what a run was and how it ended, so that the arms of a matrix stand in one table."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from ttt_lit import metrics
from ttt_lit.train.module import TTTModule


class Hyperparameters(L.Callback):
    """Writes once, at the end of a run: settings that tell arms apart, and the numbers that they are compared by."""

    def on_fit_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        results = module.history.stage(module.plans[-1].name).validations
        final = [entry for entry in results if entry.inner == module.headline]
        if not trainer.is_global_zero or not isinstance(trainer.logger, TensorBoardLogger) or not final:
            return
        values = {
            metrics.FINAL_LOSS: final[0].nats_per_token,
            metrics.FINAL_BITS_PER_BYTE: final[0].bits_per_byte,
            metrics.FINAL_GPU_HOURS: module.ledger.total().gpu_seconds["compute"] / 3600,
        }
        # "." keeps them in the run's own folder: any other name would be a run of its own beside it.
        trainer.logger.experiment.add_hparams(_settings(module), values, run_name=".")


def _settings(module: TTTModule) -> dict[str, str | float | int]:
    start, run = module.start, module.run
    return {
        "experiment": run.experiment,
        "role": run.role or "",
        "variant": run.variant,
        "budget": "tokens" if run.share is None else f"{run.share:g} of the baseline's GPU-hours",
        "seed": module.start_config.seed,
        "family": start.origin.family,
        "init": module.start_config.init,
        "ttt_layers": " ".join(map(str, start.spec.ttt_layers)),
        "stages": " ".join(f"{plan.name}:{plan.config.mode}" for plan in module.plans),
        "lr": module.plans[-1].config.lr,
        "new_lr": module.plans[-1].config.peak_lr("prime"),
        "inner_lr": module.inner.lr,
    }
