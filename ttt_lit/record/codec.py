"""Dataclasses ↔ plain JSON data, strictly: every field present, nothing else, every value of its annotated type. Only a field whose
metadata are ``ADDED_LATER`` may be missing, and then has its default.

A number that is not finite has no place in JSON. Where a run diverged it is written as null and comes back as NaN; anywhere else it
is an error that names the field. Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

ADDED_LATER = {"added_later": True}
"""For ``dataclasses.field(metadata=)``: files of the same schema version that are older than the field are still read."""


class NotFinite(ValueError):
    """A number that JSON cannot hold, in a run that has not been found to diverge."""

    def __init__(self, where: str, value: float) -> None:
        super().__init__(f"{where}: got {value}, expected a finite number unless status is 'diverged'")
        self.where, self.value = where, value


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file in one step: a reader sees the old one or the new one, never half of it. Its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary, path)


def refuse_constant(name: str) -> None:
    """For ``json.loads``: NaN and Infinity are no JSON."""
    raise ValueError(f"got the number {name}, expected null")


def encode(value: Any, where: str, diverged: bool) -> Any:
    """Plain data for JSON; ``where`` names the value in errors, ``diverged`` allows numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        if diverged:
            return None
        raise NotFinite(where, value)
    if isinstance(value, dict):
        return {str(key): encode(item, f"{where}.{key}", diverged) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item, f"{where}[{index}]", diverged) for index, item in enumerate(value)]
    return value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def decode(kind: Any, value: Any, where: str, diverged: bool) -> Any:
    """``value`` checked against the annotation ``kind``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType or origin is typing.Union:  # a Literal | None is the latter
        inner = next(argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else decode(inner, value, where, diverged)
    if origin is Literal:
        _expect(value in arguments, value, where, f"one of {arguments}")
        return value
    if origin is list:
        _expect(isinstance(value, list), value, where, "a list")
        return [decode(arguments[0], item, f"{where}[{index}]", diverged) for index, item in enumerate(value)]
    if origin is dict:
        _expect(isinstance(value, dict), value, where, "an object")
        return {key: decode(arguments[1], item, f"{where}.{key}", diverged) for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_object(kind, value, where, diverged)
    if kind is float:
        if value is None and diverged:
            return math.nan
        _expect(isinstance(value, (int, float)) and not isinstance(value, bool), value, where, "a number")
        return float(value)
    _expect(type(value) is kind, value, where, f"a value of type {kind.__name__}")
    return value


def _decode_object(kind: Any, value: Any, where: str, diverged: bool) -> Any:
    _expect(isinstance(value, dict), value, where, "an object")
    hints = _hints(kind)
    required = {each.name for each in dataclasses.fields(kind) if "added_later" not in each.metadata}
    unknown, missing = sorted(set(value) - set(hints), key=str), sorted(required - set(value))
    if unknown or missing:
        raise ValueError(
            f"{where}: got unknown fields {unknown} and misses fields {missing}, expected {', '.join(hints)}"
        )
    return kind(**{name: decode(hints[name], item, f"{where}.{name}", diverged) for name, item in value.items()})


def _expect(condition: bool, value: Any, where: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{where}: got {value!r:.80}, expected {expected}")
