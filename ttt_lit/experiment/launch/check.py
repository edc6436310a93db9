"""Before anything starts: can ``fit`` read the settings of every run? One process asks its parser for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

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


def faults(config: str, runs: Sequence[PlannedRun], check: Check) -> list[str]:
    """One line for every run whose settings ``fit`` would refuse: matrix file, entry, run, and what is wrong."""
    if not runs:
        return []
    errors = check([run.arguments for run in runs])
    return [f"{config}: {run.entry}: {run.name}: {error}" for run, error in zip(runs, errors, strict=True) if error]
