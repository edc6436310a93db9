"""Reports validation by token position at every stage end: scalars, the whole curve as an array, and a picture."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from ttt_lit import metrics
from ttt_lit.metrics import Inner, position_buckets
from ttt_lit.report.curves import stages_figure
from ttt_lit.report.drawing import save_figure
from ttt_lit.train.divergence import stop_unless_finite
from ttt_lit.train.evaluation import validation
from ttt_lit.train.module import TTTModule
from ttt_lit.train.position import PositionResult, bucket_means


class PositionLossLogger(L.Callback):
    """Writes ``curves/STAGE_on.npy`` and ``curves/STAGE_off.npy`` (nats per token at each position) and ``position_loss.png``."""

    def on_train_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_custom_scalars(metrics.custom_scalars_layout())

    def on_validation_epoch_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        results = module.evaluation.compute()
        stage = module.history.stage(module.plan.name)
        stage.validations = [
            validation(inner, result, curve=f"curves/{module.plan.name}_{inner}.npy")
            for inner, result in results.items()
        ]
        if trainer.is_global_zero:
            self._show(trainer, module, results)
        what, losses = f"validation loss of stage {module.plan.name}", {i: r.nats_per_token for i, r in results.items()}
        stop_unless_finite(trainer, module, what, context=module.size.long, losses=losses)

    def _show(self, trainer: L.Trainer, module: TTTModule, results: dict[Inner, PositionResult]) -> None:
        folder = Path(trainer.default_root_dir) / "curves"
        folder.mkdir(parents=True, exist_ok=True)
        for inner, result in results.items():
            np.save(folder / f"{module.plan.name}_{inner}.npy", result.curve.numpy())
            self._log(trainer, inner, result)
        self._picture(Path(trainer.default_root_dir), module)

    def _log(self, trainer: L.Trainer, inner: Inner, result: PositionResult) -> None:
        if trainer.logger is None:
            return
        values = {
            metrics.val_loss(inner): result.nats_per_token,
            metrics.val_bits_per_byte(inner): result.bits_per_byte,
        }
        buckets = position_buckets(len(result.curve))
        for bucket, mean in zip(buckets, bucket_means(result.curve, buckets), strict=True):
            values[metrics.position_loss(bucket, inner)] = mean
        trainer.logger.log_metrics(values, step=trainer.global_step)

    def _picture(self, run: Path, module: TTTModule) -> None:
        """One line per stage so far, so that a resumed run shows all of them."""
        history, windows = module.history.stages, {plan.window for plan in module.plans if plan.window is not None}
        measured = {plan.name: history[plan.name].validations for plan in module.plans if plan.name in history}
        save_figure(stages_figure(measured, window=windows.pop() if len(windows) == 1 else None), run / "position_loss")
