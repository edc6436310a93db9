"""From rows to the figures of ``probe.json``: means over blocks with intervals over documents, and what they recommend.

Two units appear. ``nats`` is a mean over all positions of a block, as the loss that the study's gates compare. ``beyond`` is a mean over
the positions beyond the window alone, where all of a window's damage is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ttt_lit.probe.config import Plan, curve_buckets
from ttt_lit.probe.rows import IMPORTED, Key, Rows, common_blocks
from ttt_lit.record.measured import Ceiling
from ttt_lit.verdict.gates import MAX_DELTA
from ttt_lit.verdict.own_part import MIN_CEILING, excludes_none

WORTH_KEEPING = 0.1
"""Nats per token beyond the window that sinks leave on top of what the lost context is worth, above which layers are recommended to be
kept at full attention: ten times the gate. A kept layer has its own way to the far context, and dilutes the question."""


def summarise(rows: Rows, plan: Plan) -> dict[str, Any]:
    """The items of ``probe.json``, as far as they are measured; ``window`` is the one that was tried in depth."""
    sinks = best_sinks(rows, plan)
    inner = [key for key in rows.keys("inner") if key[1:3] in ((None, 0), (plan.window, sinks))]
    found: dict[str, Any] = {
        "window": plan.window,
        "imported": _imported(rows, plan),
        "damage": [_damage(rows, plan, key) for key in rows.keys("damage") if rows.difference(key, IMPORTED)],
        "ceiling": [_ceiling(rows, plan, key) for key in _ceiling_keys(rows, plan)],
        "sinks": _in_depth(rows, plan, plan.window, (_fewest(rows, plan), sinks)),
        "layers": _layers(rows, plan, sinks),
        "inner": [_inner(rows, key) for key in inner if rows.difference(key, _off(key))],
    }
    return found | {"recommendation": _recommendation(rows, found, plan, sinks)}


def best_sinks(rows: Rows, plan: Plan) -> int:
    """The smallest of the plan's numbers of sinks that is within a gate's width of the best at its window, on the blocks that all of them
    have read; the smallest where nothing was measured."""
    losses = {sinks: rows.column(("damage", plan.window, sinks), "loss") for sinks in plan.sinks}
    losses = {sinks: column for sinks, column in losses.items() if column}
    blocks = common_blocks(losses.values())
    if not blocks:
        return plan.sinks[0]
    means = {sinks: _mean(column, blocks) for sinks, column in losses.items()}
    limit = min(means.values()) + MAX_DELTA * beyond_share(plan.window, plan.context)
    return next(sinks for sinks, mean in means.items() if mean <= limit)


def best_kept(rows: Rows, window: int, sinks: int, count: int) -> tuple[int, ...]:
    """The greedy list: at most ``count`` layers, each the best beside those before it, as far as they are measured."""
    kept: tuple[int, ...] = ()
    while len(kept) < count:
        losses = {key: rows.column(key, "loss") for key in rows.keys("layer") if key[1:-1] == (window, sinks, *kept)}
        blocks = common_blocks(losses.values())
        if not blocks:
            break
        chosen = min(losses, key=lambda key: _mean(losses[key], blocks))[-1]
        assert isinstance(chosen, int)
        kept = (*kept, chosen)
    return kept


def beyond_share(window: int, context: int) -> float:
    """Share of a block's positions that lie beyond the window."""
    return max(0, context - window) / context


def _mean(values: Mapping[str, float], blocks: Sequence[str]) -> float:
    return sum(values[block] for block in blocks) / len(blocks)


def _fewest(rows: Rows, plan: Plan) -> int:
    """The smallest of the plan's numbers of sinks that was measured at its window."""
    return next((sinks for sinks in plan.sinks if rows.column(("damage", plan.window, sinks), "loss")), plan.sinks[0])


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


def _ceiling_keys(rows: Rows, plan: Plan) -> list[Key]:
    """One for each window: of the plan's stride, or else of the smallest, which is the closest."""
    chosen: dict[Any, Key] = {}
    for key in rows.keys("ceiling"):
        if key[1] not in chosen or key[2] == plan.strides.get(key[1]):  # type: ignore[arg-type]
            chosen[key[1]] = key
    return list(chosen.values())


def _worth(rows: Rows, plan: Plan, key: Key) -> dict[str, float]:
    """By block, per token of the whole block. Positions that are not compared count as 0: they would only add."""
    _, window, stride = key
    assert isinstance(window, int)
    assert isinstance(stride, int)
    dense, fresh = rows.column(key, "dense"), rows.column(key, "fresh")
    share = beyond_share(window + stride, plan.context)
    return {block: (fresh[block] - dense[block]) * share for block in fresh}


def _ceiling(rows: Rows, plan: Plan, key: Key) -> dict[str, Any]:
    _, window, stride = key
    assert isinstance(window, int)
    assert isinstance(stride, int)
    worth, share = _worth(rows, plan, key), beyond_share(window + stride, plan.context)
    return {
        "window": window,
        "stride": stride,
        **rows.interval(worth),
        **rows.interval({block: value / share for block, value in worth.items()}, "beyond"),
        **rows.counts(worth),
    }


def _in_depth(rows: Rows, plan: Plan, window: int, sinks: tuple[int, int]) -> dict[str, Any] | None:
    """Damage with fewer and with more sinks, and what the lost context is worth at least: per token beyond the window, on common blocks."""
    columns = [rows.difference(("damage", window, each), IMPORTED) for each in sinks]
    blocks = common_blocks(columns)
    if not blocks:
        return None
    share, worth = beyond_share(window, plan.context), _worth_at(rows, plan, window)
    both = common_blocks([*columns, worth])
    blocks = both or blocks
    named = {"before": columns[0], "after": columns[1]} | ({"worth": worth} if both else {})
    found: dict[str, Any] = {"window": window, "fewest": sinks[0], "sink_tokens": sinks[1], "worth": None}
    for name, values in named.items():
        found |= rows.interval({block: values[block] / share for block in blocks}, name)
    tried = [each for each in plan.sinks if rows.column(("damage", window, each), "loss")]
    return found | {"tried": tried, **rows.counts(blocks)}


def _worth_at(rows: Rows, plan: Plan, window: int) -> dict[str, float]:
    key = next((key for key in _ceiling_keys(rows, plan) if key[1] == window), None)
    return {} if key is None else _worth(rows, plan, key)


def _layers(rows: Rows, plan: Plan, sinks: int) -> dict[str, Any] | None:
    window, share = plan.window, beyond_share(plan.window, plan.context)
    none_kept: Key = ("damage", window, sinks)
    keys = [key for key in rows.keys("layer") if key[1:3] == (window, sinks) and rows.difference(key, none_kept)]
    if not keys:
        return None

    def repaired(kept: Sequence[Any]) -> dict[str, float]:
        values = rows.difference(("layer", window, sinks, *kept), none_kept)
        return {block: -value / share for block, value in values.items()}

    alone = [
        {"layer": key[3], **rows.interval(repaired(key[3:]), "repaired"), **rows.counts(repaired(key[3:]))}
        for key in keys
        if len(key) == 4
    ]
    order = best_kept(rows, window, sinks, max(len(key) for key in keys) - 3)
    steps = [order[:count] for count in range(1, len(order) + 1)]
    while not (blocks := common_blocks(repaired(kept) for kept in steps)):
        steps.pop()  # measured on other documents
    excess = _excess(rows, plan, none_kept, blocks)
    greedy = []
    for kept in steps:
        own = rows.interval({block: repaired(kept)[block] for block in blocks}, "repaired")
        greedy.append({"kept": list(kept), **own, "excess": None if excess is None else excess - own["repaired"]})
    return {"window": window, "sink_tokens": sinks, "excess": excess, "alone": alone, "greedy": greedy}


def _excess(rows: Rows, plan: Plan, damage: Key, blocks: Sequence[str]) -> float | None:
    """Damage beyond what the lost context is worth, at most, per token beyond the window; None where these blocks have no ceiling."""
    cost, worth = rows.difference(damage, IMPORTED), _worth_at(rows, plan, plan.window)
    if any(block not in cost or block not in worth for block in blocks):
        return None
    return (_mean(cost, blocks) - _mean(worth, blocks)) / beyond_share(plan.window, plan.context)


def _off(key: Key) -> Key:
    """What an inner loop's loss is compared with."""
    return IMPORTED if key[1] is None else ("damage", key[1], key[2])


def _inner(rows: Rows, key: Key) -> dict[str, Any]:
    _, window, sinks, rate = key
    values = rows.difference(key, _off(key))
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
        "off_curve": _curve(rows, _off(key), list(values)),
    }


def _best_rate(rows: Rows, plan: Plan, sinks: int) -> float | None:
    """The inner rate that helps most in the plan's window, on the blocks that all of the plan's rates have read; None where none helps."""
    keys = [key for key in rows.keys("inner") if key[1:3] == (plan.window, sinks)]
    changes = {float(key[3] or 0): rows.difference(key, _off(key)) for key in keys}
    changes = {rate: each for rate, each in changes.items() if each and (not plan.rates or rate in plan.rates)}
    blocks = common_blocks(changes.values())
    means = {rate: _mean(each, blocks) for rate, each in changes.items()} if blocks else {}
    best = min(means, key=lambda rate: means[rate], default=None)
    return best if best is not None and means[best] < 0 else None


def _recommendation(rows: Rows, found: Mapping[str, Any], plan: Plan, sinks: int) -> dict[str, Any] | None:
    # Those of an earlier command may be of other documents.
    ceilings = [row for row in found["ceiling"] if row["window"] in plan.windows]
    if not (ceilings and found["sinks"]):
        return None
    telling = [row for row in ceilings if row["low"] is not None and row["low"] >= MIN_CEILING]
    ceiling = max(telling, key=lambda row: row["window"]) if telling else max(ceilings, key=lambda row: row["nats"])
    can_tell = excludes_none(_as_recorded(ceiling))
    at_window = _in_depth(rows, plan, ceiling["window"], (sinks, sinks)) if can_tell else None
    return {
        "ceiling_window": ceiling["window"],
        "gate_can_tell": can_tell,
        # A window is recommended where the ceiling decides and what it costs is known.
        "window": None if at_window is None else ceiling["window"],
        "at_window": at_window,
        "sink_tokens": sinks,
        "full_attention_layers": _kept(found["layers"]),
        "inner_lr": _best_rate(rows, plan, sinks),
    }


def _as_recorded(row: Mapping[str, Any]) -> Ceiling:
    """As the record of a run will carry it: the report must come to the same judgement."""
    names = ("window", "stride", "nats", "low", "high", "blocks", "documents")
    return Ceiling(**{name: row[name] for name in names}, checkpoint="")


def _kept(layers: Mapping[str, Any] | None) -> list[int] | None:
    """The shortest greedy list that brings the damage within ``WORTH_KEEPING`` of what the lost context is worth, usually the empty one;
    None where that was not measured."""
    if layers is None or layers["excess"] is None:
        return None
    steps = [{"kept": [], "excess": layers["excess"]}, *layers["greedy"]]
    return sorted(next((step for step in steps if step["excess"] <= WORTH_KEEPING), steps[-1])["kept"])
