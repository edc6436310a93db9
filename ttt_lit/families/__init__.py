"""The one table of checkpoint families, and how a config.json chooses from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttt_lit.families import gemma3, qwen2
from ttt_lit.families.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (qwen2.FAMILY, gemma3.FAMILY)}


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown checkpoint family {name!r}; known are {sorted(FAMILIES)}")
    return FAMILIES[name]


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family that a parsed config.json belongs to, by its ``model_type``.

    Raises:
        ValueError: no or an unknown ``model_type``; the message lists the known ones.
    """
    for family in FAMILIES.values():
        if config.get("model_type") == family.model_type:
            return family
    known = sorted(family.model_type for family in FAMILIES.values())
    raise ValueError(f"config.json: model_type is {config.get('model_type')!r}, expected one of {known}")
