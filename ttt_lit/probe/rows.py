"""What a probe has measured: one row per measurement and block, from which every figure is made, again after each row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ttt_lit.verdict.statistics import Interval, mean_interval

Key = tuple[str | int | float | None, ...]
"""What was measured: its name and settings.

``imported``; ``damage``, window, sinks; ``ceiling``, window, stride; ``inner``, window (None: as imported), sinks, rate; ``layer``, window,
sinks, layers kept at their imported attention.
"""
IMPORTED: Key = ("imported",)


def common_blocks(tables: Iterable[Mapping[str, Any]]) -> list[str]:
    """The blocks that all of them have, sorted: only on those are means comparable."""
    return sorted(set.intersection(*found)) if (found := [set(table) for table in tables]) else []


class Rows:
    """Measured values by key and block."""

    def __init__(self) -> None:
        self._rows: dict[Key, dict[str, dict[str, Any]]] = {}
        self._documents: dict[str, int] = {}
        self._intervals: dict[tuple[tuple[str, float], ...], Interval] = {}

    def add(self, key: Key, block: str, document: int, values: Mapping[str, Any]) -> None:
        self._rows.setdefault(key, {})[block] = dict(values)
        self._documents[block] = document

    def has(self, key: Key, block: str) -> bool:
        return block in self._rows.get(key, {})

    def keys(self, item: str) -> list[Key]:
        """All that were measured of one item, sorted by their settings; None (no window) first."""
        found = [key for key in self._rows if key[0] == item]
        return sorted(found, key=lambda key: [(value is not None, value or 0) for value in key[1:]])

    def column(self, key: Key, name: str) -> dict[str, Any]:
        """Block → value."""
        return {block: values[name] for block, values in self._rows.get(key, {}).items()}

    def difference(self, key: Key, other: Key) -> dict[str, float]:
        """Loss of one minus loss of the other, on the blocks that both have."""
        mine, theirs = self.column(key, "loss"), self.column(other, "loss")
        return {block: mine[block] - theirs[block] for block in mine if block in theirs}

    def interval(self, values: Mapping[str, float], name: str = "nats") -> dict[str, Any]:
        """Mean of values by block, with its 95 % interval over documents; null ends where there is one document alone."""
        # Every figure is made again after each row, and most have not changed.
        same = tuple(sorted(values.items()))
        if same not in self._intervals:
            self._intervals[same] = mean_interval([values], documents=self._documents)
        found = self._intervals[same]
        ends = (found.low, found.high) if found.bounded else (None, None)
        low, high = ("low", "high") if name == "nats" else (f"{name}_low", f"{name}_high")
        return {name: found.estimate, low: ends[0], high: ends[1]}

    def counts(self, blocks: Iterable[str]) -> dict[str, int]:
        blocks = list(blocks)
        return {"blocks": len(blocks), "documents": len({self._documents[block] for block in blocks})}

    def to_json(self) -> list[dict[str, Any]]:
        return list(self._plain())

    def _plain(self) -> Iterator[dict[str, Any]]:
        for key, by_block in self._rows.items():
            for block, values in by_block.items():
                yield {"key": list(key), "block": block, "document": self._documents[block], **values}

    @classmethod
    def from_json(cls, data: Iterable[Mapping[str, Any]]) -> Rows:
        rows = cls()
        for row in data:
            values = dict(row)
            key, block, document = (values.pop(name) for name in ("key", "block", "document"))
            rows.add(tuple(key), block, document, values)
        return rows
