"""Which records are meant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ttt_lit.experiment.record import RECORD_NAME, RunRecord


def read_records(runs: Sequence[str]) -> list[RunRecord]:
    """The records of some runs, each once, in the given order and by path within a folder.

    Parameters:
        runs: record files, run folders, or folders of many runs: without a record of their own, every record below counts.

    Raises:
        FileNotFoundError, ValueError: a missing or broken record, in one line that names the file.
    """
    if not runs:
        raise ValueError("report: got no run, expected at least one run folder, as in: report runs/EXPERIMENT/ID")
    paths = {path.resolve(): path for run in runs for path in _records_of(Path(run))}
    return [RunRecord.read(path) for path in paths.values()]


def _records_of(run: Path) -> list[Path]:
    if not run.is_dir() or (run / RECORD_NAME).is_file():
        return [run / RECORD_NAME if run.is_dir() else run]
    below = sorted(run.rglob(RECORD_NAME))
    if not below:
        raise FileNotFoundError(
            f"{run}: got a folder without a run record, expected {RECORD_NAME} in it or below it, as fit writes it"
        )
    return below
