"""What a matrix would do: each run's command, budget, expected GPU-hours and memory, and the sum. Nothing is started."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ttt_lit.launch.check import Check
from ttt_lit.launch.command import LaunchOptions, are_refused, placement, planned_runs
from ttt_lit.launch.folder import SOME_HOURS, matched_hours, recorded
from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.plan.advise import USABLE
from ttt_lit.plan.config import NotKnown, read_run
from ttt_lit.plan.devices import Device, device_named
from ttt_lit.plan.memory import Setting
from ttt_lit.plan.plan import PlannedStage, PlanOptions, planned_stage
from ttt_lit.record.status import ENDED
from ttt_lit.train.arguments import errors_of
from ttt_lit.train.stage_flops import number_bytes

# They say nothing about work or memory, so runs that differ in them share a plan.
_NO_WORK = ("--run.", "--model.start.seed", "--data.seed", "--trainer.enable_progress_bar", "--trainer.plugins")

_DEVICE = "h200"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run is expected to need."""

    gpu_hours: float | None = None
    """None: not known."""
    memory_bytes: float = 0.0
    """Of one device, at the peak of the hungriest stage."""
    too_much: str = ""
    """The memory that a device has for it, if that is less."""
    unknown: str = ""
    """Why nothing is known."""
    no_hours: str = ""
    """Why the GPU-hours are not known, and what to do about it."""
    refused: str = ""
    """Why ``fit`` would not train it."""
    ended: bool = False
    """Whether it will not be started again, so that nothing is left to pay."""


def dry_run(options: LaunchOptions, planning: PlanOptions, *, check: Check = errors_of) -> int:
    """Print what every run of the matrix would be. Returns the exit status: 1 if one would be refused, or its files cannot be read."""
    if planning.shape is not None and not Path(planning.shape).is_file():
        raise FileNotFoundError(f"--shape: {planning.shape} does not exist")
    device_named(planning.device or _DEVICE, peak_tflops=planning.peak_tflops, memory_gib=planning.memory_gib)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    matrix, runs = planned_runs(options)
    if are_refused(options, matrix, runs, check):
        return 1
    plans = _Plans(runs, placement(options, matrix), planning)
    costs = []
    for number, run in enumerate(runs):
        lines, cost = _described(run, plans)
        print("\n".join([f"[{number + 1}/{len(runs)}] {lines[0]}", *lines[1:]]), flush=True)
        costs.append(cost)
    print(_total(costs))
    return 1 if any(cost.refused for cost in costs) else 0


def _described(run: PlannedRun, plans: _Plans) -> tuple[list[str], Cost]:
    """A run's lines, and what is still to be paid for it."""
    try:
        status = _status(run)
        command, budget = shlex.join(plans.command(run)), plans.budget(run)
        # Nothing of a run that has ended is still to be paid: it is not started again.
        cost = Cost(ended=True) if status in ENDED else plans.cost(run)
    except (ValueError, OSError) as error:  # its files; the other runs are not concerned
        cost = _refused(error)
        return [run.name, f"  {_describe(cost)}"], cost
    name = run.name if status is None else f"{run.name} ({status})"
    return [name, f"  python cli.py fit {command}", f"  {budget}; {_describe(cost)}"], cost


class _Plans:
    """What each run is expected to need; runs that differ in nothing that matters for it are planned once."""

    def __init__(self, runs: Sequence[PlannedRun], extra: Sequence[str], planning: PlanOptions) -> None:
        self.runs, self.extra, self.planning = {run.name: run for run in runs}, tuple(extra), planning
        self._known: dict[tuple[str, ...], Cost] = {}

    def command(self, run: PlannedRun) -> tuple[str, ...]:
        """Arguments of ``fit``. A budget that is not known yet is said in words, which ``fit`` does not take for a number."""
        match, hours = run.gpu_hours, matched_hours(run, self.runs)
        is_open = match is not None and hours is None
        words = f"<{match.share:g} × GPU-hours of {match.of}>" if match is not None else None
        return (*run.with_budget(words if is_open else hours), *self.extra)

    def budget(self, run: PlannedRun) -> str:
        match = run.gpu_hours
        if match is None:
            return "budget in GPU-hours" if run.tokens is None else f"budget {run.tokens:,} tokens"
        share = f"budget {match.share * 100:g} % of {match.of}"
        if matched_hours(run, self.runs) is not None:
            return share
        return f"{share}, which is not finished: the command can run once its GPU-hours are known"

    def cost(self, run: PlannedRun) -> Cost:
        match, hours = run.gpu_hours, matched_hours(run, self.runs)
        is_open = match is not None and hours is None
        key = _work_of((*run.with_budget(SOME_HOURS if is_open else hours), *self.extra))
        if key not in self._known:
            self._known[key] = _cost(list(key), self.planning)
        cost = self._known[key]
        if match is None or not is_open:
            return cost
        baseline = self.cost(self.runs[match.of])
        expected = None if baseline.gpu_hours is None else match.share * baseline.gpu_hours
        return replace(cost, gpu_hours=expected, no_hours=baseline.no_hours)


def _work_of(arguments: Sequence[str]) -> tuple[str, ...]:
    """The arguments without those that say nothing about work."""
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return tuple(part for name, value in pairs if not name.startswith(_NO_WORK) for part in (name, value))


def _cost(arguments: list[str], planning: PlanOptions) -> Cost:
    try:
        stages, device = _planned_stages(arguments, planning)
    except FileNotFoundError as error:
        text, cure = _missing(error)
        return Cost(unknown=text, no_hours=text + cure)
    except NotKnown as error:
        return Cost(unknown=str(error), no_hours=str(error))
    except (ValueError, OSError) as error:
        return _refused(error)
    hours = [stage.device_hours for stage in stages]
    known = None if None in hours else sum(one or 0.0 for one in hours)
    memory = max(stage.memory.total for stage in stages)
    fits = device.memory_gib is None or memory <= USABLE * device.memory_gib * 2**30
    return Cost(
        gpu_hours=known,
        memory_bytes=memory,
        too_much="" if fits else f"{USABLE:.0%} of {device.memory_gib:g} GiB",
        no_hours="" if known is not None else "the device has no published peak; give --peak-tflops",
    )


def _refused(error: Exception) -> Cost:
    text = " ".join(str(error).split())
    return Cost(refused=text, no_hours=text)


def _planned_stages(arguments: list[str], planning: PlanOptions) -> tuple[list[PlannedStage], Device]:
    run = read_run(arguments, planning.shape)
    name = planning.device or ("cpu" if run.on_cpu else _DEVICE)
    device = device_named(name, peak_tflops=planning.peak_tflops, memory_gib=planning.memory_gib)
    devices = planning.devices or run.devices
    setting = Setting(devices=devices, on_cpu=device.is_cpu, half=number_bytes(run.precision) == 2)
    stages = [planned_stage(run, stage, device, setting, planning.utilisation) for stage in run.plans(devices)]
    return stages, device


def _missing(error: FileNotFoundError) -> tuple[str, str]:
    """What is missing, and what helps until it is there."""
    text = " ".join(str(error).split())
    before, found, _ = text.partition(" does not exist")
    if not found:
        return text, ""
    return f"{before.split(': ')[-1]} does not exist yet", "; until it does, give the network's shape with --shape FILE"


def _status(run: PlannedRun) -> str | None:
    found = recorded(run.folder)
    return None if found is None else found.status


def _describe(cost: Cost) -> str:
    if cost.ended:
        return "nothing left to pay"
    if cost.refused:
        return f"error: {cost.refused}"
    if cost.unknown:
        return f"unknown: {cost.unknown}"
    hours = "GPU-hours not known" if cost.gpu_hours is None else f"{_hours(cost.gpu_hours)} GPU-hours"
    memory = (
        f"{cost.memory_bytes / 2**30:,.3g} GiB"
        if cost.memory_bytes >= 2**30
        else f"{cost.memory_bytes / 2**20:,.3g} MiB"
    )
    excess = f", MORE THAN {cost.too_much}" if cost.too_much else ""
    return f"{hours}, {memory} on each device{excess}"


def _total(costs: Sequence[Cost]) -> str:
    """The sum of what is still to be paid, and which runs are not in it."""
    left = [cost for cost in costs if not cost.ended]
    known = [cost.gpu_hours for cost in left if cost.gpu_hours is not None]
    missing, ended = len(left) - len(known), len(costs) - len(left)
    reasons = dict.fromkeys(cost.no_hours for cost in left if cost.gpu_hours is None)
    why = f" ({'; '.join(reasons)})" if missing else ""
    parts = [f"{ended} finished or diverged and not in the sum"] if ended else []
    if missing and not known:
        return "; ".join([f"{len(costs)} runs: GPU-hours not known{why}", *parts])
    parts += [f"{missing} not known and not in the sum{why}"] if missing else []
    to_pay = " left to pay" if ended else ""
    return "; ".join([f"{len(costs)} runs: {_hours(sum(known))} GPU-hours{to_pay}", *parts])


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
