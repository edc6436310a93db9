"""Settings as dotted names: what files and settings laid over each other come to, and whether two runs train the same.

All of it on the files' text: a launcher starts at once, so it does not load the code that knows the settings' types and defaults. YAML
and the standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt_lit.strict_yaml import read_yaml, require_plain

Settings = dict[str, Any]
"""Dotted name → value, as ``fit`` takes them."""

Read = Callable[[str], Settings]

_STAGES = "model.stages."


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
        for other in [*inside, *(one for one in parents if one in flat), f"{name}+"]:
            flat.pop(other, None)  # a mapping took the place of a value, or a value that of a mapping
        flat[name] = value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def trained(resolved: Settings) -> Settings:
    """The settings that decide what is trained, equal for runs that train the same.

    The run's id is left out, and so is what is said of a stage that is off; a number is its value, however it is written.
    """
    stages = {".".join(name.split(".")[:3]) for name in resolved if name.startswith(_STAGES)}
    off = {
        stage
        for stage in stages
        if resolved.get(f"{stage}.enabled", True) is False or resolved.get(stage, "on") is None
    }
    return {
        name: _by_value(value)
        for name, value in resolved.items()
        if name != "run.id" and ".".join(name.split(".")[:3]) not in off
    }


def _by_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _by_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_by_value(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def difference(one: Settings, other: Settings) -> tuple[str, str, str]:
    """The first setting, by name, that two runs do not share, and its two values as text."""
    texts = [{name: json.dumps(value) for name, value in settings.items()} for settings in (one, other)]
    names = sorted(texts[0].keys() | texts[1].keys())
    name = next(name for name in names if texts[0].get(name) != texts[1].get(name))
    return name, texts[0].get(name, "not set"), texts[1].get(name, "not set")
