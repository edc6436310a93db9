"""A run that is told to go saves first: SIGTERM, or SIGUSR2 as a cluster's warning, ends it at the next optimiser step."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ttt_lit.train.module import TTTModule
from ttt_lit.train.resume import resume_file

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

_CLUSTER_JOB = "SUBMITIT_EXECUTOR"
"""Set in every job of submitit."""


class Preemption(L.Callback):
    """Writes a resume file through StageCheckpoint and ends the run as ``interrupted``. Stands behind every callback that writes.

    A handler here only notes the signal. Ranks agree at optimiser boundaries, where one that was told tells all: a save needs every
    rank, and any other moment loses a partial gradient. Lightning's handler for SIGTERM communicates from inside the handler and stops
    between micro-batches, so it is replaced while the run trains.

    In a job of a cluster SIGTERM comes ahead of the warning, or of the end: the run saves and trains on. The handler that SIGUSR2 had
    before, submitit's, which puts the job back into the queue, is called once the run is saved and recorded.
    """

    def __init__(self) -> None:
        self._save_asked = self._stop_asked = False
        self._warned = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self._save_asked = self._stop_asked = self._warned = False
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_train_batch_end(self, trainer: L.Trainer, module: TTTModule, *_: Any) -> None:  # type: ignore[override]
        # As for StageCheckpoint: a stage whose time is over is saved at its end.
        if trainer.is_last_batch or not module.at_boundary or module.is_spent(module.plan):
            return
        if not _any_rank(trainer, self._save_asked):
            return
        self._save_asked = False
        _save(trainer, module)
        if _any_rank(trainer, self._stop_asked):
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        """StageCheckpoint has saved the end of the stage; a run that is complete ends as finished."""
        if _any_rank(trainer, self._stop_asked) and trainer.current_epoch + 1 < len(module.plans):
            raise SIGTERMException

    def on_exception(self, trainer: L.Trainer, module: TTTModule, exception: BaseException) -> None:  # type: ignore[override]
        requeue = self._before.get(signal.SIGUSR2)
        self._restore()
        if self._warned and isinstance(exception, SIGTERMException) and callable(requeue):
            requeue(signal.SIGUSR2, None)

    def on_train_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self._restore()

    def _note(self, number: int, _: object) -> None:
        self._warned = self._warned or number == signal.SIGUSR2
        self._stop_asked = self._stop_asked or self._warned or _CLUSTER_JOB not in os.environ
        self._save_asked = True

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # one that was not set from Python cannot be set again
                signal.signal(number, handler)
        self._before = {}


def _any_rank(trainer: L.Trainer, told: bool) -> bool:
    return bool(trainer.strategy.reduce_boolean_decision(told, all=False))


def _save(trainer: L.Trainer, module: TTTModule) -> None:
    """Unless StageCheckpoint has just done so at this very step."""
    last = resume_file(trainer.default_root_dir)
    known = last is not None and last.name == f"resume-{trainer.global_step}.ckpt"
    if trainer.strategy.broadcast(known):
        return
    owner = next(one for one in trainer.callbacks if type(one).__name__ == "StageCheckpoint")  # type: ignore[attr-defined]
    owner.save(trainer, module)
