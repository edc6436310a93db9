"""The command ``matrix``: which launcher, how many at a time, what is shown, and what a Ctrl-C means."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ttt_lit.launch.check import Check, errors_in_a_process, faults
from ttt_lit.launch.local import LocalBackend, environments_for, usable_cores, visible_gpus
from ttt_lit.launch.loop import Backend, Board, launch
from ttt_lit.launch.matrix import PlannedRun, expand
from ttt_lit.launch.matrix_file import Matrix, read_matrix
from ttt_lit.launch.slurm import SlurmBackend, cluster_arguments
from ttt_lit.launch.table import Lines, LiveTable, counts

_CONFIGS = Path(__file__).resolve().parents[3] / "configs"

# The launcher's own table takes the place of a bar in every log file.
_QUIET = ("--trainer.enable_progress_bar", "false")


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
    runs = expand(matrix, configs=_configs(), root=options.root)
    return matrix, [replace(run, arguments=(*run.arguments, *_QUIET)) for run in runs]


def _configs() -> str:
    """Folder of the arms: the one here, as the commands of the documentation have it, else that of the sources."""
    here = Path("configs")
    return str(here if (here / "base.yaml").is_file() else _CONFIGS)


def placement(options: LaunchOptions, matrix: Matrix) -> tuple[str, ...]:
    """What the launcher adds to every run's arguments."""
    return cluster_arguments(matrix.slurm) if options.launcher == "slurm" else ()


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
    slots = 1 if options.jobs is None else options.jobs
    environments = environments_for(slots, os.environ, visible_gpus(os.environ), usable_cores())
    return run_to_end(matrix.name, runs, LocalBackend(program, environments), slots=slots, console=Console())


def are_refused(options: LaunchOptions, matrix: Matrix, runs: Sequence[PlannedRun], check: Check) -> bool:
    """Whether ``fit`` would refuse a run; says which and why."""
    found = faults(options.config, runs, placement(options, matrix), check)
    for line in found:
        _warn(f"error: {line}")
    if found:
        _warn(f"fit would refuse {len(found)} of {len(runs)} runs, so nothing was started")
    return bool(found)


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
    view = LiveTable(title, console) if console.is_terminal else Lines(_print)
    with _ended_is_interrupted():  # until the runs have stopped
        try:
            with view:
                board = launch(runs, backend, view, slots=slots, poll_seconds=poll_seconds)
        except KeyboardInterrupt:
            _stop(backend)
            return 130
        except BaseException:
            backend.stop()
            raise
    return _summary(board)


def _stop(backend: Backend) -> None:
    if not backend.stops_with_launcher:
        _warn("the jobs go on without the launcher; the same command finds them again")
        return
    _warn("stopping the runs (Ctrl-C again kills them) …")
    going_on = backend.stop()
    if going_on:
        _warn(f"{', '.join(going_on)} go on: another process began them; the same command finds them again")
    others = " other" if going_on else ""
    _warn(f"stopped; the same command continues every{others} run from its last resume file")


def _summary(board: Board) -> int:
    _print(f"{len(board.runs)} runs: {counts(board)}")
    if board.is_finished:
        return 0
    for run in board.runs:
        if board.states[run.name] != "finished":
            _print(f"  {run.name}  {board.states[run.name]}: {board.reasons.get(run.name, 'no reason known')}")
    _print(
        "The same command starts failed and interrupted runs again (log.txt in a run's folder has the output); a diverged one needs "
        "another configuration."
    )
    return 1


@contextmanager
def _ended_is_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP mean Ctrl-C: otherwise the launcher would be gone and its runs would go on.

    Once: a closing terminal sends several, and a second Ctrl-C kills the runs. SIGHUP stays ignored under nohup.
    """
    told = False

    def interrupt(*_: object) -> None:
        nonlocal told
        if not told:
            told = True
            raise KeyboardInterrupt

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _print(text: str) -> None:
    print(text, flush=True)


def _warn(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be what has gone
        print(text, file=sys.stderr, flush=True)
