"""Where a run's files are, and whether it can go on. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path

POINTER = "last.json"


def checkpoints_folder(run: str | Path) -> Path:
    folder = Path(run) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def resume_file(run: str | Path) -> Path | None:
    """The file or folder from which a run goes on, or None. FileNotFoundError if the run points to one that is gone."""
    pointer = Path(run) / "checkpoints" / POINTER
    if not pointer.is_file():
        return None
    path = pointer.parent / json.loads(pointer.read_text(encoding="utf-8"))["path"]
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: the run points to this resume file, which is missing; start a run with another run.id"
        )
    return path
