"""The progress bar: which stage is running, the loss of the last optimiser step, and how long the stage still takes."""

from __future__ import annotations

import sys

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from ttt_lit.train.module import TTTModule


class StageProgressBar(TQDMProgressBar):
    """One bar a stage, with a time estimate where the stage's length is known.

    Args:
        refresh_rate: micro-batches between two refreshes. null: each on a terminal, every 25th in a log file.
    """

    def __init__(self, refresh_rate: int | None = None) -> None:
        if refresh_rate is None:
            refresh_rate = 1 if sys.stdout.isatty() else 25
        super().__init__(refresh_rate=refresh_rate, leave=True)

    def on_train_epoch_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        super().on_train_epoch_start(trainer, module)
        plan = module.plans[trainer.current_epoch]
        bar: Tqdm = self.train_progress_bar
        bar.set_description(f"stage {plan.name} ({plan.config.mode}, {plan.context} tokens)")

    def get_metrics(self, trainer: L.Trainer, module: TTTModule) -> dict[str, int | str | float | dict[str, float]]:  # type: ignore[override]
        """The loss alone: the run's folder name is no version."""
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return metrics
