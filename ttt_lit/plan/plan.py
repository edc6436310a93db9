"""What a run will cost, before it starts: work, time and memory of every stage on a named device."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ttt_lit.model.spec import ModelSpec
from ttt_lit.plan.advise import USABLE, Stage, describe, recommended
from ttt_lit.plan.announced import announced
from ttt_lit.plan.config import PlannedRun, read_run
from ttt_lit.plan.devices import Device, device_named
from ttt_lit.plan.memory import PARTS, Setting, StageMemory, stage_memory
from ttt_lit.record.codec import write_atomic
from ttt_lit.report.table import Table
from ttt_lit.train.stage_flops import number_bytes, stage_flops
from ttt_lit.train.stages import StagePlan
from ttt_lit.ttt.flops import FlopCount
from ttt_lit.verdict.formats import ranges

DEVICE = "h200"
UTILISATION = 0.4
"""Share of the peak that is assumed where nothing else is given."""

_GIB = 2**30
_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What ``plan`` is asked beside the run's own configuration."""

    shape: str | None = None
    device: str | None = None
    devices: int | None = None
    utilisation: float = UTILISATION
    peak_tflops: float | None = None
    memory_gib: float | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"--utilisation: got {self.utilisation}, expected more than 0 and at most 1")
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"--devices: got {self.devices}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    plan: StagePlan
    spec: ModelSpec
    """With the stage's window."""
    teacher: ModelSpec | None
    flops: FlopCount
    memory: StageMemory
    ceiling: float | None
    """Tokens per second of one device at its peak; None where that is not known."""
    expected: float | None

    @property
    def tokens(self) -> float | None:
        """Of the whole stage; what the expected rate reads where time decides."""
        seconds = self.plan.budget.seconds
        if seconds is None:
            return self.plan.tokens
        return None if self.expected is None else seconds * self.expected

    @property
    def device_hours(self) -> float | None:
        if self.plan.budget.seconds is not None:
            return self.plan.budget.seconds / 3600
        return None if self.expected is None or self.plan.tokens is None else self.plan.tokens / self.expected / 3600


def plan(arguments: list[str], options: PlanOptions) -> str:
    """Print the plan of a run; ``arguments`` are those of ``fit``. With ``output``, write it to that folder's ``plan.md`` too.

    Returns the console text.
    """
    run, device, setting, stages = planned(arguments, options)
    notes = list(_notes(run, stages, device, setting, options.utilisation))
    tables = [_work(stages), _flops(stages), _memory(stages, device)]
    title = f"{run.name} on {setting.devices} × {device.name}"
    wrapped = "\n".join(textwrap.fill(note, _WIDTH, subsequent_indent="  ") for note in notes)
    text = "\n\n".join([title, *(table.text() for table in tables), wrapped])
    if options.output is not None:
        blocks = [f"# {title}", *(table.markdown() for table in tables), "\n".join(f"- {note}" for note in notes)]
        write_atomic(Path(options.output) / "plan.md", "\n\n".join(blocks) + "\n")
    print(text)
    return text


def planned(arguments: list[str], options: PlanOptions) -> tuple[PlannedRun, Device, Setting, list[PlannedStage]]:
    """Plan the stages of a run; ``arguments`` are those of ``fit``. FileNotFoundError or NotKnown: it cannot be known yet."""
    run = read_run(arguments, options.shape)
    name = options.device or ("cpu" if run.on_cpu else DEVICE)
    device = device_named(name, peak_tflops=options.peak_tflops, memory_gib=options.memory_gib)
    devices = options.devices or run.devices
    setting = Setting(devices=devices, on_cpu=device.is_cpu, half=number_bytes(run.precision) == 2)
    stages = [_planned_stage(run, stage, device, setting, options.utilisation) for stage in run.plans(devices)]
    return run, device, setting, stages


def _planned_stage(
    run: PlannedRun, stage: StagePlan, device: Device, setting: Setting, utilisation: float
) -> PlannedStage:
    """One stage's work, expected time and memory on a device."""
    spec, engine = stage.network(run.spec), run.module.engine
    teacher = run.origin.spec if stage.config.teacher_kl else None
    flops = stage_flops(spec, stage, engine, precision=run.precision, teacher=teacher)
    ceiling = None if device.peak_tflops is None else device.peak_tflops * 1e12 / flops.total
    with announced(f"stage {stage.name} of {run.name.partition('/')[0]}: measuring memory …"):
        memory = stage_memory(spec, stage, engine, setting, teacher=teacher)
    return PlannedStage(
        plan=stage,
        spec=spec,
        teacher=teacher,
        flops=flops,
        memory=memory,
        ceiling=ceiling,
        expected=None if ceiling is None else ceiling * utilisation,
    )


def _work(stages: Sequence[PlannedStage]) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            stage.plan.name,
            stage.plan.config.mode,
            f"{stage.plan.context:,}",
            "dense" if stage.plan.window is None else f"{stage.plan.window:,} + {stage.plan.sink_tokens}",
            "–" if stage.plan.budget.steps is None else f"{stage.plan.budget.steps:,}",
            _tokens(stage.tokens),
            _number(stage.ceiling, 0),
            _number(stage.expected, 0),
            _number(stage.device_hours, 1),
        )
        for stage in stages
    ]
    if len(rows) > 1:
        tokens, hours = ([getattr(s, name) for s in stages] for name in ("tokens", "device_hours"))
        whole = (_tokens(_sum(tokens)), "", "", _number(_sum(hours), 1))
        rows.append(("all", "", "", "", f"{sum(s.plan.budget.steps or 0 for s in stages):,}", *whole))
    return Table(
        title="Stages (rates in tokens/s of one device)",
        header=("stage", "mode", "context", "window + sinks", "steps", "tokens", "ceiling", "expected", "GPU-hours"),
        rows=tuple(rows),
    )


def _flops(stages: Sequence[PlannedStage]) -> Table:
    names = {
        "attention_projections": "attention: projections",
        "attention_scores": "attention: scores",
        "mlp": "ordinary MLPs",
        "prime": "prime MLPs",
        "head": "head",
    }
    parts = [stage.flops.parts() | {"total": stage.flops.total} for stage in stages]
    rows = [
        (names.get(name, name), *(f"{of[name] / 1e9:,.3g}" for of in parts))
        for name in parts[0]
        if name != "teacher" or any(of[name] for of in parts)
    ]
    title = "Work (10⁹ operations per token; what is computed twice is counted twice)"
    return Table(title=title, header=("", *(stage.plan.name for stage in stages)), rows=tuple(rows))


def _memory(stages: Sequence[PlannedStage], device: Device) -> Table:
    memories = [stage.memory for stage in stages]
    unit, size = ("GiB", _GIB) if max(m.total for m in memories) >= _GIB else ("MiB", 2**20)
    rows: list[tuple[str, ...]] = [
        (name, *(f"{m.parts.get(name, 0.0) / size:,.1f}" for m in memories))
        for name in PARTS
        if any(m.parts.get(name) for m in memories)
    ]
    rows.append(("total", *(f"{m.total / size:,.1f}" for m in memories)))
    if device.memory_gib is not None:
        limit = f"within {USABLE:.0%} of {device.memory_gib:g} GiB"
        rows.append((limit, *("yes" if _fits(m, device) else "NO" for m in memories)))
    return Table(
        title=f"Memory of one device at its peak ({unit})",
        header=("", *(stage.plan.name for stage in stages)),
        rows=tuple(rows),
    )


def _notes(
    run: PlannedRun, stages: Sequence[PlannedStage], device: Device, setting: Setting, utilisation: float
) -> Iterator[str]:
    layers = run.spec.ttt_layers
    learning = f"TTT layers {ranges(layers)}" if layers else "no TTT layers"
    yield f"Network: {run.spec.num_parameters() / 1e9:.3g} × 10⁹ parameters, {learning}; shape from {run.shape}."
    if device.peak_tflops is None:
        yield "Time: not known without a peak; give --peak-tflops."
    else:
        yield (
            f"Ceiling: {device.peak_tflops:g} × 10¹² dense bf16 operations per second. Expected: {utilisation:.0%} of it, which is assumed "
            "(--utilisation), not measured. Validation and checkpoints are not in the hours."
        )
    hours = _sum([stage.device_hours for stage in stages])
    if hours is not None and setting.devices > 1:
        yield f"All stages: {hours:,.1f} GPU-hours are {hours / setting.devices:,.1f} hours on {setting.devices} devices."
    if not setting.half and not device.is_cpu:
        yield (
            f"Precision {run.precision}: products in float32 are several times slower than the bf16 peak that the times are taken from; "
            "plan --trainer.precision bf16-mixed."
        )
    if device.memory_gib is not None:
        yield from _advice(run, stages, device, setting)


def _advice(run: PlannedRun, stages: Sequence[PlannedStage], device: Device, setting: Setting) -> Iterator[str]:
    engine, limit = run.module.engine, (device.memory_gib or 0) * _GIB * USABLE
    if not all(_fits(stage.memory, device) for stage in stages):
        yield f"This run does not fit with {describe(engine)}."
    found = recommended([Stage(s.spec, s.plan, s.teacher) for s in stages], engine, setting, limit)
    if found is None:
        yield "No engine setting fits: lower --model.size.micro_batch_tokens, or use more devices (--devices)."
    elif found.engine == engine:
        yield f"No setting that fits needs less work than {describe(engine)}."
    else:
        before = sum(s.flops.total * (s.plan.tokens or 1) for s in stages)
        yield (
            f"Least work that fits: {describe(found.engine)} ({found.operations / before - 1:+.1%} work, "
            f"{found.peak / _GIB:.1f} GiB)."
        )


def _fits(memory: StageMemory, device: Device) -> bool:
    return device.memory_gib is None or memory.total <= device.memory_gib * _GIB * USABLE


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _tokens(count: float | None) -> str:
    if count is None:
        return "–"
    return f"{count / 1e9:,.2f} × 10⁹" if count >= 1e8 else f"{count:,.0f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
