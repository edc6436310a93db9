"""Runs as processes of this machine, each in a session of its own.

submitit's executor for local processes is no substitute: its jobs end with a time limit, are stopped by SIGINT, cannot be found again by a
later launcher, and do not share out GPUs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt_lit.launch.folder import LOG_NAME, last_error, read_json, write_json, written
from ttt_lit.launch.loop import Backend, BackendError, Ending, State
from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.train.lock import holder

SLOT_NAME = "slot.json"
"""In a run's folder: which of the runs at a time it was started as, and with which GPUs."""

GRACE_SECONDS = 60.0
"""Between asking a run to stop and killing it: time to write its resume file."""

_THREADS, _DEVICES = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"


class LocalBackend(Backend):
    """One process per run: ``program fit ARGUMENTS``, its output appended to ``log.txt`` in the run's folder.

    Args:
        program: how to call the command line, e.g. ``(sys.executable, "cli.py")``.
        environments: one for each run at a time (``environments_for``).
    """

    when_stopped = "stopping the runs (Ctrl-C again kills them) …"

    def __init__(
        self, program: Sequence[str], environments: Sequence[Mapping[str, str]], *, grace_seconds: float = GRACE_SECONDS
    ) -> None:
        self.program, self.environments, self.grace_seconds = tuple(program), environments, grace_seconds
        self._jobs: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
        """Name of a run → its process, which may have ended, and its slot."""
        self._others: dict[str, tuple[Path, dict[str, Any] | None]] = {}
        """Name → folder and ``slot.json`` of a run that an earlier launcher began; None: begun by hand, so what it uses is not known."""

    def room(self) -> int | None:
        return len(self._free())

    def start(self, run: PlannedRun, arguments: Sequence[str]) -> None:
        free = self._free()
        if not free:
            raise BackendError(f"{run.name}: all of {len(self.environments)} places are taken")
        environment = dict(self.environments[free[0]])
        run.folder.mkdir(parents=True, exist_ok=True)
        if holder(run.folder) is None:  # else it says where that process runs, and this start will be refused
            write_json(run.folder / SLOT_NAME, {"slot": free[0], "devices": environment.get(_DEVICES)})
        with (run.folder / LOG_NAME).open("ab") as log:
            process = subprocess.Popen(
                [*self.program, "fit", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._jobs[run.name] = process, free[0]

    def state(self, run: PlannedRun) -> State | None:
        if run.name in self._jobs and self._jobs[run.name][0].poll() is None:
            return "running"
        if holder(run.folder) is None:
            self._others.pop(run.name, None)
            return None
        self._jobs.pop(run.name, None)  # ours was refused, because another process trains it
        if run.name not in self._others:
            self._others[run.name] = run.folder, read_json(run.folder / SLOT_NAME)
        return "running"

    def ending(self, run: PlannedRun) -> Ending:
        log = last_error(run.folder / LOG_NAME)
        if run.name not in self._jobs:  # the process was another launcher's, or somebody's
            return Ending(log=log)
        status = self._jobs[run.name][0].returncode
        return Ending(exit_status=status, since=written(run.folder / SLOT_NAME), log=log)

    def stop(self) -> str:
        """Ask every run to stop, wait, then kill. A second Ctrl-C kills at once."""
        deadline = time.monotonic() + self.grace_seconds
        try:
            for process in self._send(signal.SIGTERM):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in self._send(signal.SIGKILL):
                process.wait()
        going_on = [name for name, (folder, _) in self._others.items() if holder(folder) is not None]
        if not going_on:
            return "stopped; the same command continues every run from its last resume file"
        return (
            f"{', '.join(going_on)} go on: another process began them; the same command finds them again\n"
            "stopped; the same command continues every other run from its last resume file"
        )

    def _send(self, number: signal.Signals) -> list[subprocess.Popen[bytes]]:
        """Signal every process that lives, with its children."""
        alive = [process for process, _ in self._jobs.values() if process.poll() is None]
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        return alive

    def _free(self) -> list[int]:
        taken = {slot for process, slot in self._jobs.values() if process.poll() is None}
        for folder, place in self._others.values():
            if place is not None and holder(folder) is not None:
                taken |= {slot for slot in range(len(self.environments)) if self._is_shared(slot, place)}
        return [slot for slot in range(len(self.environments)) if slot not in taken]

    def _is_shared(self, slot: int, place: Mapping[str, Any]) -> bool:
        """Whether a slot is, or has a GPU of, the one that a launcher gave away, perhaps for another number of runs at a time."""
        ours, theirs = self.environments[slot].get(_DEVICES), place.get("devices")
        if ours and theirs:
            return not set(_listed(ours)).isdisjoint(_listed(theirs))
        return ours != theirs or slot == place.get("slot")  # none named: all of the machine, if there are any


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
    own = [{_DEVICES: ",".join(gpus[slot * each : (slot + 1) * each])} if gpus else {} for slot in range(jobs)]
    return [shared | devices for devices in own]


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
