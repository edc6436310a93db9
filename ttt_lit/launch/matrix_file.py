"""A matrix file: which arms are trained with which overlays, settings, seeds and ablations. ``docs/matrix.md`` describes it.

Reading is strict: an unknown key, a wrong type or a name that cannot be part of a folder is an error that names file and key. The
standard library only.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ttt_lit.launch.matrix_settings import Settings, leaves, overlap
from ttt_lit.strict_yaml import read_yaml, require_plain

# They are parts of folder names and, joined by - and _, of run ids.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

SEEDS = ("model.start.seed", "data.seed")

WARNING_SECONDS = 300
"""How long before its end a cluster's job is warned."""
# A job starts, saves at the next optimiser step after its warning, and has to get further than it was.
_LEAST_MINUTES = 15
# More than that of a baseline's GPU-hours is a percentage that was taken for a share.
_MOST_SHARES = 10


@dataclass(frozen=True, kw_only=True)
class TimeMatch:
    """Budgets as shares of the compute GPU-hours that another arm's run took."""

    of: str
    """The arm."""
    shares: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One item of ``runs``: a rectangle of arms × (points of the ablation axes) × (shares) × seeds."""

    arms: tuple[str, ...]
    overlays: tuple[str, ...] = ()
    set: Settings = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    axes: dict[str, dict[str, Settings]] = field(default_factory=dict)
    """Axis → label → settings; the first label is the default."""
    vary: Literal["one", "product"] = "one"
    gpu_hours: TimeMatch | None = None


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """What every job asks the cluster for."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_task: int = 8
    timeout_min: int = 1440
    mem_gb: int = 0
    """Per node; 0: all of it."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    name: str
    """First part of every run's id."""
    runs: tuple[Entry, ...]
    slurm: SlurmSettings = SlurmSettings()


def read_matrix(path: str | Path) -> Matrix:
    """Parse a matrix file. FileNotFoundError, or a ValueError in one line that names the file and the key."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such matrix file; configs/matrix/ has some")
    return parse_matrix(read_yaml(path), str(path))


def parse_matrix(plain: Any, where: str) -> Matrix:
    """As ``read_matrix``, from plain data; ``where`` names the file in errors."""
    given = _mapping(plain, where, Matrix)
    _need(given, where, "name", "runs")
    name = _string(given["name"], f"{where}: name", _NAME)
    entries = given["runs"]
    _expect(isinstance(entries, list) and entries, entries, f"{where}: runs", "a list of at least one entry")
    return Matrix(
        name=name,
        runs=tuple(_entry(item, f"{where}: runs[{index}]") for index, item in enumerate(entries)),
        slurm=_slurm(given.get("slurm", {}), f"{where}: slurm"),
    )


def _entry(plain: Any, where: str) -> Entry:
    given = _mapping(plain, where, Entry)
    _need(given, where, "arms")
    vary = given.get("vary", "one")
    _expect(vary in ("one", "product"), vary, f"{where}.vary", "one or product")
    seeds = _list(given.get("seeds", [0]), f"{where}.seeds")
    for seed in seeds:
        _expect(type(seed) is int and seed >= 0, seed, f"{where}.seeds", "whole numbers of at least 0")
    entry = Entry(
        arms=tuple(_string(arm, f"{where}.arms", _NAME) for arm in _list(given["arms"], f"{where}.arms")),
        overlays=_overlays(given.get("overlays"), f"{where}.overlays"),
        set=_settings(given.get("set", {}), f"{where}.set"),
        seeds=tuple(seeds),
        axes=_axes(given.get("axes", {}), f"{where}.axes"),
        vary=vary,
        gpu_hours=_time_match(given["gpu_hours"], f"{where}.gpu_hours") if "gpu_hours" in given else None,
    )
    if entry.gpu_hours is not None:
        _refuse_budget(entry, where)
    return entry


def _overlays(plain: Any, where: str) -> tuple[str, ...]:
    plain = [] if plain is None else plain
    _expect(isinstance(plain, list), plain, where, "a list of files: [configs/size/demo.yaml]")
    return tuple(_string(path, where) for path in plain)


def _axes(plain: Any, where: str) -> dict[str, dict[str, Settings]]:
    _expect(isinstance(plain, Mapping), plain, where, "axis names with their labels")
    axes: dict[str, dict[str, Settings]] = {}
    owner: dict[str, str] = {}
    for axis, labels in plain.items():
        name = _string(axis, where, _PART)
        _expect(
            isinstance(labels, Mapping) and len(labels) > 1,
            labels,
            f"{where}.{name}",
            "at least two labels, each with its settings",
        )
        axes[name] = _labels(labels, f"{where}.{name}")
        keys = {key for settings in axes[name].values() for key in settings}
        for key in keys:
            clash = next((other for other in owner if overlap(key, other)), None)
            if clash is not None:
                raise ValueError(
                    f"{where}: {owner[clash]} sets {clash} and {name} sets {key}, so their points would overwrite each other; "
                    "make them one axis"
                )
        owner |= dict.fromkeys(keys, name)
    return axes


def _labels(plain: Mapping[Any, Any], where: str) -> dict[str, Settings]:
    labels: dict[str, Settings] = {}
    for given, settings in plain.items():
        label = _label(given, where)
        if label in labels:
            raise ValueError(
                f"{where}: the label {label} appears twice (a number and its text are one label); rename one"
            )
        labels[label] = _settings(settings, f"{where}.{label}")
    return labels


def _label(plain: Any, where: str) -> str:
    # YAML reads on, off, yes and no as truth values.
    _expect(type(plain) in (str, int, float), plain, where, 'labels that are text or numbers; quote it: "off"')
    return _string(str(plain), where, _PART)


def _settings(plain: Any, where: str) -> Settings:
    plain = {} if plain is None else plain
    _expect(isinstance(plain, Mapping), plain, where, "dotted settings, e.g. {model.inner.lr: 0.5}")
    for key, value in plain.items():
        _expect(isinstance(key, str) and bool(_DOTTED.fullmatch(key)), key, where, "dotted names of settings")
        require_plain(value, where, key)
        seed = next((seed for name, _ in leaves(value, key) for seed in SEEDS if overlap(name, seed)), None)
        if seed is not None:
            raise ValueError(f"{where}: {key}: {seed} comes from seeds; remove it here")
        if key.startswith("run."):
            raise ValueError(f"{where}: {key} is the launcher's; remove it (a matrix has a name, and --root)")
    for one, other in itertools.combinations(plain, 2):
        if overlap(one, other):
            raise ValueError(f"{where}: {one} and {other} set the same thing twice; write one mapping")
    return dict(plain)


def _time_match(plain: Any, where: str) -> TimeMatch:
    given = _mapping(plain, where, TimeMatch)
    _need(given, where, "of", "shares")
    shares = _list(given["shares"], f"{where}.shares")
    named: dict[str, float] = {}  # as the run's id writes it → share
    for share in shares:
        number = type(share) in (int, float) and 0 < share <= _MOST_SHARES
        _expect(
            number,
            share,
            f"{where}.shares",
            f"numbers up to {_MOST_SHARES} (1 is as long as the baseline, 0.35 is 35 %)",
        )
        if f"{share:g}" in named:
            raise ValueError(
                f"{where}.shares: {named[f'{share:g}']} and {share} are both {share:g} in a run's id; remove one, or write shares that "
                "differ in their first six digits"
            )
        named[f"{share:g}"] = share
    return TimeMatch(of=_string(given["of"], f"{where}.of", _NAME), shares=tuple(float(share) for share in shares))


def _refuse_budget(entry: Entry, where: str) -> None:
    everything = [entry.set, *(settings for labels in entry.axes.values() for settings in labels.values())]
    named = {key for settings in everything for key in settings if overlap(key, "model.budget")}
    if named:
        raise ValueError(f"{where}: gpu_hours decides the budget; remove {', '.join(sorted(named))}")


def _slurm(plain: Any, where: str) -> SlurmSettings:
    given = _mapping(plain, where, SlurmSettings)
    for key, value in given.items():
        if key in ("partition", "account", "qos"):
            _expect(value is None or isinstance(value, str), value, f"{where}.{key}", "text")
        elif key == "timeout_min":
            reason = f"a run is warned {WARNING_SECONDS} seconds before its job's end, and has to start, to train and to save"
            enough = type(value) is int and value >= _LEAST_MINUTES
            _expect(enough, value, f"{where}.{key}", f"a whole number of minutes ≥ {_LEAST_MINUTES}: {reason}")
        else:
            least = 0 if key == "mem_gb" else 1
            _expect(type(value) is int and value >= least, value, f"{where}.{key}", f"a whole number ≥ {least}")
    return SlurmSettings(**given)


def _mapping(plain: Any, where: str, kind: type) -> dict[str, Any]:
    """``plain`` if it is a mapping whose keys are fields of the dataclass ``kind``."""
    known = [f.name for f in dataclasses.fields(kind)]
    _expect(isinstance(plain, Mapping), plain, where, f"a mapping with keys of {', '.join(known)}")
    unknown = [str(key) for key in plain if key not in known]
    if unknown:
        raise ValueError(f"{where}: got unknown key {', '.join(unknown)}, expected keys of {', '.join(known)}")
    return dict(plain)


def _need(given: Mapping[str, Any], where: str, *keys: str) -> None:
    missing = [key for key in keys if key not in given]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} is missing")


def _list(plain: Any, where: str) -> list[Any]:
    _expect(isinstance(plain, list) and len(plain) > 0, plain, where, "a list of at least one item")
    _expect(len({repr(item) for item in plain}) == len(plain), plain, where, "no item twice")
    return list(plain)


def _string(plain: Any, where: str, pattern: re.Pattern[str] | None = None) -> str:
    _expect(isinstance(plain, str) and plain != "", plain, where, "text")
    if pattern is not None and not pattern.fullmatch(plain):
        hyphen = "" if pattern is _PART else ", -"
        raise ValueError(
            f"{where}: got {plain!r}, expected letters, digits, _, .{hyphen} (it becomes part of a folder's name)"
        )
    return str(plain)


def _expect(condition: Any, value: Any, where: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{where}: got {value!r:.80}, expected {expected}")
