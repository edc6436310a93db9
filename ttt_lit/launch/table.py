"""What a launcher shows: a live table on a terminal, a line for every change elsewhere."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ttt_lit.launch.loop import Board, State, View
from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.record.progress import Progress

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
    if progress.planned_tokens is not None:
        amount = f"{_short(progress.tokens)} / {_short(progress.planned_tokens)}"
    else:
        amount = f"{_short(progress.tokens)}, {progress.fraction:.0%} of {_duration(progress.planned_gpu_seconds)}"
    left = _duration(progress.remaining_seconds) if state == "running" else ""
    loss = "" if progress.loss is None else f"{progress.loss:.3f}"
    return (run.name, state_cell, progress.stage, amount, loss, left)


def counts(board: Board) -> str:
    """``2 finished, 1 running``."""
    states = list(board.states.values())
    return ", ".join(f"{states.count(state)} {state}" for state in _STYLES if state in states)


def outlook(board: Board) -> str:
    """``3 of 10 finished, about 25 min left``."""
    finished, left = list(board.states.values()).count("finished"), seconds_left(board)
    return f"{finished} of {len(board.runs)} finished" + ("" if left is None else f", about {_duration(left)} left")


def seconds_left(board: Board) -> float | None:
    """Wall-clock time until the last run ends, if as many run at a time as now. None while that cannot be known.

    A run that has not begun is expected to take as long as those that have, on average.
    """
    going = board.active()
    seen = [run for run in board.runs if board.states[run.name] == "finished"] + going
    progress = {run.name: found for run in seen if (found := Progress.read(run.folder)) is not None}
    whole = [seconds for one in progress.values() if (seconds := one.whole_seconds) is not None]
    if not going or not whole:
        return None
    mean, to_come = sum(whole) / len(whole), list(board.states.values()).count("waiting")
    known = [progress[run.name].remaining_seconds if run.name in progress else None for run in going]
    left = [mean if seconds is None else seconds for seconds in known]
    return max(*left, (sum(left) + to_come * mean) / len(going))


def _short(count: float) -> str:
    """1234567 → 1.23M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def _duration(seconds: float | None) -> str:
    """3700 → 1:01 h."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02d} h"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


@contextmanager
def shown(title: str, console: Console) -> Iterator[View]:
    """A table that is redrawn in place on a terminal, else lines."""
    if not console.is_terminal:
        yield Lines(functools.partial(print, flush=True))
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda board: live.update(_table(title, board), refresh=True)


def _table(title: str, board: Board) -> Table:
    title = f"{_time_of_day()}  {title}: {outlook(board)} ({counts(board)})"
    table = Table(*HEADER, title=title, title_justify="left")
    for run in board.runs:
        cells = [Text(cell) for cell in row(run, board)]
        cells[1].stylize(_STYLES[board.states[run.name]])
        table.add_row(*cells)
    return table


def _time_of_day() -> str:
    return time.strftime("%H:%M:%S")


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
        time_of_day: Callable[[], str] = _time_of_day,
    ) -> None:
        self.write, self.every_seconds, self.clock, self.time_of_day = write, every_seconds, clock, time_of_day
        self._states: dict[str, State] = {}
        self._said: dict[str, str] = {}
        self._last = float("-inf")

    def __call__(self, board: Board) -> None:
        due = self.clock() - self._last >= self.every_seconds
        if not self._states:
            for state in ("finished", "waiting"):
                names = [run.name for run in board.runs if board.states[run.name] == state]
                self._states |= dict.fromkeys(names, state)
                if names:
                    self._say(state, f"{state}: {', '.join(names)}")
        changed = [run.name for run in board.runs if board.states[run.name] != self._states.get(run.name)]
        for run in board.runs:
            if run.name in changed or (due and board.states[run.name] == "running"):
                name, said, stage, tokens, loss, left = row(run, board)
                parts = [stage and f"stage {stage}", tokens and f"tokens {tokens}", loss and f"loss {loss}"]
                self._say(name, "  ".join(filter(None, [name, said, *parts, left and f"{left} left"])))
        if due or changed:
            self._say("", outlook(board))
        if due:
            self._last = self.clock()
        self._states = dict(board.states)

    def _say(self, what: str, text: str) -> None:
        """Nothing twice in a row about the same."""
        if self._said.get(what) != text:
            self._said[what] = text
            self.write(f"{self.time_of_day()}  {text}")
