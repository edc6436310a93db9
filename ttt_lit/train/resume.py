"""Where a run's files are, and whether it can go on. Standard library only."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

POINTER = "last.json"


class ResumeWriter(ABC):
    """The callback of a run that writes its resume files; others ask it for one."""

    @abstractmethod
    def save(self, trainer: Any, module: Any) -> None:
        """Write what the run needs to go on, unless this start has done so at this very step. At an optimiser boundary, on all ranks."""


def checkpoints_folder(run: str | Path) -> Path:
    folder = Path(run) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def resume_file(run: str | Path) -> Path | None:
    """The file or folder from which a run goes on, or None. FileNotFoundError if the run points to one that is gone, ValueError if it
    points nowhere."""
    pointer = Path(run) / "checkpoints" / POINTER
    if not pointer.is_file():
        return None
    try:
        path = pointer.parent / json.loads(pointer.read_text(encoding="utf-8"))["path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{pointer}: damaged, expected {{"path": NAME}} with the name of the newest resume file beside it; write it, or start a run '
            "with another run.id"
        ) from error
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: the run points to this resume file, which is missing; start a run with another run.id"
        )
    return path
