"""From a matrix file to runs: every combination once, with a stable id, the arguments of ``fit`` and what must be finished before.

The standard library only: a launcher starts at once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_lit.launch.matrix_file import SEEDS, Entry, Matrix
from ttt_lit.launch.matrix_settings import Read, Settings, difference, read_settings, resolve, trained

_SEPARATOR = "/"
_MATCH = "gpu_hours"


@dataclass(frozen=True, kw_only=True)
class WallClock:
    """A budget that is known once another run is finished."""

    of: str
    """EXPERIMENT/ID of that run."""
    share: float
    """Share of its compute GPU-hours."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a matrix."""

    experiment: str
    run_id: str
    root: str
    """Folder of all runs."""
    arguments: tuple[str, ...]
    """Of ``fit``; a wall-clock-matched run's budget is still to be added (``with_budget``)."""
    after: tuple[str, ...] = ()
    """EXPERIMENT/ID of the runs that must be finished before this one starts."""
    tokens: int | None = None
    """Budget; None where it is time."""
    gpu_hours: WallClock | None = None
    variant: str = ""
    """Axes that are not at their default, for people: ``b2_budget=5,carry=all``."""
    entry: str = ""
    """The entry of the matrix file that gives it: ``runs[0]``."""

    @property
    def name(self) -> str:
        return f"{self.experiment}{_SEPARATOR}{self.run_id}"

    @property
    def folder(self) -> Path:
        return Path(self.root) / self.experiment / self.run_id

    def with_budget(self, gpu_hours: float | str | None) -> tuple[str, ...]:
        """The complete arguments, with the GPU-hours that ``self.gpu_hours`` came to, or what stands for them."""
        if gpu_hours is None:
            return self.arguments
        return (*self.arguments, "--model.budget.tokens", "null", "--model.budget.gpu_hours", argument(gpu_hours))


def expand(matrix: Matrix, *, configs: str | Path = "configs", root: str | None = None) -> list[PlannedRun]:
    """All runs of a matrix in the file's order, each once.

    Args:
        configs: folder of ``base.yaml`` and of each arm's ``ARM.yaml``.
        root: folder of all runs; None: as the configuration says.

    Raises:
        FileNotFoundError: an arm's or an overlay's file does not exist.
        ValueError: one id with two meanings, a missing baseline, a cycle, a start from a run that is not trained, or an arm whose
            ``run.experiment`` is not its name.
    """
    runs: dict[str, PlannedRun] = {}
    meanings: dict[str, tuple[str, Settings, PlannedRun]] = {}  # name → what it trains
    first: dict[str, str] = {}  # what is trained, as text → the run that trains it
    stands_for: dict[str, str] = {}  # every name that the file gives → the run that trains it
    read = functools.cache(read_settings)
    for index, entry in enumerate(matrix.runs):
        for run, meaning in _runs_of(entry, f"runs[{index}]", matrix.name, str(configs), root, read):
            text = json.dumps(meaning, sort_keys=True)
            stands_for[run.name] = first.setdefault(text, run.name)
            known, settings, before = meanings.setdefault(run.name, (text, meaning, run))
            if known != text:
                raise ValueError(_two_meanings(matrix.name, before, run, difference(settings, meaning)))
            if stands_for[run.name] == run.name:
                runs.setdefault(run.name, run)
    linked = [_linked(run, runs, stands_for) for run in runs.values()]
    _refuse_cycles(matrix.name, linked)
    return linked


def _two_meanings(matrix: str, one: PlannedRun, other: PlannedRun, found: tuple[str, str, str]) -> str:
    name, value, another = found
    if one.entry == other.entry:
        cure = "rename an axis or a label"
    elif name == _MATCH:
        cure = "name one baseline, and write shares that differ in their first six digits"
    else:
        cure = "make them labels of an axis, or give one of them to a matrix with another name"
    places = f"{value} in {one.entry} and {another} in {other.entry}"
    return f"matrix {matrix}: two different settings have the id {one.name}: {name} is {places}; {cure}"


def _runs_of(
    entry: Entry, place: str, name: str, configs: str, root: str | None, read: Read
) -> Iterator[tuple[PlannedRun, Settings]]:
    """The runs of one entry, each with settings that are equal for what trains the same."""
    shares = [None] if entry.gpu_hours is None else list(entry.gpu_hours.shares)
    for arm, point, share, seed in itertools.product(entry.arms, _points(entry), shares, entry.seeds):
        moved = {axis: label for axis, label in point.items() if label != next(iter(entry.axes[axis]))}
        settings = _settings(entry, point, seed) | ({} if root is None else {"run.root": root})
        files = (f"{configs}/{arm}.yaml", *entry.overlays)
        resolved = resolve((f"{configs}/base.yaml", *files), settings, read)
        if resolved.get("run.experiment") != arm:
            raise ValueError(
                f"{files[0]}: run.experiment is {resolved.get('run.experiment')}, expected the arm's name {arm}"
            )
        parts = [name, *(f"{axis}_{label}" for axis, label in moved.items())]
        parts += [] if share is None else [f"t{share:g}"]
        parts += [f"s{seed}"] if seed else []
        variant = ",".join(f"{axis}={label}" for axis, label in moved.items())
        match = None
        if entry.gpu_hours is not None and share is not None:
            match = WallClock(of=_SEPARATOR.join((entry.gpu_hours.of, _baseline(name, seed))), share=share)
        run = PlannedRun(
            experiment=arm,
            run_id="-".join(parts),
            root=str(resolved.get("run.root", "runs")),
            arguments=_arguments(files, settings, "-".join(parts), variant, share),
            after=_named_start(resolved),
            tokens=resolved.get("model.budget.tokens") if match is None else None,
            gpu_hours=match,
            variant=variant,
            entry=place,
        )
        yield run, trained(resolved) | ({} if match is None else {_MATCH: [match.of, match.share]})


def _settings(entry: Entry, point: Mapping[str, str], seed: int) -> Settings:
    """The entry's settings, those of its axes' labels over them, and the seeds."""
    chosen = {key: value for axis, label in point.items() for key, value in entry.axes[axis][label].items()}
    # In this order, so that no group in the entry's settings comes after a label's setting and takes its place.
    return {key: value for key, value in entry.set.items() if key not in chosen} | chosen | dict.fromkeys(SEEDS, seed)


def _points(entry: Entry) -> list[dict[str, str]]:
    """Axis → label: all defaults first, then one axis at a time, or every combination."""
    if entry.vary == "product":
        return [dict(zip(entry.axes, labels, strict=True)) for labels in itertools.product(*entry.axes.values())]
    defaults = {axis: next(iter(labels)) for axis, labels in entry.axes.items()}
    moved = [defaults | {axis: label} for axis, labels in entry.axes.items() for label in list(labels)[1:]]
    return [defaults, *moved]


def _baseline(name: str, seed: int) -> str:
    return f"{name}-s{seed}" if seed else name


def _arguments(
    files: Sequence[str], settings: Mapping[str, Any], run_id: str, variant: str, share: float | None
) -> tuple[str, ...]:
    given = dict(settings) | {"run.id": run_id}
    given |= {"run.variant": variant} if variant else {}
    given |= {"run.share": share} if share is not None else {}
    configs = [part for path in files for part in ("--config", path)]
    return (*configs, *(part for key, value in given.items() for part in (f"--{key}", argument(value))))


def argument(value: Any) -> str:
    """A value as ``fit`` reads it from the command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return json.dumps(value, ensure_ascii=False)


# What a run starts from --------------------------------------------------------------------------------------------------------


def _named_start(resolved: Mapping[str, Any]) -> tuple[str, ...]:
    """EXPERIMENT/ID if the start is a stage's checkpoint below the runs' root: ROOT/EXPERIMENT/ID/checkpoints/STAGE."""
    start, root = resolved.get("model.start.init_from"), resolved.get("run.root", "runs")
    try:
        inside = Path(str(start)).absolute().relative_to(Path(str(root)).absolute()).parts
    except ValueError:
        return ()
    return (_SEPARATOR.join(inside[:2]),) if len(inside) == 4 and inside[2] == "checkpoints" else ()


def _linked(run: PlannedRun, runs: Mapping[str, PlannedRun], stands_for: Mapping[str, str]) -> PlannedRun:
    """The run with its parents inside the matrix. A start from a run outside is that run's own business."""
    for name in run.after:
        if stands_for.get(name, name) != name:
            raise ValueError(
                f"{run.name}: model.start.init_from names {name}, which trains the same as {stands_for[name]} and is not trained again; "
                f"name {stands_for[name]}"
            )
    after = [name for name in run.after if name in runs]
    match = run.gpu_hours
    if match is not None:
        if match.of not in runs or runs[match.of].gpu_hours is not None:
            raise ValueError(
                f"{run.name}: gpu_hours.of needs the run {match.of}, which is not in this matrix; add its arm with the same seed"
            )
        after.append(match.of)
    return dataclasses.replace(run, after=tuple(dict.fromkeys(after)))


def _refuse_cycles(matrix: str, runs: Sequence[PlannedRun]) -> None:
    open_runs = {run.name: set(run.after) for run in runs}
    while free := [name for name, after in open_runs.items() if not after & open_runs.keys()]:
        for name in free:
            del open_runs[name]
    if open_runs:
        raise ValueError(
            f"matrix {matrix}: {', '.join(open_runs)} wait for each other; start one of them from elsewhere"
        )
