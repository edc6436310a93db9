"""What a matrix would do: each run's command, budget, expected GPU-hours and memory, and the sum. Nothing is started."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ttt_lit.experiment.devices import device_named
from ttt_lit.experiment.launch.command import LaunchOptions, planned_runs
from ttt_lit.experiment.launch.folder import NotFinished, matched_budget, recorded
from ttt_lit.experiment.launch.slurm import cluster_arguments
from ttt_lit.experiment.matrix import PlannedRun
from ttt_lit.experiment.plan import PlannedStage, PlanOptions, planned_stage
from ttt_lit.experiment.plan_config import read_run
from ttt_lit.experiment.plan_memory import Setting
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


def dry_run(options: LaunchOptions, planning: PlanOptions) -> int:
    """Print what every run of the matrix would be. Returns the exit status."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    matrix, runs = planned_runs(options)
    extra = cluster_arguments(matrix.slurm) if options.launcher == "slurm" else ()
    plans = _Plans(runs, extra, planning)
    for number, run in enumerate(runs):
        print(f"[{number + 1}/{len(runs)}] {run.name}{_state(run)}")
        print(f"  python cli.py fit {shlex.join(plans.arguments(run))}")
        print(f"  {_budget(run)}; {_describe(plans.cost(run))}", flush=True)
    print(_total([plans.cost(run).gpu_hours for run in runs]))
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
        expected = self.cost(self.runs[run.gpu_hours.of]).gpu_hours
        return replace(cost, gpu_hours=None if expected is None else run.gpu_hours.share * expected)

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
        return Cost(unknown=_missing(error))
    except (ValueError, OSError) as error:
        return Cost(unknown=" ".join(str(error).split()))
    hours = [stage.device_hours for stage in stages]
    return Cost(
        gpu_hours=None if None in hours else sum(one or 0.0 for one in hours),
        memory_bytes=max(stage.memory.total for stage in stages),
    )


def _planned_stages(arguments: list[str], planning: PlanOptions) -> list[PlannedStage]:
    run = read_run(arguments, planning.shape)
    name = planning.device or ("cpu" if run.on_cpu else "h200")
    device = device_named(name, peak_tflops=planning.peak_tflops, memory_gib=planning.memory_gib)
    devices = planning.devices or run.devices
    setting = Setting(devices=devices, on_cpu=device.is_cpu, half=number_bytes(run.precision) == 2)
    return [planned_stage(run, stage, device, setting, planning.utilisation) for stage in run.plans(devices)]


def _missing(error: FileNotFoundError) -> str:
    text = " ".join(str(error).split())
    before, found, _ = text.partition(" does not exist")
    return f"{before.split(': ')[-1]} does not exist yet" if found else text


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


def _total(hours: Sequence[float | None]) -> str:
    known = [one for one in hours if one is not None]
    missing = len(hours) - len(known)
    note = f"; {missing} not known and not in the sum (a CPU needs --peak-tflops)" if missing else ""
    return f"{len(hours)} runs: {_hours(sum(known))} GPU-hours{note}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
