"""From rows to the figures of ``probe.json``: means over blocks with intervals over documents, and what they recommend.

Two units appear. ``nats`` is a mean over all positions of a block, as the loss that the study's gates compare. ``beyond`` is a mean over
the positions beyond the window alone, where all of a window's damage is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ttt_lit.experiment.gates import MAX_DELTA
from ttt_lit.experiment.own_part import MIN_CEILING, excludes_none
from ttt_lit.experiment.record import Ceiling
from ttt_lit.probe.config import Plan, curve_buckets
from ttt_lit.probe.rows import IMPORTED, Key, Rows

WORTH_KEEPING = 0.1
"""Nats per token beyond the window that sinks leave on top of what the lost context is worth, above which layers are recommended to be
kept at full attention: ten times the gate. A kept layer has its own way to the far context, and dilutes the question."""


def summarise(rows: Rows, plan: Plan) -> dict[str, Any]:
    """The items of ``probe.json``, as far as they are measured; ``window`` is the one that was tried in depth."""
    found: dict[str, Any] = {
        "window": plan.window,
        "imported": _imported(rows, plan),
        "damage": [_damage(rows, plan, key) for key in rows.keys("damage")],
        "ceiling": [_ceiling(rows, plan, key) for key in rows.keys("ceiling")],
        "layers": _layers(rows, plan),
        "inner": [_inner(rows, key) for key in rows.keys("inner")],
    }
    return found | {"recommendation": _recommendation(rows, found, plan)}


def best_sinks(rows: Rows, plan: Plan) -> int:
    """The smallest number of sinks that is within a gate's width of the best at the plan's window; the smallest where none was measured."""
    means = {
        sinks: sum(values.values()) / len(values)
        for sinks in plan.sinks
        if (values := rows.difference(("damage", plan.window, sinks), IMPORTED))
    }
    if not means:
        return plan.sinks[0]
    limit = min(means.values()) + MAX_DELTA * beyond_share(plan.window, plan.context)
    return next(sinks for sinks, mean in means.items() if mean <= limit)


def best_kept(rows: Rows, window: int, sinks: int, count: int) -> tuple[int, ...]:
    """The greedy list: at most ``count`` layers, each the best beside those before it, as far as they are measured."""
    kept: tuple[int, ...] = ()
    while len(kept) < count:
        candidates = [key for key in rows.keys("layer") if key[1:-1] == (window, sinks, *kept)]
        if not candidates:
            break
        means = {key: _mean(rows.column(key, "loss")) for key in candidates}
        chosen = min(candidates, key=lambda key: means[key])[-1]
        assert isinstance(chosen, int)
        kept = (*kept, chosen)
    return kept


def beyond_share(window: int, context: int) -> float:
    """Share of a block's positions that lie beyond the window."""
    return max(0, context - window) / context


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def _curve(rows: Rows, key: Key, blocks: Sequence[str]) -> list[float]:
    """Loss in each bucket of positions, over these blocks."""
    columns = rows.column(key, "curve")
    return [sum(values) / len(blocks) for values in zip(*(columns[block] for block in blocks), strict=True)]


def _imported(rows: Rows, plan: Plan) -> dict[str, Any] | None:
    values = rows.column(IMPORTED, "loss")
    if not values:
        return None
    buckets = [{"start": start, "stop": stop} for start, stop in curve_buckets(plan.context)]
    return {
        **rows.interval(values),
        **rows.counts(values),
        "buckets": buckets,
        "curve": _curve(rows, IMPORTED, list(values)),
    }


def _damage(rows: Rows, plan: Plan, key: Key) -> dict[str, Any]:
    _, window, sinks = key
    assert isinstance(window, int)
    values, share = rows.difference(key, IMPORTED), beyond_share(window, plan.context)
    beyond = {"beyond": None, "beyond_low": None, "beyond_high": None}
    if share:
        beyond = rows.interval({block: value / share for block, value in values.items()}, "beyond")
    return {
        "window": window,
        "sink_tokens": sinks,
        "inside": 0.0,  # up to the window every query sees all that it saw before
        **beyond,
        **rows.interval(values),
        **rows.counts(values),
        "curve": _curve(rows, key, list(values)),
        "imported_curve": _curve(rows, IMPORTED, list(values)),
    }


def _ceiling(rows: Rows, plan: Plan, key: Key) -> dict[str, Any]:
    _, window, stride = key
    assert isinstance(window, int)
    assert isinstance(stride, int)
    dense, fresh = rows.column(key, "dense"), rows.column(key, "fresh")
    beyond = {block: fresh[block] - dense[block] for block in fresh}
    # Positions that are not compared count as 0: they would only add.
    share = beyond_share(window + stride, plan.context)
    return {
        "window": window,
        "stride": stride,
        **rows.interval({block: value * share for block, value in beyond.items()}),
        **rows.interval(beyond, "beyond"),
        **rows.counts(beyond),
    }


def _layers(rows: Rows, plan: Plan) -> dict[str, Any] | None:
    keys = rows.keys("layer")
    if not keys:
        return None
    _, window, sinks, *_ = keys[0]
    assert isinstance(window, int)
    assert isinstance(sinks, int)
    share, none_kept = beyond_share(window, plan.context), ("damage", window, sinks)

    def repaired(kept: Sequence[Any]) -> dict[str, float]:
        values = rows.difference(("layer", window, sinks, *kept), none_kept)
        return {block: -value / share for block, value in values.items()}

    alone = [
        {"layer": key[3], **rows.interval(repaired(key[3:]), "repaired"), **rows.counts(repaired(key[3:]))}
        for key in keys
        if len(key) == 4
    ]
    order = best_kept(rows, window, sinks, max(len(key) for key in keys) - 3)
    greedy = [
        {"kept": list(order[:count]), **rows.interval(repaired(order[:count]), "repaired")}
        for count in range(1, len(order) + 1)
    ]
    return {"window": window, "sink_tokens": sinks, "alone": alone, "greedy": greedy}


def _inner(rows: Rows, key: Key) -> dict[str, Any]:
    _, window, sinks, rate = key
    off: Key = IMPORTED if window is None else ("damage", window, sinks)
    values = rows.difference(key, off)
    norms = [norm for of_block in rows.column(key, "update_norms").values() for norm in of_block]
    return {
        "window": window,
        "sink_tokens": sinks,
        "rate": rate,
        **rows.interval(values),
        **rows.counts(values),
        "update_norm": sum(norms) / len(norms),
        "update_norm_max": max(norms),
        "curve": _curve(rows, key, list(values)),
        "off_curve": _curve(rows, off, list(values)),
    }


def _recommendation(rows: Rows, found: Mapping[str, Any], plan: Plan) -> dict[str, Any] | None:
    if not (found["ceiling"] and found["damage"]):
        return None
    telling = [row for row in found["ceiling"] if row["low"] is not None and row["low"] >= MIN_CEILING]
    ceiling = (
        max(telling, key=lambda row: row["window"]) if telling else max(found["ceiling"], key=lambda row: row["nats"])
    )
    sinks = best_sinks(rows, plan)
    rates = [row for row in found["inner"] if row["window"] is not None and row["rate"] > 0]
    rate = min(rates, key=lambda row: row["nats"]) if rates else None
    return {
        "window": ceiling["window"],
        "sink_tokens": sinks,
        "full_attention_layers": _kept(found, plan, sinks),
        "inner_lr": None if rate is None else rate["rate"],
        "gate_can_tell": excludes_none(_as_recorded(ceiling)),
    }


def _as_recorded(row: Mapping[str, Any]) -> Ceiling:
    """As the record of a run will carry it: the report must come to the same judgement."""
    names = ("window", "stride", "nats", "low", "high", "blocks", "documents")
    return Ceiling(**{name: row[name] for name in names}, checkpoint="")


def _kept(found: Mapping[str, Any], plan: Plan, sinks: int) -> list[int]:
    """The shortest greedy list that brings the damage within ``WORTH_KEEPING`` of what the lost context is worth; usually none."""
    at = [row for row in found["damage"] if (row["window"], row["sink_tokens"]) == (plan.window, sinks)]
    worth = [row for row in found["ceiling"] if row["window"] == plan.window]
    if not (at and worth and found["layers"]):
        return []
    excess, greedy = at[0]["beyond"] - worth[0]["beyond"], found["layers"]["greedy"]
    left = [excess, *(excess - step["repaired"] for step in greedy)]
    count = next((number for number, rest in enumerate(left) if rest <= WORTH_KEEPING), len(greedy))
    return sorted(greedy[count - 1]["kept"]) if count else []
