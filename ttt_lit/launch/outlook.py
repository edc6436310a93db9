"""How far a matrix is as a whole, and how long it may still take."""

from __future__ import annotations

from ttt_lit.launch.loop import Board
from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.launch.progress import Progress
from ttt_lit.launch.schedule import ACTIVE


def seconds_left(board: Board) -> float | None:
    """Wall-clock time until the last run ends, if as many run at a time as now. None while that cannot be known.

    A run that has not begun is expected to take as long as those that have, on average.
    """
    going = [run for run in board.runs if board.states[run.name] in ACTIVE]
    to_come = sum(board.states[run.name] == "waiting" for run in board.runs)
    seen = [run for run in board.runs if board.states[run.name] == "finished"] + going
    whole = [seconds for run in seen if (seconds := _whole(run)) is not None]
    if not going or not whole:
        return None
    mean = sum(whole) / len(whole)
    left = [mean if (rest := _left(run)) is None else rest for run in going]
    return max(*left, (sum(left) + to_come * mean) / len(going))


def _whole(run: PlannedRun) -> float | None:
    """Compute seconds from a run's beginning to its end."""
    progress = Progress.read(run.folder)
    if progress is None or not progress.fraction or not progress.gpu_seconds:
        return None
    return progress.gpu_seconds / progress.devices / progress.fraction


def _left(run: PlannedRun) -> float | None:
    progress = Progress.read(run.folder)
    return None if progress is None else progress.remaining_seconds
