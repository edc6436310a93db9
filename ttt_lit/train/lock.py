"""Who trains a run: a lock on ``run.lock`` in the run's folder, held as long as the process lives.

The operating system drops it with the process, however that ends, so no stale lock is left behind. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

LOCK_NAME = "run.lock"

# Looking whether a lock is held takes it for a moment; whoever meets that moment tries again.
_ATTEMPTS, _PAUSE_SECONDS = 5, 0.05


class RunLock:
    """Exclusive right to train a run. ``acquire`` in the process that trains it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file: IO[str] | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """RuntimeError naming the process that holds the lock."""
        for attempt in range(_ATTEMPTS):
            self._make_folder()
            try:
                file = (self.folder / LOCK_NAME).open("a+", encoding="utf-8")
            except FileNotFoundError:  # the last holder has just removed the folder that it had made
                continue
            if _lock(file, fcntl.LOCK_EX) and _is_current(file, self.folder / LOCK_NAME):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                self._file = file
                return
            file.close()
            if attempt + 1 < _ATTEMPTS:
                time.sleep(_PAUSE_SECONDS)
        raise RuntimeError(
            f"{self.folder}: this run is being trained by {holder(self.folder) or 'another process'}; wait for it, or stop it first"
        )

    def release(self) -> None:
        """Harmless when it is not held. Folders that ``acquire`` has made and that are still empty go too."""
        if self._file is None:
            return
        (self.folder / LOCK_NAME).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or somebody else has removed it
            for folder in self._made:
                folder.rmdir()
        self._file.close()
        self._file, self._made = None, []

    def _make_folder(self) -> None:
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = made or self._made


def holder(folder: str | Path) -> str | None:
    """The live process that trains the run of this folder, in words; None: nobody does."""
    try:
        with (Path(folder) / LOCK_NAME).open("r", encoding="utf-8") as file:
            return None if _lock(file, fcntl.LOCK_SH) else file.read().strip() or "another process"
    except FileNotFoundError:
        return None


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(file: IO[str], path: Path) -> bool:
    """Whether the locked file is the one with that name: its last holder may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
