"""From a matrix file to runs: every combination once, with a stable id, the arguments of ``fit`` and what must be finished before.

What trains the same is told by the text of the files: the code that knows the settings' types and defaults is not loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import graphlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_lit.launch.matrix_file import SEEDS, Entry, Matrix, Settings, leaves
from ttt_lit.strict_yaml import read_yaml, require_plain

_MATCH = "gpu_hours"
_STAGES = "model.stages."

Read = Callable[[str], Settings]


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
        return f"{self.experiment}/{self.run_id}"

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
    meanings: dict[str, tuple[Settings, PlannedRun]] = {}  # name → what it trains
    first: dict[str, str] = {}  # what is trained, as text → the run that trains it
    stands_for: dict[str, str] = {}  # every name that the file gives → the run that trains it
    read = functools.cache(read_settings)
    for index, entry in enumerate(matrix.runs):
        for run, meaning in _runs_of(entry, f"runs[{index}]", matrix.name, str(configs), root, read):
            stands_for[run.name] = first.setdefault(json.dumps(meaning, sort_keys=True), run.name)
            _refuse_two_meanings(matrix.name, *meanings.setdefault(run.name, (meaning, run)), meaning, run)
            if stands_for[run.name] == run.name:
                runs.setdefault(run.name, run)
    linked = [_linked(run, runs, stands_for) for run in runs.values()]
    try:
        graphlib.TopologicalSorter({run.name: run.after for run in linked}).prepare()
    except graphlib.CycleError as error:
        names = ", ".join(sorted(set(error.args[1])))
        raise ValueError(
            f"matrix {matrix.name}: {names} wait for each other; start one of them from elsewhere"
        ) from error
    return linked


def _runs_of(
    entry: Entry, place: str, name: str, configs: str, root: str | None, read: Read
) -> Iterator[tuple[PlannedRun, Settings]]:
    """The runs of one entry, each with settings that are equal for what trains the same."""
    shares = [None] if entry.gpu_hours is None else entry.gpu_hours.shares
    for arm, point, share, seed in itertools.product(entry.arms, _points(entry), shares, entry.seeds):
        moved = {axis: label for axis, label in point.items() if label != next(iter(entry.axes[axis]))}
        settings = _settings(entry, point, seed) | ({} if root is None else {"run.root": root})
        files = (f"{configs}/{arm}.yaml", *(entry.overlays or ()))
        resolved = resolve((f"{configs}/base.yaml", *files), settings, read)
        if resolved.get("run.experiment") != arm:
            raise ValueError(
                f"{files[0]}: run.experiment is {resolved.get('run.experiment')}, expected the arm's name {arm}"
            )
        of_seed = [f"s{seed}"] if seed else []
        of_share = [] if share is None else [f"t{share:g}"]
        run_id = "-".join([name, *(f"{axis}_{label}" for axis, label in moved.items()), *of_share, *of_seed])
        variant = ",".join(f"{axis}={label}" for axis, label in moved.items())
        match = None
        if entry.gpu_hours is not None and share is not None:
            match = WallClock(of=f"{entry.gpu_hours.of}/{'-'.join([name, *of_seed])}", share=share)
        given = settings | {"run.id": run_id}
        given |= {"run.variant": variant} if variant else {}
        given |= {"run.share": share} if share is not None else {}
        run = PlannedRun(
            experiment=arm,
            run_id=run_id,
            root=str(resolved.get("run.root", "runs")),
            arguments=_arguments(files, given),
            after=_named_start(resolved),
            tokens=resolved.get("model.budget.tokens") if match is None else None,
            gpu_hours=match,
            variant=variant,
            entry=place,
        )
        yield run, trained(resolved) | ({} if match is None else {_MATCH: [match.of, match.share]})


def _settings(entry: Entry, point: Mapping[str, str], seed: int) -> Settings:
    """The entry's settings, those of its axes' labels over them, and the seeds."""
    chosen = {key: value for axis, label in point.items() for key, value in (entry.axes[axis][label] or {}).items()}
    # In this order, so that no group in the entry's settings comes after a label's setting and takes its place.
    others = {key: value for key, value in (entry.set or {}).items() if key not in chosen}
    return others | chosen | dict.fromkeys(SEEDS, seed)


def _points(entry: Entry) -> list[dict[str, str]]:
    """Axis → label: all defaults first, then one axis at a time, or every combination."""
    if entry.vary == "product":
        return [dict(zip(entry.axes, labels, strict=True)) for labels in itertools.product(*entry.axes.values())]
    defaults = {axis: next(iter(labels)) for axis, labels in entry.axes.items()}
    moved = [defaults | {axis: label} for axis, labels in entry.axes.items() for label in list(labels)[1:]]
    return [defaults, *moved]


def _arguments(files: Sequence[str], given: Settings) -> tuple[str, ...]:
    configs = [part for path in files for part in ("--config", path)]
    return (*configs, *(part for key, value in given.items() for part in (f"--{key}", argument(value))))


def argument(value: Any) -> str:
    """A value as ``fit`` reads it from the command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return json.dumps(value, ensure_ascii=False)


def _refuse_two_meanings(matrix: str, settings: Settings, one: PlannedRun, also: Settings, other: PlannedRun) -> None:
    """ValueError with the first setting, by name, in which two runs of one id differ."""
    texts = [{name: json.dumps(value, sort_keys=True) for name, value in each.items()} for each in (settings, also)]
    names = sorted(texts[0].keys() | texts[1].keys())
    name = next((name for name in names if texts[0].get(name) != texts[1].get(name)), None)
    if name is None:
        return
    if one.entry == other.entry:
        cure = "rename an axis or a label"
    elif name == _MATCH:
        cure = "name one baseline, and write shares that differ in their first six digits"
    else:
        cure = "make them labels of an axis, or give one of them to a matrix with another name"
    value, another = (text.get(name, "not set") for text in texts)
    raise ValueError(
        f"matrix {matrix}: two different settings have the id {one.name}: {name} is {value} in {one.entry} and {another} in "
        f"{other.entry}; {cure}"
    )


# What a run starts from --------------------------------------------------------------------------------------------------------


def _named_start(resolved: Mapping[str, Any]) -> tuple[str, ...]:
    """EXPERIMENT/ID if the start is a stage's checkpoint below the runs' root: ROOT/EXPERIMENT/ID/checkpoints/STAGE."""
    start, root = resolved.get("model.start.init_from"), resolved.get("run.root", "runs")
    try:
        inside = Path(str(start)).absolute().relative_to(Path(str(root)).absolute()).parts
    except ValueError:
        return ()
    return ("/".join(inside[:2]),) if len(inside) == 4 and inside[2] == "checkpoints" else ()


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


# What files and settings laid over each other come to ------------------------------------------------------------------------------


def read_settings(path: str) -> Settings:
    """Dotted name → value of an arm's or an overlay's file."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a matrix names arms (configs/ARM.yaml) and overlays by their path"
        )
    plain = read_yaml(path)
    if not isinstance(plain, Mapping | None):
        raise ValueError(
            f"{path}: got {plain!r:.80}, expected a mapping of settings, e.g. model: {{inner: {{lr: 0.5}}}}"
        )
    require_plain(plain, path)
    return dict(leaves(plain or {}, ""))


def resolve(files: Sequence[str], settings: Settings, read: Read) -> Settings:
    """Dotted name → value after all files and settings, later ones over earlier ones."""
    flat: Settings = {}
    for path in files:
        _overlay(flat, read(path))
    _overlay(flat, {leaf: value for name, given in settings.items() for leaf, value in leaves(given, name)})
    return flat


def _overlay(flat: Settings, later: Settings) -> None:
    for name, value in later.items():
        if name.endswith("+"):  # callbacks+: more of a list
            extended = name[:-1] if name[:-1] in flat else name
            flat[extended] = [*_listed(flat.get(extended, [])), *_listed(value)]
            continue
        inside = [one for one in flat if one.startswith(f"{name}.")]
        if value == {} and inside:
            continue  # an empty mapping over a group changes nothing of it
        parents = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
        for other in [*inside, *parents, f"{name}+"]:
            flat.pop(other, None)  # a mapping took the place of a value, or a value that of a mapping
        flat[name] = value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def trained(resolved: Settings) -> Settings:
    """The settings that decide what is trained, equal for runs that train the same.

    The run's id is left out, and so is what is said of a stage that is off; a number is its value, however it is written.
    """
    stage_of = {name: ".".join(name.split(".")[:3]) for name in resolved if name.startswith(_STAGES)}
    off = [
        stage
        for stage in set(stage_of.values())
        if resolved.get(f"{stage}.enabled", True) is False or resolved.get(stage, "on") is None
    ]
    return {
        name: _by_value(value) for name, value in resolved.items() if name != "run.id" and stage_of.get(name) not in off
    }


def _by_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _by_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_by_value(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
