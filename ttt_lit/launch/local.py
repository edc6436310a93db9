"""Runs as processes of this machine, each in a session of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttt_lit.launch.folder import LOG_NAME, last_error, read_json, write_json, written
from ttt_lit.launch.loop import BackendError, Ending
from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.launch.schedule import State
from ttt_lit.train.lock import holder

SLOT_NAME = "slot.json"
"""In a run's folder: which of the runs at a time it was started as, and with which GPUs."""

GRACE_SECONDS = 60.0
"""Between asking a run to stop and killing it: time to write its resume file."""

_THREADS, _DEVICES = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"


@dataclass
class _Job:
    process: subprocess.Popen[bytes]
    slot: int


@dataclass
class _Adopted:
    """A living run of an earlier launcher, or one begun by hand."""

    run: PlannedRun
    place: Mapping[str, Any] | None
    """What the earlier launcher gave it; None: begun by hand, so what it uses is not known."""


class LocalBackend:
    """One process per run: ``program fit ARGUMENTS``, its output appended to ``log.txt`` in the run's folder.

    Args:
        program: how to call the command line, e.g. ``(sys.executable, "cli.py")``.
        environments: one for each run at a time (``environments_for``).
    """

    stops_with_launcher = True

    def __init__(
        self, program: Sequence[str], environments: Sequence[Mapping[str, str]], *, grace_seconds: float = GRACE_SECONDS
    ) -> None:
        self.program, self.environments, self.grace_seconds = tuple(program), environments, grace_seconds
        self._jobs: dict[str, _Job] = {}
        self._ended: dict[str, int] = {}
        self._adopted: dict[str, _Adopted] = {}

    def adopt(self, run: PlannedRun) -> bool:
        alive = holder(run.folder) is not None
        if alive:
            self._adopted[run.name] = _Adopted(run, read_json(run.folder / SLOT_NAME))
            self._ended.pop(run.name, None)
        return alive

    def room(self) -> int | None:
        return len(self._free())

    def start(self, run: PlannedRun, arguments: Sequence[str]) -> None:
        free = self._free()
        if not free:
            raise BackendError(f"{run.name}: all of {len(self.environments)} places are taken")
        slot = free[0]
        run.folder.mkdir(parents=True, exist_ok=True)
        if holder(run.folder) is None:  # else it says where that process runs, and this start will be refused
            write_json(run.folder / SLOT_NAME, {"slot": slot, "devices": self.environments[slot].get(_DEVICES)})
        command = [*self.program, "fit", *arguments]
        with (run.folder / LOG_NAME).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environments[slot]),
                start_new_session=True,
            )
        self._jobs[run.name] = _Job(process, slot)
        self._adopted.pop(run.name, None)

    def state(self, run: PlannedRun) -> State | None:
        if run.name in self._adopted:
            if holder(run.folder) is not None:
                return "running"
            del self._adopted[run.name]
            return None
        job = self._jobs.get(run.name)
        if job is None:
            return None
        status = job.process.poll()
        if status is None:
            return "running"
        self._ended[run.name] = status
        del self._jobs[run.name]
        return None

    def ending(self, run: PlannedRun) -> Ending:
        status, log = self._ended.get(run.name), last_error(run.folder / LOG_NAME)
        if status is None:  # the process was another launcher's, or somebody's
            return Ending(log=log)
        return Ending(exit_status=status, since=written(run.folder / SLOT_NAME), log=log)

    def stop(self) -> list[str]:
        """Ask every run to stop, wait, then kill. A second Ctrl-C kills at once."""
        try:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + self.grace_seconds
            while self._alive() and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            self._signal(signal.SIGKILL)
            for job in self._jobs.values():
                job.process.wait()
            self._jobs.clear()
        return [name for name, one in self._adopted.items() if holder(one.run.folder) is not None]

    def _free(self) -> list[int]:
        taken = {job.slot for job in self._jobs.values()}
        for one in self._adopted.values():
            if one.place is not None and holder(one.run.folder) is not None:
                taken |= {slot for slot in range(len(self.environments)) if self._is_shared(slot, one.place)}
        return [slot for slot in range(len(self.environments)) if slot not in taken]

    def _is_shared(self, slot: int, place: Mapping[str, Any]) -> bool:
        """Whether a slot is, or has a GPU of, the one that a launcher gave away, perhaps for another number of runs at a time."""
        ours, theirs = self.environments[slot].get(_DEVICES), place.get("devices")
        if ours and theirs:
            return bool(set(_listed(ours)) & set(_listed(theirs)))
        return ours != theirs or slot == place.get("slot")  # none named: all of the machine, if there are any

    def _alive(self) -> bool:
        return any(job.process.poll() is None for job in self._jobs.values())

    def _signal(self, number: signal.Signals) -> None:
        for job in self._jobs.values():
            if job.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.process.pid, number)


def environments_for(
    jobs: int, environment: Mapping[str, str], gpus: Sequence[str], cores: int
) -> list[dict[str, str]]:
    """An environment for each of ``jobs`` runs at a time: GPUs of its own, and its share of the cores.

    What the user has set stays: ``OMP_NUM_THREADS``, and in ``CUDA_VISIBLE_DEVICES`` the GPUs to be shared out.

    Args:
        gpus: ids of the machine's GPUs, or of those that the user allows.
    """
    if jobs == 1:
        return [dict(environment)]
    each = len(gpus) // jobs
    if gpus and not each:
        raise ValueError(
            f"--jobs: got {jobs}, expected at most {len(gpus)}, the number of GPUs; to train on CPU set {_DEVICES} to nothing"
        )
    shared = {_THREADS: str(max(1, cores // jobs))} | dict(environment)
    if not gpus:
        return [dict(shared) for _ in range(jobs)]
    return [shared | {_DEVICES: ",".join(gpus[slot * each : (slot + 1) * each])} for slot in range(jobs)]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Ids of the GPUs that the user allows, else of all that the driver lists."""
    allowed = environment.get(_DEVICES)
    if allowed is not None:
        return _listed(allowed)
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _listed(devices: str) -> list[str]:
    return [one.strip() for one in devices.split(",") if one.strip()]
