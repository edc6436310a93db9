"""Runs as jobs of a SLURM cluster, through submitit: one job per run, found again by a later launcher."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import Checkpointable

from ttt_lit.launch.folder import last_error, read_json, recorded, write_json, written
from ttt_lit.launch.loop import Backend, BackendError, Ending, State
from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.launch.matrix_file import WARNING_SECONDS, SlurmSettings
from ttt_lit.train.lock import holder

JOB_NAME = "slurm.json"
LOG_FOLDER = "slurm"

# A long run may be cut off at the time limit as often as it needs; each time it continues.
_TIMEOUTS = 1000
_RUNNING = ("RUNNING", "COMPLETING")
# Lightning would save inside the signal handler and requeue a second time.
_ENVIRONMENT = "lightning.pytorch.plugins.environments.SLURMEnvironment"
_NO_AUTO_REQUEUE = [{"class_path": _ENVIRONMENT, "init_args": {"auto_requeue": False}}]


class FitJob(Checkpointable):
    """One run; every task of the job calls it with the same arguments.

    The cluster's warning (SIGUSR2) reaches submitit's handler, which puts the same call back into the queue: ``fit`` continues from the
    run's last resume file by itself. The callback ``Preemption`` delays that handler until the file is written.

    Args:
        entry: ``module:function`` that takes the arguments of ``fit``; imported on the node, not where the job is submitted.
        arguments: those of ``fit``.
    """

    def __init__(self, entry: str, arguments: Sequence[str]) -> None:
        self.entry, self.arguments = entry, tuple(arguments)

    def __call__(self) -> int:
        module, _, function = self.entry.partition(":")
        status: int = getattr(importlib.import_module(module), function)(list(self.arguments))
        return status


class SlurmBackend(Backend):
    """One job per run. The launcher stays alive to start children and to show progress, but jobs do not need it.

    Args:
        settings: what every job asks for.
        entry: ``module:function`` of ``fit``.
    """

    when_stopped = "the jobs go on without the launcher; the same command finds them again"

    def __init__(self, settings: SlurmSettings, entry: str) -> None:
        self.settings, self.entry = settings, entry
        self._jobs: dict[str, Any] = {}
        """Name of a run → its job; None: no job of a launcher is known or running."""

    def submit(self, folder: Path, parameters: dict[str, Any], job: FitJob) -> Any:
        """Put a job into the queue; returns it with ``job_id``, ``done()`` and ``state``."""
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=_TIMEOUTS)
        executor.update_parameters(**parameters)
        return executor.submit(job)

    def find(self, folder: Path, job_id: str) -> Any:
        """A job that was submitted earlier."""
        return submitit.SlurmJob(folder=folder, job_id=job_id, tasks=list(range(tasks_of(self.settings))))

    def start(self, run: PlannedRun, arguments: Sequence[str]) -> None:
        job = FitJob(self.entry, (*arguments, *cluster_arguments(self.settings)))
        folder, parameters = run.folder / LOG_FOLDER, job_parameters(self.settings, run.name)
        folder.mkdir(parents=True, exist_ok=True)
        # First: a launcher that dies after the submission would leave a job that nobody knows, and the next one would submit a second.
        write_json(run.folder / JOB_NAME, {"job_id": None, "submitting": parameters["name"]})
        try:
            with _asking("submit", run):
                self._jobs[run.name] = self.submit(folder, parameters, job)
        except BackendError:  # if the cluster took it all the same, run.lock lets one of two jobs train
            (run.folder / JOB_NAME).unlink()
            raise
        write_json(run.folder / JOB_NAME, {"job_id": self._jobs[run.name].job_id})

    def state(self, run: PlannedRun) -> State | None:
        if run.name not in self._jobs:
            self._jobs[run.name] = self._submitted(run)
        job = self._jobs[run.name]
        with _asking("look at", run):
            is_ours = job is not None and not job.done()
            running = is_ours and job.state.split(" ")[0] in _RUNNING
        # The cluster is asked rarely; the lock tells at once.
        is_held = holder(run.folder) is not None
        if is_ours:
            return "running" if running or is_held else "queued"
        if is_held:  # by hand, by a job that no launcher noted, or ours was refused because another process trains it
            self._jobs[run.name] = None
            return "running"
        return None

    def ending(self, run: PlannedRun) -> Ending:
        """Without an exit status: a job that was requeued has several, and the record tells what became of the run."""
        job = self._jobs[run.name]
        if job is None:
            return Ending()
        log = run.folder / LOG_FOLDER / f"{job.job_id}_0_log.err"
        return Ending(since=written(run.folder / JOB_NAME), log=last_error(log))

    def _submitted(self, run: PlannedRun) -> Any:
        """The run's job if it is in the queue or runs. ValueError where ``slurm.json`` cannot tell."""
        path = run.folder / JOB_NAME
        known = read_json(path)
        if known is None:
            return None
        name, job_id = known.get("submitting"), known.get("job_id")
        if name is not None:
            if holder(run.folder) is not None or _has_come_and_gone(run):
                return None
            raise ValueError(
                f"{path}: a launcher ended while it submitted the job {name}; look whether the cluster has it (squeue --name {name}), "
                "cancel it if so, and delete this file"
            )
        if not isinstance(job_id, str):
            raise ValueError(f"{path}: job_id is missing; delete this file if the job has ended")
        with _asking("find", run):
            job = self.find(run.folder / LOG_FOLDER, job_id)
            return None if job.done() else job


def _has_come_and_gone(run: PlannedRun) -> bool:
    """Whether a job trained the run after its submission was noted, and is not one that the cluster would start again."""
    found, noted = recorded(run.folder), written(run.folder / JOB_NAME)
    if found is None or found.status in ("running", "interrupted"):
        return False
    return found.written is not None and noted is not None and found.written >= noted


@contextmanager
def _asking(what: str, run: PlannedRun) -> Iterator[None]:
    """submitit fails with errors of many types: its own RuntimeErrors, those of the programs that it calls, a missing sbatch."""
    try:
        yield
    except Exception as error:
        raise BackendError(f"the cluster could not {what} the job of {run.name}: {error}") from error


def tasks_of(settings: SlurmSettings) -> int:
    """One task per GPU."""
    return settings.nodes * settings.gpus_per_node


def cluster_arguments(settings: SlurmSettings) -> tuple[str, ...]:
    """Arguments of ``fit`` that follow from the job's size."""
    devices = [
        *("--trainer.devices", str(settings.gpus_per_node)),
        *("--trainer.num_nodes", str(settings.nodes)),
        *("--trainer.plugins", json.dumps(_NO_AUTO_REQUEUE)),
    ]
    return (*devices, *(("--trainer.strategy", "fsdp2") if tasks_of(settings) > 1 else ()))


def job_parameters(settings: SlurmSettings, name: str) -> dict[str, Any]:
    """As submitit's AutoExecutor takes them; it knows most settings by their names here."""
    plain = dataclasses.asdict(settings)
    memory = plain.pop("mem_gb")
    own = {f"slurm_{key}": plain.pop(key) for key in ("partition", "account", "qos")}
    own |= {"slurm_mem": f"{memory}G" if memory else "0", "slurm_signal_delay_s": WARNING_SECONDS}
    return {"name": name.replace("/", "-"), "tasks_per_node": settings.gpus_per_node, **plain, **own}
