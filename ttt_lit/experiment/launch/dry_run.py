"""What a matrix would do: each run's command, budget, expected GPU-hours and memory, and the sum. Nothing is started."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ttt_lit.experiment.devices import device_named
from ttt_lit.experiment.launch.check import Check
from ttt_lit.experiment.launch.command import LaunchOptions, are_refused, planned_runs
from ttt_lit.experiment.launch.folder import NotFinished, matched_budget, recorded
from ttt_lit.experiment.launch.slurm import cluster_arguments
from ttt_lit.experiment.matrix import PlannedRun
from ttt_lit.experiment.plan import PlannedStage, PlanOptions, planned_stage
from ttt_lit.experiment.plan_config import read_run
from ttt_lit.experiment.plan_memory import Setting
from ttt_lit.train.arguments import errors_of
from ttt_lit.train.stage_flops import number_bytes

# They say nothing about work or memory, so runs that differ in them share a plan.
_NO_WORK = ("--run.", "--model.start.seed", "--data.seed", "--trainer.enable_progress_bar", "--trainer.plugins")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run is expected to need."""

    gpu_hours: float | None = None
    """None: not known."""
    memory_bytes: float = 0.0
    """Of one device, at the peak of the hungriest stage."""
    unknown: str = ""
    """Why nothing is known."""
    no_hours: str = ""
    """Why the GPU-hours are not known, and what to do about it."""


def dry_run(options: LaunchOptions, planning: PlanOptions, *, check: Check = errors_of) -> int:
    """Print what every run of the matrix would be. Returns the exit status: 1 if ``fit`` would refuse a run's settings."""
    if planning.shape is not None and not Path(planning.shape).is_file():
        raise FileNotFoundError(f"--shape: {planning.shape} does not exist")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    matrix, runs = planned_runs(options)
    extra = cluster_arguments(matrix.slurm) if options.launcher == "slurm" else ()
    if are_refused(options.config, runs, check):
        return 1
    plans = _Plans(runs, extra, planning)
    for number, run in enumerate(runs):
        print(f"[{number + 1}/{len(runs)}] {run.name}{_state(run)}")
        print(f"  python cli.py fit {shlex.join(plans.arguments(run))}")
        print(f"  {_budget(run)}; {_describe(plans.cost(run))}", flush=True)
    print(_total([plans.cost(run) for run in runs]))
    return 0


class _Plans:
    """What each run is expected to need; runs that differ in nothing that matters for it are planned once."""

    def __init__(self, runs: Sequence[PlannedRun], extra: Sequence[str], planning: PlanOptions) -> None:
        self.runs, self.extra, self.planning = {run.name: run for run in runs}, tuple(extra), planning
        self._known: dict[tuple[str, ...], Cost] = {}

    def arguments(self, run: PlannedRun) -> tuple[str, ...]:
        """Complete, where a wall-clock-matched run's baseline is finished."""
        return (*run.with_budget(self._hours(run)), *self.extra)

    def cost(self, run: PlannedRun) -> Cost:
        key = _work_of(self.arguments(run))
        if key not in self._known:
            self._known[key] = _cost(list(key), self.planning)
        cost = self._known[key]
        if run.gpu_hours is None or self._hours(run) is not None:
            return cost
        baseline = self.cost(self.runs[run.gpu_hours.of])
        expected = None if baseline.gpu_hours is None else run.gpu_hours.share * baseline.gpu_hours
        return replace(cost, gpu_hours=expected, no_hours=baseline.no_hours)

    def _hours(self, run: PlannedRun) -> float | None:
        if run.gpu_hours is None:
            return None
        try:
            match = run.gpu_hours
            return matched_budget(run.folder, match.of, self.runs[match.of].folder, match.share).gpu_hours
        except NotFinished:
            return None


def _work_of(arguments: Sequence[str]) -> tuple[str, ...]:
    """The arguments without those that say nothing about work."""
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return tuple(part for name, value in pairs if not name.startswith(_NO_WORK) for part in (name, value))


def _cost(arguments: list[str], planning: PlanOptions) -> Cost:
    try:
        stages = _planned_stages(arguments, planning)
    except FileNotFoundError as error:
        text, cure = _missing(error)
        return Cost(unknown=text, no_hours=text + cure)
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        return Cost(unknown=text, no_hours=text)
    hours = [stage.device_hours for stage in stages]
    known = None if None in hours else sum(one or 0.0 for one in hours)
    return Cost(
        gpu_hours=known,
        memory_bytes=max(stage.memory.total for stage in stages),
        no_hours="" if known is not None else "the device has no published peak; give --peak-tflops",
    )


def _planned_stages(arguments: list[str], planning: PlanOptions) -> list[PlannedStage]:
    run = read_run(arguments, planning.shape)
    name = planning.device or ("cpu" if run.on_cpu else "h200")
    device = device_named(name, peak_tflops=planning.peak_tflops, memory_gib=planning.memory_gib)
    devices = planning.devices or run.devices
    setting = Setting(devices=devices, on_cpu=device.is_cpu, half=number_bytes(run.precision) == 2)
    return [planned_stage(run, stage, device, setting, planning.utilisation) for stage in run.plans(devices)]


def _missing(error: FileNotFoundError) -> tuple[str, str]:
    """What is missing, and what helps until it is there."""
    text = " ".join(str(error).split())
    before, found, _ = text.partition(" does not exist")
    if not found:
        return text, ""
    return f"{before.split(': ')[-1]} does not exist yet", "; until it does, give the network's shape with --shape FILE"


def _state(run: PlannedRun) -> str:
    found = recorded(run.folder)
    return "" if found is None else f" ({found.status})"


def _budget(run: PlannedRun) -> str:
    if run.gpu_hours is not None:
        return f"budget {run.gpu_hours.share * 100:g} % of {run.gpu_hours.of}"
    return "budget in GPU-hours" if run.tokens is None else f"budget {run.tokens:,} tokens"


def _describe(cost: Cost) -> str:
    if cost.unknown:
        return f"unknown: {cost.unknown}"
    hours = "GPU-hours not known" if cost.gpu_hours is None else f"{_hours(cost.gpu_hours)} GPU-hours"
    memory = (
        f"{cost.memory_bytes / 2**30:,.3g} GiB"
        if cost.memory_bytes >= 2**30
        else f"{cost.memory_bytes / 2**20:,.3g} MiB"
    )
    return f"{hours}, {memory} on each device"


def _total(costs: Sequence[Cost]) -> str:
    known = [cost.gpu_hours for cost in costs if cost.gpu_hours is not None]
    missing = len(costs) - len(known)
    reasons = dict.fromkeys(cost.no_hours for cost in costs if cost.gpu_hours is None)
    why = f" ({'; '.join(reasons)})" if missing else ""
    if not known:
        return f"{len(costs)} runs: GPU-hours not known{why}"
    note = f"; {missing} not known and not in the sum{why}" if missing else ""
    return f"{len(costs)} runs: {_hours(sum(known))} GPU-hours{note}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
