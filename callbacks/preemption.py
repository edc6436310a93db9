"""A run that is told to go saves first: Ctrl-C, SIGTERM, or SIGUSR2 as a cluster's warning, end it at the next optimiser step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ttt_lit.data.stream import STOP_SIGNALS
from ttt_lit.train.module import TTTModule
from ttt_lit.train.resume import ResumeWriter

_PATIENCE = b"\nsaving at the next optimiser step, then stopping (Ctrl-C again stops at once, without a save)\n"

_CLUSTER_JOB = "SUBMITIT_EXECUTOR"
"""Set in every job of submitit."""

_REQUEUED = "requeued-{step}"
"""Empty file in the run's folder: rank 0 is done with putting the job back. A run is stopped at most once at a step."""

# submitit gives scontrol 60 seconds; the cluster ends the job 300 seconds after its warning, the time for saving included.
REQUEUE_SECONDS = 90.0
_LOOK_SECONDS = 0.1


class Preemption(L.Callback):
    """Has a resume file written and ends the run as ``interrupted``. Stands behind every callback that writes.

    A handler here only notes the signal. Ranks agree at optimiser boundaries, where one that was told tells all: a save needs every
    rank, and any other moment loses a partial gradient. Lightning's handler for SIGTERM communicates from inside the handler and stops
    between micro-batches, so it is replaced while the run trains. A second Ctrl-C ends the run at once, without a save.

    In a job of a cluster SIGTERM comes ahead of the warning, or of the end: the run saves and trains on. The handler that SIGUSR2 had
    before, submitit's, which puts the job back into the queue, is called on rank 0 once the run is saved and recorded, whichever rank
    was warned. The other ranks stay until it has returned: srun may end a job, rank 0 included, when one of its tasks leaves.
    """

    def __init__(self) -> None:
        self._save_asked = self._stop_asked = self._warned = False
        self._must_requeue = False
        """What all ranks agreed on: one of them was warned."""
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self._save_asked = self._stop_asked = self._warned = self._must_requeue = False
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            # A shell has what it puts into the background ignore Ctrl-C, which means other processes.
            heard = (each for each in STOP_SIGNALS if each != signal.SIGINT or signal.getsignal(each) != signal.SIG_IGN)
            self._before = {number: signal.signal(number, self._note) for number in heard}
        if trainer.is_global_zero:
            for old in Path(trainer.default_root_dir).glob(_REQUEUED.format(step="*")):
                old.unlink()

    def on_train_batch_end(self, trainer: L.Trainer, module: TTTModule, *_: Any) -> None:  # type: ignore[override]
        # As for StageCheckpoint: a stage whose time is over is saved at its end.
        if trainer.is_last_batch or not module.at_boundary or module.is_spent(module.plan):
            return
        if not _any_rank(trainer, self._save_asked):
            return
        self._save_asked = False
        for owner in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(owner, ResumeWriter):
                owner.save(trainer, module)
        if self._must_stop(trainer):
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        """StageCheckpoint has saved the end of the stage; a run that is complete ends as finished."""
        if self._must_stop(trainer) and trainer.current_epoch + 1 < len(module.plans):
            raise SIGTERMException

    def on_exception(self, trainer: L.Trainer, module: TTTModule, exception: BaseException) -> None:  # type: ignore[override]
        requeue = self._before.get(signal.SIGUSR2)
        self._restore()
        if self._must_requeue and isinstance(exception, SIGTERMException) and callable(requeue):
            _requeue(trainer, requeue)

    def on_train_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self._restore()

    def _must_stop(self, trainer: L.Trainer) -> bool:
        """Whether one rank was told to; then all know whether one was warned."""
        if not _any_rank(trainer, self._stop_asked):
            return False
        self._must_requeue = _any_rank(trainer, self._warned)
        return True

    def _note(self, number: int, _: object) -> None:
        self._warned = self._warned or number == signal.SIGUSR2
        is_final = self._warned or number == signal.SIGINT or _CLUSTER_JOB not in os.environ
        self._stop_asked = self._stop_asked or is_final
        self._save_asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT] or signal.default_int_handler)
            os.write(2, _PATIENCE)  # a handler may interrupt a print, and must not print itself

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # one that was not set from Python cannot be set again
                signal.signal(number, handler)
        self._before = {}


def _any_rank(trainer: L.Trainer, told: bool) -> bool:
    return bool(trainer.strategy.reduce_boolean_decision(told, all=False))


def _requeue(trainer: L.Trainer, handler: Callable[[int, Any], Any]) -> None:
    """Call the cluster's handler on rank 0, where alone it puts the job back; it may end the process. The others wait for it."""
    done = Path(trainer.default_root_dir) / _REQUEUED.format(step=trainer.global_step)
    if trainer.is_global_zero:
        try:
            handler(signal.SIGUSR2, None)
        finally:
            done.touch()
        return
    deadline = time.monotonic() + REQUEUE_SECONDS
    while not done.exists() and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
