"""Writes what a run needs to go on, and our checkpoint of the model at every stage end.

Resume files are written only at optimiser boundaries that are not a stage's last, and after a stage's end: any other moment loses a
partial gradient or the hooks of the next stage.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file

from ttt_lit.checkpoint.receipt import LineageStep
from ttt_lit.checkpoint.store import save_checkpoint
from ttt_lit.record.codec import write_atomic
from ttt_lit.train.module import TTTModule
from ttt_lit.train.parallel import gather
from ttt_lit.train.resume import POINTER, ResumeWriter, checkpoints_folder
from ttt_lit.train.start import optimizer_file


class StageCheckpoint(L.Callback, ResumeWriter):
    """Saves to ``checkpoints/`` of the run's folder.

    Args:
        every_seconds: wall-clock time between two resume files.
        optimizer: also write the optimiser's state beside each stage's checkpoint, for ``load: all``.
    """

    def __init__(self, every_seconds: float = 600.0, optimizer: bool = True) -> None:
        if every_seconds < 0:
            raise ValueError(f"StageCheckpoint.every_seconds: got {every_seconds}, expected at least 0")
        self.every_seconds, self.optimizer = every_seconds, optimizer
        self._last = 0.0
        self._saved: int | None = None

    def on_train_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self._last, self._saved = time.monotonic(), None

    def on_train_batch_end(self, trainer: L.Trainer, module: TTTModule, *_: Any) -> None:  # type: ignore[override]
        # A stage whose time is over is saved at its end, with its validation; resumed here it would have nothing left to train.
        if trainer.is_last_batch or not module.at_boundary or module.is_spent(module.plan):
            return
        if trainer.strategy.broadcast(time.monotonic() - self._last >= self.every_seconds):
            self.save(trainer, module)

    def on_train_epoch_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        with module.ledger.account("checkpoint"):
            self._export(trainer, module)
        self.save(trainer, module)

    def save(self, trainer: L.Trainer, module: TTTModule) -> None:
        """Write what the run needs to go on, at an optimiser boundary (a collective call). Once a step: a second call does nothing."""
        if self._saved == trainer.global_step:
            return
        folder = checkpoints_folder(trainer.default_root_dir)
        path = folder / f"resume-{trainer.global_step}.ckpt"
        with module.ledger.account("checkpoint"):
            trainer.save_checkpoint(path, weights_only=False)
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                _point_to(folder, path)
        self._last, self._saved = time.monotonic(), trainer.global_step

    def _export(self, trainer: L.Trainer, module: TTTModule) -> None:
        """Our checkpoint of the stage's model, full tensors, written by rank 0."""
        path = checkpoints_folder(trainer.default_root_dir) / module.plan.name
        state = dict(gather(dict(module.model.decoder.named_parameters())))
        moments = self._moments(module) if self.optimizer else {}
        if trainer.is_global_zero:
            if path.exists():
                shutil.rmtree(path)  # the stage was repeated after an interruption
            origin, total = module.start.origin, module.ledger.total()
            step = LineageStep(
                operation="fit",
                source=Path(module.start_config.init_from).name,
                source_hash=origin.weights_hash,
                parameters={
                    "experiment": module.run.experiment,
                    "run": module.run.id,
                    "stage": module.plan.name,
                    # What the weights have cost so far: a run that starts from them counts its parents.
                    "gpu_seconds": round(total.gpu_seconds["compute"], 3),
                    "tokens": total.tokens,
                    # An export claims at least as many positions.
                    "context": max(plan.context for plan in module.plans[: module.entered + 1]),
                    # The checkpoint's windows are the stage's; a run that starts from it derives its own stages from these.
                    "imported_windows": [layer.window for layer in module.start.spec.layers],
                },
            )
            save_checkpoint(
                path,
                # All TTT layers, also where the stage updated only some: which ones is a later stage's choice.
                spec=module.stage_spec(module.plan).with_fast_layers_of(module.start.spec),
                state=state,
                family=origin.family,
                receipt=module.start.receipt,
                lineage=(*origin.lineage, step),
                source_config=origin.source_config,
                generation_config=origin.generation_config,
                tokenizer=origin.tokenizer,
            )
            if moments:
                save_file(moments, optimizer_file(path))
        trainer.strategy.barrier()

    def _moments(self, module: TTTModule) -> dict[str, torch.Tensor]:
        states = module.optimizers().optimizer.state  # type: ignore[union-attr]
        named = {
            f"{name}.{part}": value
            for name, parameter in module.model.decoder.named_parameters()
            for part, value in states[parameter].items()
        }
        return dict(gather(named))


def _point_to(folder: Path, path: Path) -> None:
    """Make ``path`` the one to resume from, in one step, then drop the older ones."""
    write_atomic(folder / POINTER, json.dumps({"path": path.name}) + "\n")
    for old in folder.glob("resume-*.ckpt"):
        if old != path:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
