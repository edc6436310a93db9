"""The launcher's loop: starts what may start, watches what runs, until nothing is left that could go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from ttt_lit.launch.folder import Recorded, keep_budget, matched_budget, recorded
from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.launch.schedule import ACTIVE, State, blocking, ready, with_blocked


class BackendError(RuntimeError):
    """A backend could not do what it was asked for one run; the others are not concerned."""


# What concerns one run only: its files cannot be read or written, its settings do not fit, its backend refuses.
_OF_ONE_RUN = (ValueError, OSError, BackendError)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What a backend knows of a run that has ended."""

    exit_status: int | None = None
    """None where only the record tells."""
    since: float | None = None
    """When it was handed over, on the clock of the record's file; a record from before says nothing about how it ended."""
    log: str | None = None
    """The line of its log that explains the end."""


class Backend(Protocol):
    """Where runs are executed. Every method that takes a run may raise BackendError."""

    def adopt(self, run: PlannedRun) -> bool:
        """Whether the run is being executed already, by an earlier launcher or by hand; from now on it is asked for its state."""
        ...

    def room(self) -> int | None:
        """How many more runs may be started now; None: any number."""
        ...

    def start(self, run: PlannedRun, arguments: Sequence[str]) -> None:
        """Begin to execute ``fit`` with these arguments; returns at once."""
        ...

    def state(self, run: PlannedRun) -> State | None:
        """``queued`` or ``running``; None once it has ended."""
        ...

    def ending(self, run: PlannedRun) -> Ending:
        """Of a run that has ended."""
        ...

    def stop(self) -> list[str]:
        """End what was started here; returns when it has ended. Harmless twice. Names the runs that go on: others began them."""
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
        with _failing_alone(run, board):
            _first_look(run, board, backend)
    while True:
        for run in runs:
            if board.states[run.name] in ACTIVE:
                with _failing_alone(run, board):
                    _look_again(run, board, backend)
        board.states = with_blocked(runs, board.states)
        for run in ready(runs, board.states, slots)[: backend.room()]:
            with _failing_alone(run, board):
                _start(run, board, backend)
        board.states = with_blocked(runs, board.states)
        board.reasons |= _blocked_reasons(runs, board.states)
        view(board)
        active = any(state in ACTIVE for state in board.states.values())
        if not active and not ready(runs, board.states, slots):
            return board
        time.sleep(poll_seconds)


@contextmanager
def _failing_alone(run: PlannedRun, board: Board) -> Iterator[None]:
    """An error of one run is its end and nobody else's."""
    try:
        yield
    except _OF_ONE_RUN as error:
        _end(run, board, "failed", " ".join(str(error).split()))


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
        _end(run, board, *_outcome(recorded(run.folder), backend.ending(run)))


def _outcome(found: Recorded | None, ending: Ending) -> tuple[State, str | None]:
    """How a run ended, from its record and what its backend knows."""
    said, reason = (None, None) if found is None else (found.status, found.reason)
    if said == "finished":  # however the process ended after that: a later start would skip it
        return "finished", None
    if said == "diverged":
        return "diverged", reason
    if found is not None and _is_older(found.written, ending.since):
        said = reason = None  # it tells how an earlier start ended
    if said == "interrupted" and ending.exit_status in (None, 130, 143, -2, -15):
        return "interrupted", reason
    return "failed", reason if said == "failed" and reason else _why(said, ending)


def _is_older(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one < other


def _why(said: str | None, ending: Ending) -> str:
    """Of a failure that the record does not explain."""
    status = ending.exit_status
    if status == 0:
        return f"fit ended without an error, but the record says {said or 'nothing'}"
    how = "ended" if status is None else f"exit status {status}"
    if said == "running":
        how = f"{how}, and the record still says running"
    elif said is None and status is None:
        how = "ended before it began to train"
    elif ending.log:
        return ending.log
    return f"{how}: {ending.log}" if ending.log else how


def _start(run: PlannedRun, board: Board, backend: Backend) -> None:
    hours = None
    if run.gpu_hours is not None:
        baseline = next(other for other in board.runs if other.name == run.gpu_hours.of)
        budget = matched_budget(run.folder, baseline.name, baseline.folder, run.gpu_hours.share)
        keep_budget(run.folder, budget)
        hours = budget.gpu_hours
    backend.start(run, run.with_budget(hours))
    board.states[run.name] = backend.state(run) or "running"


def _end(run: PlannedRun, board: Board, state: State, reason: str | None) -> None:
    board.states[run.name] = state
    if reason:
        board.reasons[run.name] = reason


def _blocked_reasons(runs: Sequence[PlannedRun], states: Mapping[str, State]) -> dict[str, str]:
    return {run.name: f"needs {', '.join(blocking(run, states))}" for run in runs if states[run.name] == "blocked"}
