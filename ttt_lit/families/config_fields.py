"""Reads fields of a parsed config.json and refuses values of the wrong kind by name.

A config is somebody else's file: a float width, a layer count of a billion or a missing field must end in one line, not
in a traceback or in hours of allocation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MAX_LAYERS = 4096
MAX_SIZE = 2**31 - 1


def read_int(config: Mapping[str, Any], name: str, *, default: int | None = None, most: int = MAX_SIZE) -> int:
    """A whole number from 1 to ``most``. Without a default the field is required."""
    value = _value(config, name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"config.json: {name} is {value!r}, expected a whole number from 1 to {most}")
    return value


def read_float(config: Mapping[str, Any], name: str, *, default: float | None = None) -> float:
    """A finite number above zero."""
    value = _value(config, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {name} is {value!r}, expected a positive number")
    return float(value)


def read_bool(config: Mapping[str, Any], name: str, *, default: bool | None = None) -> bool:
    value = _value(config, name, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {name} is {value!r}, expected true or false")
    return value


def read_choice(config: Mapping[str, Any], name: str, choices: Mapping[str, Any], *, default: str | None = None) -> Any:
    """The value that ``choices`` gives to the field's text."""
    value = _value(config, name, default)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"config.json: {name} is {value!r}, expected one of {sorted(choices)}")
    return choices[value]


def _value(config: Mapping[str, Any], name: str, default: Any) -> Any:
    if name in config:
        return config[name]
    if default is None:
        raise ValueError(f"config.json: the field {name} is missing")
    return default
