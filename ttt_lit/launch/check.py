"""Before anything starts: would ``fit`` take the settings of every run, those that have begun included? One process asks for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ttt_lit.launch.folder import SOME_HOURS, matched_hours
from ttt_lit.launch.matrix import PlannedRun

Check = Callable[[Sequence[Sequence[str]]], list[str | None]]
"""Command lines of ``fit`` → what is wrong with each; None: nothing."""

_SOURCES = Path(__file__).resolve().parents[3]


def errors_in_a_process(command_lines: Sequence[Sequence[str]]) -> list[str | None]:
    """What ``ttt_lit.train.arguments`` finds, in a process of its own: the launcher itself imports neither torch nor Lightning.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    paths = [str(_SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "ttt_lit.train.arguments"],
        input=json.dumps([list(arguments) for arguments in command_lines]),
        capture_output=True,
        text=True,
        env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"the settings of the runs could not be checked: {said}")
    found: list[str | None] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def faults(config: str, runs: Sequence[PlannedRun], placement: Sequence[str], check: Check) -> list[str]:
    """One line for every run that ``fit`` would refuse: matrix file, entry, run, and what is wrong.

    A run whose files cannot be read is left to its own start, which fails alone.

    Args:
        placement: what the launcher adds to every run's arguments.
    """
    by_name = {run.name: run for run in runs}
    lines = {run.name: line for run in runs if (line := _command_line(run, by_name)) is not None}
    errors = check([(*line, *placement) for line in lines.values()]) if lines else []
    found = dict(zip(lines, errors, strict=True))
    return [f"{config}: {run.entry}: {run.name}: {found[run.name]}" for run in runs if found.get(run.name)]


def _command_line(run: PlannedRun, runs: Mapping[str, PlannedRun]) -> tuple[str, ...] | None:
    """A run's arguments with the budget that it has, will have, or could have; None if its files cannot be read."""
    try:
        hours = matched_hours(run, runs)
    except (ValueError, OSError):
        return None
    return run.with_budget(SOME_HOURS if hours is None and run.gpu_hours is not None else hours)
