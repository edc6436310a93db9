"""Which records are meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ttt_lit.record.schema import RECORD_NAME, RunRecord


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was read, and what could not be."""

    records: list[RunRecord]
    unreadable: list[str]
    """One sentence per broken record of a folder of many runs, each with its path."""


def read_records(runs: Sequence[str]) -> Collected:
    """The records of some runs, each once, in the given order and by path within a folder.

    A broken record in a folder of many runs does not end the report of the others; one that was named itself does.

    Parameters:
        runs: record files, run folders, or folders of many runs: without a record of their own, every record below counts.

    Raises:
        FileNotFoundError, ValueError: a record that was named is missing or broken, or none of a folder can be read; in one line that
            names the file.
    """
    if not runs:
        raise ValueError("report: got no run, expected at least one run folder, as in: report runs/EXPERIMENT/ID")
    named = {path.resolve() for path in map(Path, runs) if not _holds_many(path) for path in _records_of(path)}
    paths = {path.resolve(): path for run in runs for path in _records_of(Path(run))}
    records, broken = [], []
    for resolved, path in paths.items():
        try:
            records.append(RunRecord.read(path))
        except (ValueError, OSError) as error:
            if resolved in named:
                raise
            broken.append(error)
    if not records:
        raise broken[0]
    return Collected(records=records, unreadable=[f"left out: {error}" for error in broken])


def _holds_many(run: Path) -> bool:
    return run.is_dir() and not (run / RECORD_NAME).is_file()


def _records_of(run: Path) -> list[Path]:
    if not _holds_many(run):
        return [run / RECORD_NAME if run.is_dir() else run]
    below = sorted(run.rglob(RECORD_NAME))
    if not below:
        raise FileNotFoundError(
            f"{run}: got a folder without a run record, expected {RECORD_NAME} in it or below it, as fit writes it"
        )
    return below
