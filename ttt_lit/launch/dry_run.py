"""What a matrix would do: each run's command, budget, expected GPU-hours and memory, and the sum. Nothing is started."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ttt_lit.launch.command import Check, LaunchOptions, are_refused, placement, planned_runs
from ttt_lit.launch.folder import SOME_HOURS, matched_hours, recorded
from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.plan.advise import USABLE
from ttt_lit.plan.config import NotKnown
from ttt_lit.plan.devices import device_named
from ttt_lit.plan.plan import DEVICE, PlanOptions, planned
from ttt_lit.record.schema import ENDED
from ttt_lit.train.arguments import errors_of


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run is expected to need."""

    gpu_hours: float | None = None
    """None: not known."""
    memory: str = ""
    """Of one device, at the peak of the hungriest stage, in words."""
    no_hours: str = ""
    """Why the GPU-hours are not known."""
    problem: str = ""
    """In place of all of that: why nothing is known."""
    is_refused: bool = False
    """Whether ``fit`` would not train it."""

    def __str__(self) -> str:
        hours = "GPU-hours not known" if self.gpu_hours is None else f"{_hours(self.gpu_hours)} GPU-hours"
        return self.problem or f"{hours}, {self.memory}"


def dry_run(options: LaunchOptions, planning: PlanOptions, *, check: Check = errors_of) -> int:
    """Print what every run of the matrix would be. Returns the exit status: 1 if one would be refused, or its files cannot be read."""
    if planning.shape is not None and not Path(planning.shape).is_file():
        raise FileNotFoundError(f"--shape: {planning.shape} does not exist")
    device_named(planning.device or DEVICE, peak_tflops=planning.peak_tflops, memory_gib=planning.memory_gib)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    matrix, runs = planned_runs(options)
    if are_refused(options, matrix, runs, check):
        return 1
    plans = _Plans(runs, placement(options, matrix), planning)
    costs = []
    for number, run in enumerate(runs, 1):
        lines, cost = plans.described(run)
        print("\n".join([f"[{number}/{len(runs)}] {lines[0]}", *(f"  {line}" for line in lines[1:])]), flush=True)
        costs.append(cost)
    print(_total(costs))
    return 1 if any(cost is not None and cost.is_refused for cost in costs) else 0


class _Plans:
    """What each run is expected to need; runs that differ in their seed alone are planned once."""

    def __init__(self, runs: Sequence[PlannedRun], extra: Sequence[str], planning: PlanOptions) -> None:
        self.runs, self.extra, self.planning = {run.name: run for run in runs}, extra, planning
        self._known: dict[tuple[object, ...], Cost] = {}

    def described(self, run: PlannedRun) -> tuple[list[str], Cost | None]:
        """A run's lines, and what is still to be paid for it; None: it has ended, and is not started again."""
        try:
            found, hours = recorded(run.folder), matched_hours(run, self.runs)
            cost = None if found is not None and found.status in ENDED else self.cost(run, hours)
        except (ValueError, OSError) as error:  # its files; the other runs are not concerned
            cost = _refused(error)
            return [run.name, str(cost)], cost
        match = run.gpu_hours
        given: float | str | None = hours
        budget = "budget in GPU-hours" if run.tokens is None else f"budget {run.tokens:,} tokens"
        if match is not None:
            budget = f"budget {match.share * 100:g} % of {match.of}"
            if hours is None:
                budget += ", which is not finished: the command can run once its GPU-hours are known"
                given = f"<{match.share:g} × GPU-hours of {match.of}>"  # which ``fit`` does not take for a number
        command = shlex.join((*run.with_budget(given), *self.extra))
        name = run.name if found is None else f"{run.name} ({found.status})"
        return [name, f"python cli.py fit {command}", f"{budget}; {cost or 'nothing left to pay'}"], cost

    def cost(self, run: PlannedRun, hours: float | None) -> Cost:
        match, key = run.gpu_hours, (run.entry, run.experiment, run.variant, hours)
        is_open = match is not None and hours is None
        if key not in self._known:
            arguments = [*run.with_budget(SOME_HOURS if is_open else hours), *self.extra]
            self._known[key] = _cost(arguments, self.planning)
        if match is None or not is_open:
            return self._known[key]
        of = self.runs[match.of]
        baseline = self.cost(of, matched_hours(of, self.runs))
        expected = None if baseline.gpu_hours is None else match.share * baseline.gpu_hours
        return replace(self._known[key], gpu_hours=expected, no_hours=baseline.no_hours)


def _cost(arguments: list[str], planning: PlanOptions) -> Cost:
    try:
        _, device, _, stages = planned(arguments, planning)
    except (FileNotFoundError, NotKnown) as error:
        text = " ".join(str(error).split())
        return Cost(problem=f"unknown: {text}", no_hours=text)
    except (ValueError, OSError) as error:
        return _refused(error)
    hours = [stage.device_hours for stage in stages]
    known = None if None in hours else sum(one or 0.0 for one in hours)
    need = max(stage.memory.total for stage in stages)
    memory = f"{need / 2**30:,.3g} GiB" if need >= 2**30 else f"{need / 2**20:,.3g} MiB"
    fits = device.memory_gib is None or need <= USABLE * device.memory_gib * 2**30
    excess = "" if fits else f", MORE THAN {USABLE:.0%} of {device.memory_gib:g} GiB"
    return Cost(
        gpu_hours=known,
        memory=f"{memory} on each device{excess}",
        no_hours="" if known is not None else "the device has no published peak; give --peak-tflops",
    )


def _refused(error: Exception) -> Cost:
    text = " ".join(str(error).split())
    return Cost(problem=f"error: {text}", no_hours=text, is_refused=True)


def _total(costs: Sequence[Cost | None]) -> str:
    """The sum of what is still to be paid, and which runs are not in it."""
    left = [cost for cost in costs if cost is not None]
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
