"""Which run may start: pure functions of the runs' order and states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from ttt_lit.launch.matrix import PlannedRun

State = Literal["waiting", "blocked", "queued", "running", "finished", "diverged", "failed", "interrupted"]
"""``waiting``: for its turn or its parents. ``blocked``: a parent will not finish. ``queued``: with the cluster. ``failed``,
``diverged`` and ``interrupted``: ended before the end."""

ACTIVE: tuple[State, ...] = ("queued", "running")
BROKEN: tuple[State, ...] = ("blocked", "diverged", "failed", "interrupted")


def with_blocked(runs: Sequence[PlannedRun], states: Mapping[str, State]) -> dict[str, State]:
    """The states, with every waiting run that has a broken ancestor blocked."""
    found = dict(states)
    changed = True
    while changed:
        changed = False
        for run in runs:
            if found[run.name] == "waiting" and any(found[parent] in BROKEN for parent in run.after):
                found[run.name], changed = "blocked", True
    return found


def ready(runs: Sequence[PlannedRun], states: Mapping[str, State], slots: int | None) -> list[PlannedRun]:
    """Runs to start now, in the file's order: waiting, every parent finished, and room for them.

    Args:
        slots: how many runs may be active at a time; None: any number.
    """
    waiting = [
        run
        for run in runs
        if states[run.name] == "waiting" and all(states[parent] == "finished" for parent in run.after)
    ]
    if slots is None:
        return waiting
    return waiting[: max(0, slots - sum(state in ACTIVE for state in states.values()))]


def blocking(run: PlannedRun, states: Mapping[str, State]) -> list[str]:
    """The parents because of which a run is blocked."""
    return [parent for parent in run.after if states[parent] in BROKEN]
