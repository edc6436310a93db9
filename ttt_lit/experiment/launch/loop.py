"""The launcher's loop: starts what may start, watches what runs, until nothing is left that could go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ttt_lit.experiment.launch.folder import keep_budget, last_error, matched_budget, recorded
from ttt_lit.experiment.launch.schedule import ACTIVE, State, blocking, ready, with_blocked
from ttt_lit.experiment.matrix import PlannedRun


class Backend(Protocol):
    """Where runs are executed."""

    def adopt(self, run: PlannedRun) -> bool:
        """Whether the run is being executed already, by an earlier launcher or by hand; from now on it is asked for its state."""
        ...

    def start(self, run: PlannedRun, arguments: Sequence[str]) -> None:
        """Begin to execute ``fit`` with these arguments; returns at once."""
        ...

    def state(self, run: PlannedRun) -> State | None:
        """``queued`` or ``running``; None once it has ended."""
        ...

    def exit_status(self, run: PlannedRun) -> int | None:
        """Of a run that has ended; None where only the record tells."""
        ...

    def stop(self) -> None:
        """End what was started here; returns when it has ended. Harmless twice."""
        ...

    @property
    def stops_with_launcher(self) -> bool:
        """Whether the runs end when the launcher is stopped."""
        ...


@dataclass
class Board:
    """The runs of a matrix and what is known about each."""

    runs: Sequence[PlannedRun]
    states: dict[str, State] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a run did not finish."""

    @property
    def is_finished(self) -> bool:
        return all(state == "finished" for state in self.states.values())


View = Callable[[Board], None]
"""Shows the board; called after every look at the runs."""


def launch(
    runs: Sequence[PlannedRun], backend: Backend, view: View, *, slots: int | None, poll_seconds: float = 1.0
) -> Board:
    """Execute every run that is not finished, parents first; one that breaks stops only its children.

    Args:
        slots: runs at a time; None: as many as may start.
    """
    board = Board(runs=runs)
    for run in runs:
        _first_look(run, board, backend)
    while True:
        for run in runs:
            if board.states[run.name] in ACTIVE:
                _look_again(run, board, backend)
        board.states = with_blocked(runs, board.states)
        for run in ready(runs, board.states, slots):
            _start(run, board, backend)
        board.states = with_blocked(runs, board.states)
        board.reasons |= _blocked_reasons(runs, board.states)
        view(board)
        active = any(state in ACTIVE for state in board.states.values())
        if not active and not ready(runs, board.states, slots):
            return board
        if active:
            time.sleep(poll_seconds)


def _first_look(run: PlannedRun, board: Board, backend: Backend) -> None:
    found = recorded(run.folder)
    status = None if found is None else found.status
    if status == "finished":
        board.states[run.name] = "finished"
    elif backend.adopt(run):
        board.states[run.name] = "running"
    elif status == "diverged":
        _end(run, board, "diverged", found.reason if found else None)
    else:  # new, or cut off: the same command continues it
        board.states[run.name] = "waiting"


def _look_again(run: PlannedRun, board: Board, backend: Backend) -> None:
    state = backend.state(run)
    if state is not None:
        board.states[run.name] = state
    elif backend.adopt(run):  # ours was refused because another process trains it
        board.states[run.name] = "running"
    else:
        _end(run, board, *_outcome(run, backend.exit_status(run)))


def _outcome(run: PlannedRun, status: int | None) -> tuple[State, str | None]:
    """How a run ended, from its record and, where there is one, the exit status of its process."""
    found = recorded(run.folder)
    said = None if found is None else found.status
    reason = None if found is None else found.reason
    if said == "finished" and not status:
        return "finished", None
    if said == "diverged":
        return "diverged", reason
    if said == "interrupted" and status in (None, 130, 143, -2, -15):
        return "interrupted", reason
    if status == 0:
        return "failed", f"fit ended without an error, but the record says {said or 'nothing'}"
    ended = "it ended without a record" if status is None else f"exit status {status}"
    return "failed", last_error(run.folder) or (reason if said == "failed" else ended)


def _start(run: PlannedRun, board: Board, backend: Backend) -> None:
    try:
        hours = None
        if run.gpu_hours is not None:
            baseline = next(other for other in board.runs if other.name == run.gpu_hours.of)
            hours = matched_budget(run.folder, baseline.folder, run.gpu_hours.share)
            keep_budget(run.folder, hours)
        backend.start(run, run.with_budget(hours))
    except (ValueError, OSError) as error:
        _end(run, board, "failed", " ".join(str(error).split()))
    else:
        board.states[run.name] = backend.state(run) or "running"


def _end(run: PlannedRun, board: Board, state: State, reason: str | None) -> None:
    board.states[run.name] = state
    if reason:
        board.reasons[run.name] = reason


def _blocked_reasons(runs: Sequence[PlannedRun], states: Mapping[str, State]) -> dict[str, str]:
    return {run.name: f"needs {', '.join(blocking(run, states))}" for run in runs if states[run.name] == "blocked"}
