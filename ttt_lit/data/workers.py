"""Processes that read ahead outlive the signals that ask a run to stop, for it still needs batches on the way to its next save."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""What a launcher, a cluster (SIGUSR2 is its warning) or a terminal sends to a run and all its workers at once, and that is the run's
alone to handle: it saves at its next optimiser step."""

_LOOK_SECONDS = 0.5


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """To start workers in: they are born holding the signals, so there is no moment in which one ends them. This thread gets its own
    afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def live_as_long_as(run: int, _worker: int) -> None:
    """A DataLoader's ``worker_init_fn``: hold the signals for good, and end when process ``run`` says so or is gone.

    To ignore SIGTERM would be too much: by that signal the run ends workers that it has not closed, and then waits for them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with, args=(run, os.getppid()), daemon=True).start()


def _end_with(run: int, parent: int) -> None:
    """The parent is the run itself, or the fork server, which ends with it."""
    # A worker has a copy of the run's lock: as long as it lives, no other start gets the run, and it may be waiting for a disk.
    while os.getppid() == parent:
        told = signal.sigtimedwait(STOP_SIGNALS, _LOOK_SECONDS)
        if told is not None and told.si_signo == signal.SIGTERM and told.si_pid == run:
            break
    os._exit(0)
