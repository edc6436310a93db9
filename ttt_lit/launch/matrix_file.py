"""A matrix file: which arms are trained with which overlays, settings, seeds and ablations. ``docs/matrix.md`` describes it.

Read as records are, every key and type checked; names that become part of a folder or of a run's id are checked here.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ttt_lit.record.codec import ADDED_LATER, decode
from ttt_lit.strict_yaml import read_yaml, require_plain

Settings = dict[str, Any]
"""Dotted name → value, as ``fit`` takes them."""

# They are parts of folder names and, joined by - and _, of run ids.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

SEEDS = ("model.start.seed", "data.seed")

WARNING_SECONDS = 300
"""How long before its end a cluster's job is warned."""
# A job has to start, to save at the next optimiser step after its warning, and to get further than it was: 15 minutes.
_LEAST = {"nodes": 1, "gpus_per_node": 1, "cpus_per_task": 1, "timeout_min": 15, "mem_gb": 0}
# More than that of a baseline's GPU-hours is a percentage that was taken for a share.
_MOST_SHARES = 10


def _optional(default: Any) -> Any:
    """A key that may be left out."""
    return dataclasses.field(default_factory=lambda: default, metadata=ADDED_LATER)


@dataclass(frozen=True, kw_only=True)
class TimeMatch:
    """Budgets as shares of the compute GPU-hours that another arm's run took."""

    of: str
    """The arm."""
    shares: list[float]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One item of ``runs``: a rectangle of arms × (points of the ablation axes) × (shares) × seeds."""

    arms: list[str]
    overlays: list[str] | None = _optional(None)
    set: dict[str, Any] | None = _optional(None)
    seeds: list[int] = _optional([0])
    axes: dict[str, dict[str, Settings | None]] = _optional({})
    """Axis → label → settings; the first label is the default."""
    vary: Literal["one", "product"] = _optional("one")
    gpu_hours: TimeMatch | None = _optional(None)


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """What every job asks the cluster for."""

    partition: str | None = _optional(None)
    account: str | None = _optional(None)
    qos: str | None = _optional(None)
    nodes: int = _optional(1)
    gpus_per_node: int = _optional(8)
    cpus_per_task: int = _optional(8)
    timeout_min: int = _optional(1440)
    mem_gb: int = _optional(0)
    """Per node; 0: all of it."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    name: str
    """First part of every run's id."""
    runs: list[Entry]
    slurm: SlurmSettings = _optional(SlurmSettings())


def read_matrix(path: str | Path) -> Matrix:
    """Parse a matrix file. FileNotFoundError, or a ValueError in one line that names the file and the key."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such matrix file; configs/matrix/ has some")
    return parse_matrix(read_yaml(path), str(path))


def parse_matrix(plain: Any, where: str) -> Matrix:
    """As ``read_matrix``, from plain data; ``where`` names the file in errors."""
    where = f"{where}: matrix"
    matrix: Matrix = decode(Matrix, plain, where, diverged=False)
    _expect_name(matrix.name, f"{where}.name")
    _expect(len(matrix.runs) > 0, [], f"{where}.runs", "a list of at least one entry")
    for key, least in _LEAST.items():
        value = getattr(matrix.slurm, key)
        why = f": a run is warned {WARNING_SECONDS} seconds before its job's end" if key == "timeout_min" else ""
        _expect(value >= least, value, f"{where}.slurm.{key}", f"a whole number ≥ {least}{why}")
    runs = [_checked(entry, f"{where}.runs[{index}]") for index, entry in enumerate(matrix.runs)]
    return dataclasses.replace(matrix, runs=runs)


def _checked(entry: Entry, where: str) -> Entry:
    """The entry with its labels as text."""
    _expect_distinct(entry.arms, f"{where}.arms")
    for arm in entry.arms:
        _expect_name(arm, f"{where}.arms")
    _expect_distinct(entry.seeds, f"{where}.seeds")
    _expect(min(entry.seeds) >= 0, entry.seeds, f"{where}.seeds", "whole numbers of at least 0")
    settings = _settings(entry.set, f"{where}.set")
    axes = {axis: _labels(axis, labels, f"{where}.axes") for axis, labels in entry.axes.items()}
    keys = [(axis, key) for axis, labels in axes.items() for given in labels.values() for key in given or ()]
    for (one, key), (other, also) in itertools.combinations(keys, 2):
        if one != other and overlap(key, also):
            raise ValueError(
                f"{where}.axes: {one} sets {key} and {other} sets {also}, so their points would overwrite each other; make them one axis"
            )
    match = entry.gpu_hours
    if match is not None:
        _expect_name(match.of, f"{where}.gpu_hours.of")
        for share in match.shares:
            expected = f"numbers up to {_MOST_SHARES} (1 is as long as the baseline, 0.35 is 35 %)"
            _expect(0 < share <= _MOST_SHARES, share, f"{where}.gpu_hours.shares", expected)
        _expect_distinct([f"{share:g}" for share in match.shares], f"{where}.gpu_hours.shares, six digits as in an id")
        budgets = {key for key in (*settings, *(key for _, key in keys)) if overlap(key, "model.budget")}
        if budgets:
            raise ValueError(f"{where}: gpu_hours decides the budget; remove {', '.join(sorted(budgets))}")
    return dataclasses.replace(entry, overlays=entry.overlays or [], set=settings, axes=axes)


def _labels(axis: str, labels: Mapping[Any, Settings | None], where: str) -> dict[str, Settings | None]:
    _expect_name(axis, where, _PART)
    where = f"{where}.{axis}"
    _expect(len(labels) > 1, list(labels), where, "at least two labels, each with its settings")
    found: dict[str, Settings | None] = {}
    for given, settings in labels.items():
        # YAML reads on, off, yes and no as truth values.
        _expect(type(given) in (str, int, float), given, where, 'labels that are text or numbers; quote it: "off"')
        label = str(given)
        _expect_name(label, where, _PART)
        _expect(label not in found, label, where, "no label twice (a number and its text are one label)")
        found[label] = _settings(settings, f"{where}.{label}")
    return found


def _settings(given: Settings | None, where: str) -> Settings:
    given = given or {}
    for key, value in given.items():
        is_dotted = isinstance(key, str) and bool(_DOTTED.fullmatch(key))
        _expect(is_dotted, key, where, "dotted names of settings, e.g. {model.inner.lr: 0.5}")
        require_plain(value, where, key)
        for (leaf, _), seed in itertools.product(leaves(value, key), SEEDS):
            if overlap(leaf, seed):
                raise ValueError(f"{where}: {key}: {seed} comes from seeds; remove it here")
        if key.startswith("run."):
            raise ValueError(f"{where}: {key} is the launcher's; remove it (a matrix has a name, and --root)")
    for one, other in itertools.combinations(given, 2):
        if overlap(one, other):
            raise ValueError(f"{where}: {one} and {other} set the same thing twice; write one mapping")
    return given


def _expect_distinct(items: list[Any], where: str) -> None:
    is_distinct = 0 < len(items) == len(set(items))
    _expect(is_distinct, items, where, "a list of at least one item, and no item twice")


def _expect_name(text: Any, where: str, pattern: re.Pattern[str] = _NAME) -> None:
    fits = isinstance(text, str) and bool(pattern.fullmatch(text))
    marks = "_, ." if pattern is _PART else "_, ., -"
    _expect(fits, text, where, f"letters, digits, {marks} (it becomes part of a folder's name)")


def _expect(condition: bool, value: Any, where: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{where}: got {value!r:.80}, expected {expected}")


def overlap(one: str, other: str) -> bool:
    """Whether two dotted names are equal, or one names a group that the other is part of."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every setting that a value names: a mapping is a group, a list is a value."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else key)
    elif name:
        yield name, value
