"""Runs as jobs of a SLURM cluster, through submitit: one job per run, found again by a later launcher."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ttt_lit.launch.folder import last_error, read_json, recorded, write_json, written
from ttt_lit.launch.loop import BackendError, Ending
from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.launch.matrix_file import WARNING_SECONDS, SlurmSettings
from ttt_lit.launch.schedule import State
from ttt_lit.launch.slurm_job import FitJob
from ttt_lit.train.lock import holder

JOB_NAME = "slurm.json"
LOG_FOLDER = "slurm"

# A long run may be cut off at the time limit as often as it needs; each time it continues.
_TIMEOUTS = 1000
_RUNNING = ("RUNNING", "COMPLETING")
# Lightning would save inside the signal handler and requeue a second time.
_NO_AUTO_REQUEUE = [
    {
        "class_path": "lightning.pytorch.plugins.environments.SLURMEnvironment",
        "init_args": {"auto_requeue": False},
    }
]


class Cluster(Protocol):
    """The part of submitit that is used."""

    def submit(self, folder: Path, parameters: dict[str, Any], job: FitJob) -> Any:
        """Put a job into the queue; returns it with ``job_id``, ``done()`` and ``state``."""
        ...

    def find(self, folder: Path, job_id: str, tasks: int) -> Any:
        """A job that was submitted earlier."""
        ...


class SubmititCluster:
    """SLURM through submitit. Refuses at once, by name, where the package is not installed."""

    def __init__(self) -> None:
        self.submitit = _submitit()

    def submit(self, folder: Path, parameters: dict[str, Any], job: FitJob) -> Any:
        executor = self.submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=_TIMEOUTS)
        executor.update_parameters(**parameters)
        return executor.submit(job)

    def find(self, folder: Path, job_id: str, tasks: int) -> Any:
        return self.submitit.SlurmJob(folder=folder, job_id=job_id, tasks=list(range(tasks)))


class SlurmBackend:
    """One job per run. The launcher stays alive to start children and to show progress, but jobs do not need it.

    Args:
        settings: what every job asks for.
        entry: ``module:function`` of ``fit``.
        cluster: makes the jobs; None: SLURM.
    """

    stops_with_launcher = False

    def __init__(self, settings: SlurmSettings, entry: str, cluster: Callable[[], Cluster] = SubmititCluster) -> None:
        self.settings, self.entry, self.cluster = settings, entry, cluster()
        self._jobs: dict[str, Any] = {}

    def adopt(self, run: PlannedRun) -> bool:
        is_held = holder(run.folder) is not None
        if is_held and self._has_ended(run):
            # Ours was refused: another process trains the run, and its record tells how that ends.
            del self._jobs[run.name]
            return True
        if run.name in self._jobs:
            return False
        if is_held and _submitting(run) is not None:  # the job that a launcher did not live to note
            return True
        job_id = _submitted(run)
        if job_id is not None:
            with _asking("find", run):
                job = self.cluster.find(run.folder / LOG_FOLDER, job_id, tasks_of(self.settings))
                ended = job.done()
            if not ended:
                self._jobs[run.name] = job
                return True
        return is_held

    def _has_ended(self, run: PlannedRun) -> bool:
        """Whether a job of ours is over; False where there is none."""
        job = self._jobs.get(run.name)
        if job is None:
            return False
        with _asking("look at", run):
            return bool(job.done())

    def room(self) -> int | None:
        """The cluster has a queue."""
        return None

    def start(self, run: PlannedRun, arguments: Sequence[str]) -> None:
        job = FitJob(self.entry, (*arguments, *cluster_arguments(self.settings)))
        folder = run.folder / LOG_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        parameters = job_parameters(self.settings, run.name)
        # First: a launcher that dies after the submission would leave a job that nobody knows, and the next one would submit a second.
        write_json(run.folder / JOB_NAME, {"job_id": None, "submitting": parameters["name"]})
        try:
            with _asking("submit", run):
                submitted = self.cluster.submit(folder, parameters, job)
        except BackendError:  # if the cluster took it all the same, run.lock lets one of two jobs train
            (run.folder / JOB_NAME).unlink()
            raise
        write_json(run.folder / JOB_NAME, {"job_id": submitted.job_id})
        self._jobs[run.name] = submitted

    def state(self, run: PlannedRun) -> State | None:
        job = self._jobs.get(run.name)
        if job is None:  # by hand, on another node
            return "running" if holder(run.folder) is not None else None
        with _asking("look at", run):
            if job.done():
                return None
            running = job.state.split(" ")[0] in _RUNNING
        # The cluster is asked rarely; the lock tells at once.
        return "running" if running or holder(run.folder) is not None else "queued"

    def ending(self, run: PlannedRun) -> Ending:
        """Without an exit status: a job that was requeued has several, and the record tells what became of the run."""
        job = self._jobs.get(run.name)
        if job is None:
            return Ending()
        log = run.folder / LOG_FOLDER / f"{job.job_id}_0_log.err"
        return Ending(since=written(run.folder / JOB_NAME), log=last_error(log))

    def stop(self) -> list[str]:
        """Jobs belong to the cluster: they go on, and a later launcher finds them."""
        return []


def _submitting(run: PlannedRun) -> Any:
    """Name of the job that was being submitted when the file was last written; None: none was."""
    return (read_json(run.folder / JOB_NAME) or {}).get("submitting")


def _has_come_and_gone(run: PlannedRun) -> bool:
    """Whether a job trained the run after that file was written, and is not one that the cluster would start again."""
    found = recorded(run.folder)
    noted = written(run.folder / JOB_NAME)
    if found is None or found.status in ("running", "interrupted"):
        return False
    return found.written is not None and noted is not None and found.written >= noted


def _submitted(run: PlannedRun) -> str | None:
    """Id of the run's last job. ValueError for a file that cannot be read."""
    path = run.folder / JOB_NAME
    known = read_json(path)
    if known is None:
        return None
    name = _submitting(run)
    if name is not None:
        if _has_come_and_gone(run):
            return None
        raise ValueError(
            f"{path}: a launcher ended while it submitted the job {name}; look whether the cluster has it (squeue --name {name}), "
            "cancel it if so, and delete this file"
        )
    if not isinstance(known.get("job_id"), str):
        raise ValueError(f"{path}: job_id is missing; delete this file if the job has ended")
    return str(known["job_id"])


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
    if tasks_of(settings) > 1:
        devices += ["--trainer.strategy", "fsdp2"]
    return tuple(devices)


def job_parameters(settings: SlurmSettings, name: str) -> dict[str, Any]:
    """As submitit's AutoExecutor takes them."""
    return {
        "name": name.replace("/", "-"),
        "nodes": settings.nodes,
        "gpus_per_node": settings.gpus_per_node,
        "tasks_per_node": settings.gpus_per_node,
        "cpus_per_task": settings.cpus_per_task,
        "timeout_min": settings.timeout_min,
        "slurm_mem": f"{settings.mem_gb}G" if settings.mem_gb else "0",
        "slurm_signal_delay_s": WARNING_SECONDS,
        "slurm_partition": settings.partition,
        "slurm_account": settings.account,
        "slurm_qos": settings.qos,
    }


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise RuntimeError(
            '--launcher slurm needs the package submitit; install it with: pip install "ttt-lit[slurm]"'
        ) from error
    return submitit
