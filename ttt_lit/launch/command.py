"""The command ``matrix``: which launcher, how many at a time, what is shown, and what a Ctrl-C means."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ttt_lit.launch.folder import SOME_HOURS, matched_hours
from ttt_lit.launch.local import LocalBackend, environments_for, usable_cores, visible_gpus
from ttt_lit.launch.loop import Backend, Board, launch
from ttt_lit.launch.matrix import PlannedRun, expand
from ttt_lit.launch.matrix_file import Matrix, read_matrix
from ttt_lit.launch.slurm import SlurmBackend, cluster_arguments
from ttt_lit.launch.table import counts, shown

_SOURCES = Path(__file__).resolve().parents[2]

# The launcher's own table takes the place of a bar in every log file.
_QUIET = ("--trainer.enable_progress_bar", "false")

Check = Callable[[Sequence[Sequence[str]]], list[str | None]]
"""Command lines of ``fit`` → what is wrong with each; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What ``matrix`` is asked."""

    config: str
    launcher: str = "local"
    jobs: int | None = None
    """Runs at a time; None: 1 on this machine, all that may start on a cluster."""
    root: str | None = None


def planned_runs(options: LaunchOptions) -> tuple[Matrix, list[PlannedRun]]:
    """The runs of the matrix file, with the arguments that every launched run gets."""
    matrix = read_matrix(options.config)
    here = Path("configs")  # the arms' folder, as the commands of the documentation have it, else that of the sources
    configs = here if (here / "base.yaml").is_file() else _SOURCES / here
    runs = expand(matrix, configs=configs, root=options.root)
    return matrix, [replace(run, arguments=(*run.arguments, *_QUIET)) for run in runs]


def placement(options: LaunchOptions, matrix: Matrix) -> tuple[str, ...]:
    """What the launcher adds to every run's arguments."""
    return cluster_arguments(matrix.slurm) if options.launcher == "slurm" else ()


# Before anything starts: would ``fit`` take the settings of every run, those that have begun included? -----------------------------


def errors_in_a_process(command_lines: Sequence[Sequence[str]]) -> list[str | None]:
    """What ``ttt_lit.train.arguments`` finds, in a process of its own: the launcher itself imports neither torch nor Lightning.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    path = os.pathsep.join(filter(None, [str(_SOURCES), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "ttt_lit.train.arguments"],
        input=json.dumps(command_lines),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"the settings of the runs could not be checked: {said}")
    found: list[str | None] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def are_refused(options: LaunchOptions, matrix: Matrix, runs: Sequence[PlannedRun], check: Check) -> bool:
    """Whether ``fit`` would refuse a run; says which and why: matrix file, entry, run, and what is wrong.

    A run whose files cannot be read is left to its own start, which fails alone.
    """
    by_name, lines = {run.name: run for run in runs}, {}
    for run in runs:
        with contextlib.suppress(ValueError, OSError):
            hours = matched_hours(run, by_name)
            # The budget that it has, will have, or could have.
            budget = SOME_HOURS if hours is None and run.gpu_hours is not None else hours
            lines[run.name] = (*run.with_budget(budget), *placement(options, matrix))
    errors = check(list(lines.values())) if lines else []
    found = {name: error for name, error in zip(lines, errors, strict=True) if error is not None}
    for name, error in found.items():
        _warn(f"error: {options.config}: {by_name[name].entry}: {name}: {error}")
    if found:
        _warn(f"fit would refuse {len(found)} of {len(runs)} runs, so nothing was started")
    return bool(found)


# The launcher ---------------------------------------------------------------------------------------------------------------------


def launch_matrix(
    options: LaunchOptions, *, program: Sequence[str], entry: str, check: Check = errors_in_a_process
) -> int:
    """Execute a matrix. Exit status: 0 if every run is finished, 1 if not, 130 after Ctrl-C.

    Args:
        program: how to call the command line on this machine.
        entry: ``module:function`` of ``fit``, for jobs of a cluster.
        check: says which runs ``fit`` would refuse; if there is one, nothing starts.
    """
    matrix, runs = planned_runs(options)
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs: got {options.jobs}, expected at least 1")
    if are_refused(options, matrix, runs, check):
        return 1
    if options.launcher == "slurm":
        cluster = SlurmBackend(matrix.slurm, entry)
        return run_to_end(matrix.name, runs, cluster, slots=options.jobs, console=Console(), poll_seconds=10.0)
    slots = options.jobs or 1
    environments = environments_for(slots, os.environ, visible_gpus(os.environ), usable_cores())
    return run_to_end(matrix.name, runs, LocalBackend(program, environments), slots=slots, console=Console())


def run_to_end(
    title: str,
    runs: Sequence[PlannedRun],
    backend: Backend,
    *,
    slots: int | None,
    console: Console,
    poll_seconds: float = 1.0,
) -> int:
    """Launch, show, and say at the end what is left to do. Returns the exit status."""
    with _ended_is_interrupted():  # until the runs have stopped
        try:
            with shown(title, console) as view:
                board = launch(runs, backend, view, slots=slots, poll_seconds=poll_seconds)
        except KeyboardInterrupt:
            _warn(backend.when_stopped)
            _warn(backend.stop())
            return 130
        except BaseException:
            backend.stop()
            raise
    return _summary(board)


def _summary(board: Board) -> int:
    lines = [f"{len(board.runs)} runs: {counts(board)}"]
    for run in board.runs:
        if board.states[run.name] != "finished":
            lines.append(f"  {run.name}  {board.states[run.name]}: {board.reasons.get(run.name, 'no reason known')}")
    if not board.is_finished:
        lines.append(
            "The same command starts failed and interrupted runs again (log.txt in a run's folder has the output); a diverged one needs "
            "another configuration."
        )
    print("\n".join(lines), flush=True)
    return 0 if board.is_finished else 1


@contextmanager
def _ended_is_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP mean Ctrl-C: otherwise the launcher would be gone and its runs would go on.

    Once: a closing terminal sends several, and a second Ctrl-C kills the runs. SIGHUP stays ignored under nohup.
    """

    def interrupt(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _warn(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be what has gone
        if text:
            print(text, file=sys.stderr, flush=True)
