"""Before anything starts: would ``fit`` take the settings of every run, those that have begun included? One process asks for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ttt_lit.experiment.launch.folder import NotFinished, kept_hours, matched_budget, recorded
from ttt_lit.experiment.matrix import PlannedRun

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


def faults(config: str, runs: Sequence[PlannedRun], placements: Sequence[Sequence[str]], check: Check) -> list[str]:
    """One line for every run that ``fit`` would refuse: matrix file, entry, run, and what is wrong.

    A run whose files cannot be read is left to its own start, which fails alone.

    Args:
        placements: what the launcher adds to every run's arguments, then what another launcher would have added. A finished run may
            have been placed by either; nothing of the matrix file has changed then.
    """
    asked: list[tuple[str, ...]] = []
    lines_of: dict[str, range] = {}
    for run in runs:
        arguments = _command_line(run, runs)
        if arguments is not None:
            lines = [(*arguments, *placement) for placement in (placements if _is_finished(run) else placements[:1])]
            lines_of[run.name] = range(len(asked), len(asked) + len(lines))
            asked += lines
    errors = check(asked) if asked else []
    faulty = [run for run in runs if run.name in lines_of and all(errors[line] for line in lines_of[run.name])]
    return [f"{config}: {run.entry}: {run.name}: {errors[lines_of[run.name][0]]}" for run in faulty]


def _is_finished(run: PlannedRun) -> bool:
    try:
        found = recorded(run.folder)
    except (ValueError, OSError):  # reported as that run's failure, later
        return False
    return found is not None and found.status == "finished"


# Stands for GPU-hours that are not known yet.
_SOME_HOURS = 1.0


def _command_line(run: PlannedRun, runs: Sequence[PlannedRun]) -> tuple[str, ...] | None:
    """A run's arguments with the budget that it has, will have, or could have; None if its files cannot be read."""
    match = run.gpu_hours
    if match is None:
        return run.arguments
    try:
        hours = kept_hours(run.folder)
        if hours is None:
            baseline = next(other for other in runs if other.name == match.of)
            hours = matched_budget(run.folder, match.of, baseline.folder, match.share).gpu_hours
    except NotFinished:
        hours = _SOME_HOURS
    except (ValueError, OSError):
        return None
    return run.with_budget(hours)
