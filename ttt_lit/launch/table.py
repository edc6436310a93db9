"""What a launcher shows: a live table on a terminal, a line for every change elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ttt_lit.launch.loop import Board
from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.launch.outlook import seconds_left
from ttt_lit.launch.progress import Progress
from ttt_lit.launch.schedule import State

HEADER = ("run", "state", "stage", "tokens", "loss", "time left")
_STYLES: dict[State, str] = {
    "running": "cyan",
    "queued": "blue",
    "finished": "green",
    "failed": "bold red",
    "diverged": "bold red",
    "interrupted": "yellow",
    "blocked": "yellow",
    "waiting": "dim",
}


def row(run: PlannedRun, board: Board) -> tuple[str, ...]:
    """The cells of a run, under ``HEADER``."""
    state, reason = board.states[run.name], board.reasons.get(run.name)
    progress = None if state in ("waiting", "blocked", "queued") else Progress.read(run.folder)
    state_cell = state if reason is None else f"{state}: {reason}"
    if progress is None:
        return (run.name, state_cell, "", "", "", "")
    left = duration(progress.remaining_seconds) if state == "running" else ""
    loss = "" if progress.loss is None else f"{progress.loss:.3f}"
    return (run.name, state_cell, progress.stage, amount(progress), loss, left)


def amount(progress: Progress) -> str:
    """Tokens spent of those planned; where time is the budget, tokens and the share of the time."""
    if progress.planned_tokens is not None:
        return f"{short(progress.tokens)} / {short(progress.planned_tokens)}"
    return f"{short(progress.tokens)}, {progress.fraction:.0%} of {duration(progress.planned_gpu_seconds)}"


def short(count: float) -> str:
    """1234567 → 1.23M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def duration(seconds: float | None) -> str:
    """3700 → 1:01 h."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02d} h"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def outlook(board: Board) -> str:
    """``3 of 10 finished, about 25 min left``."""
    finished = sum(state == "finished" for state in board.states.values())
    left = seconds_left(board)
    return f"{finished} of {len(board.runs)} finished" + ("" if left is None else f", about {duration(left)} left")


def time_of_day() -> str:
    return time.strftime("%H:%M:%S")


def counts(board: Board) -> str:
    """``2 finished, 1 running``."""
    states = list(board.states.values())
    return ", ".join(f"{states.count(state)} {state}" for state in _STYLES if state in states)


class LiveTable:
    """Shows a board as a table that is redrawn in place."""

    def __init__(self, title: str, console: Console) -> None:
        self.title = title
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> LiveTable:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def __call__(self, board: Board) -> None:
        title = f"{time_of_day()}  {self.title}: {outlook(board)} ({counts(board)})"
        table = Table(*HEADER, title=title, title_justify="left")
        for run in board.runs:
            state = board.states[run.name]
            cells = [Text(cell) for cell in row(run, board)]
            cells[1].stylize(_STYLES[state])
            table.add_row(*cells)
        self._live.update(table, refresh=True)


class Lines:
    """Prints a line for every run that changes its state at once, and progress no more often than ``every_seconds``.

    Runs that wait, or were finished before, share a line at the start.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        every_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], str] = time_of_day,
    ) -> None:
        self.write, self.every_seconds, self.clock, self.time_of_day = write, every_seconds, clock, time_of_day
        self._states: dict[str, State] = {}
        self._cells: dict[str, tuple[str, ...]] = {}
        self._last = float("-inf")
        self._outlook = ""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, board: Board) -> None:
        due = self.clock() - self._last >= self.every_seconds
        if not self._states:
            self._begin(board)
        changed = False
        for run in board.runs:
            state = board.states[run.name]
            is_new = state != self._states.get(run.name)
            if is_new or (due and state == "running"):
                self._write(run, board)
            changed = changed or is_new
            self._states[run.name] = state
        if due or changed:
            self._write_outlook(board)
        if due:
            self._last = self.clock()

    def _begin(self, board: Board) -> None:
        for state in ("finished", "waiting"):
            names = [run.name for run in board.runs if board.states[run.name] == state]
            self._states |= dict.fromkeys(names, state)
            if names:
                self._say(f"{state}: {', '.join(names)}")

    def _write_outlook(self, board: Board) -> None:
        text = outlook(board)
        if text != self._outlook:
            self._outlook = text
            self._say(text)

    def _say(self, text: str) -> None:
        self.write(f"{self.time_of_day()}  {text}")

    def _write(self, run: PlannedRun, board: Board) -> None:
        cells = row(run, board)
        if cells == self._cells.get(run.name):
            return
        self._cells[run.name] = cells
        stage, tokens, loss, left = cells[2:]
        named = [
            f"stage {stage}" if stage else "",
            f"tokens {tokens}" if tokens else "",
            f"loss {loss}" if loss else "",
            f"{left} left" if left else "",
        ]
        self._say("  ".join([cells[0], cells[1], *(text for text in named if text)]))
