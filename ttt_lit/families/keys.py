"""Reversible rename rules between a checkpoint family's parameter names and ours.

A rule is a pair of templates. ``{layer}`` stands for a layer index in canonical decimal form, ``{part}`` for a dotted
name of letters and underscores; both sides of a rule use the same placeholders. The first rule that matches decides. A
key that no rule matches is reported, never guessed: a permissive map is how re-initialised weights go unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

_PLACEHOLDERS = {"layer": r"(?:0|[1-9][0-9]{0,5})", "part": r"[A-Za-z_]+(?:\.[A-Za-z_]+)*"}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One pair of name templates."""

    theirs: str
    """Template of the name in the family's own checkpoints."""
    ours: str
    """Template of the name in ``ModelSpec.parameter_shapes``."""

    def __post_init__(self) -> None:
        found = [sorted(re.findall(r"{(\w*)}", side)) for side in (self.theirs, self.ours)]
        if found[0] != found[1] or not set(found[0]) <= set(_PLACEHOLDERS):
            raise ValueError(
                f"Rule {self.theirs!r} <-> {self.ours!r}: both sides need the same of {list(_PLACEHOLDERS)}"
            )


@dataclass(frozen=True)
class RenameRules:
    """An ordered list of rules, applied in either direction."""

    rules: tuple[Rule, ...]

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], str, re.Pattern[str], str], ...]:
        return tuple((_pattern(r.theirs), r.theirs, _pattern(r.ours), r.ours) for r in self.rules)

    def to_ours(self, key: str) -> str | None:
        """Our name of a stored key, or None when no rule knows it."""
        return next((ours.format(**m.groupdict()) for p, _, _, ours in self._patterns if (m := p.fullmatch(key))), None)

    def to_theirs(self, name: str) -> str | None:
        """The family's name of one of our parameters, or None when the family has no such parameter."""
        return next((t.format(**m.groupdict()) for _, t, p, _ in self._patterns if (m := p.fullmatch(name))), None)

    def map_to_theirs(self, names: Iterable[str]) -> dict[str, str]:
        """Our name -> the family's name, for all ``names``.

        Raises:
            ValueError: a name that no rule knows, or two names that meet in one key; the message lists them all.
        """
        mapped = {name: self.to_theirs(name) for name in names}
        unmatched = [name for name, theirs in mapped.items() if theirs is None]
        if unmatched:
            raise ValueError(f"no rename rule for {_listed(unmatched)}: this family has no parameter of that name")
        result = {name: theirs for name, theirs in mapped.items() if theirs is not None}
        if len(set(result.values())) != len(result):
            twice = sorted({t for t in result.values() if list(result.values()).count(t) > 1})
            raise ValueError(f"rename rules map several parameters to {_listed(twice)}")
        return result


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"{(\w+)}", template)
    return re.compile(
        "".join(f"(?P<{p}>{_PLACEHOLDERS[p]})" if i % 2 else re.escape(p) for i, p in enumerate(pieces)), re.ASCII
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
