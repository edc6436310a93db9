"""The launcher's loop: starts what may start, watches what runs, until nothing is left that could go on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ttt_lit.launch.folder import Recorded, fix_hours, recorded
from ttt_lit.launch.matrix import PlannedRun

State = Literal["waiting", "blocked", "queued", "running", "finished", "diverged", "failed", "interrupted"]
"""``waiting``: for its turn or its parents. ``blocked``: a parent will not finish. ``queued``: with the cluster. ``failed``,
``diverged`` and ``interrupted``: ended before the end."""

ACTIVE: tuple[State, ...] = ("queued", "running")
BROKEN: tuple[State, ...] = ("blocked", "diverged", "failed", "interrupted")


class BackendError(RuntimeError):
    """A backend could not do what it was asked for one run; the others are not concerned."""


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

    when_stopped: str
    """What the user is told when the launcher is stopped."""

    def room(self) -> int | None:
        """How many more runs may be started now; None: any number."""
        return None

    def start(self, run: PlannedRun, arguments: Sequence[str]) -> None:
        """Begin to execute ``fit`` with these arguments; returns at once."""
        ...

    def state(self, run: PlannedRun) -> State | None:
        """``queued`` or ``running``, whoever began it: this launcher, an earlier one, or somebody by hand. Else None."""
        ...

    def ending(self, run: PlannedRun) -> Ending:
        """Of a run that has ended."""
        ...

    def stop(self) -> str:
        """End what ends with the launcher; returns when it has ended, with what the user should know. Harmless twice."""
        return ""


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

    def end(self, run: PlannedRun, state: State, reason: str | None) -> None:
        self.states[run.name] = state
        if reason:
            self.reasons[run.name] = reason

    def block(self) -> None:
        """Block every waiting run that has a broken ancestor."""
        for _, run in itertools.product(self.runs, self.runs):  # a chain of parents may be as long as the matrix
            broken = [parent for parent in run.after if self.states[parent] in BROKEN]
            if broken and self.states[run.name] in ("waiting", "blocked"):
                self.end(run, "blocked", f"needs {', '.join(broken)}")

    def ready(self, slots: int | None) -> list[PlannedRun]:
        """Runs to start now, in the file's order: waiting, every parent finished, and fewer than ``slots`` active."""
        waiting = [
            run
            for run in self.runs
            if self.states[run.name] == "waiting" and all(self.states[parent] == "finished" for parent in run.after)
        ]
        return waiting if slots is None else waiting[: max(0, slots - len(self.active()))]

    def active(self) -> list[PlannedRun]:
        return [run for run in self.runs if self.states[run.name] in ACTIVE]


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
        for run in board.active():
            with _failing_alone(run, board):
                _look_again(run, board, backend)
        board.block()
        for run in board.ready(slots)[: backend.room()]:
            with _failing_alone(run, board):
                _start(run, board, backend)
        board.block()
        view(board)
        if not board.active() and not board.ready(slots):
            return board
        time.sleep(poll_seconds)


@contextmanager
def _failing_alone(run: PlannedRun, board: Board) -> Iterator[None]:
    """Files that cannot be read or written, settings that do not fit, a backend that refuses: one run's end and nobody else's."""
    try:
        yield
    except (ValueError, OSError, BackendError) as error:
        board.end(run, "failed", " ".join(str(error).split()))


def _first_look(run: PlannedRun, board: Board, backend: Backend) -> None:
    found = recorded(run.folder)
    if found is not None and found.status == "finished":
        board.states[run.name] = "finished"
    elif (state := backend.state(run)) is not None:
        board.states[run.name] = state
    elif found is not None and found.status == "diverged":
        board.end(run, "diverged", found.reason)
    else:  # new, or cut off: the same command continues it
        board.states[run.name] = "waiting"


def _look_again(run: PlannedRun, board: Board, backend: Backend) -> None:
    state = backend.state(run)
    if state is not None:
        board.states[run.name] = state
    else:
        board.end(run, *_outcome(recorded(run.folder), backend.ending(run)))


def _start(run: PlannedRun, board: Board, backend: Backend) -> None:
    match = run.gpu_hours
    hours = None if match is None else fix_hours(run, next(one for one in board.runs if one.name == match.of))
    backend.start(run, run.with_budget(hours))
    board.states[run.name] = backend.state(run) or "running"


def _outcome(found: Recorded | None, ending: Ending) -> tuple[State, str | None]:
    """How a run ended, from its record and what its backend knows."""
    said, reason, when = found or (None, None, None)
    if said == "finished":  # however the process ended after that: a later start would skip it
        return "finished", None
    if said == "diverged":
        return "diverged", reason
    if when is not None and ending.since is not None and when < ending.since:
        said = reason = None  # it tells how an earlier start ended
    if said == "interrupted" and ending.exit_status in (None, 130, 143, -2, -15):
        return "interrupted", reason
    return "failed", reason if said == "failed" and reason else _why(said, ending)


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
