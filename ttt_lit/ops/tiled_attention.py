"""Windowed causal attention and its derivatives in plain PyTorch, one tile of queries at a time.

No function makes a matrix of all queries by all keys: a tile reads the keys that its window reaches and, in front of them, the first
``sink_tokens`` keys, which every later query sees. The four functions are what exact meta-gradients need. With s = scale · q kᵀ,
p = exp(s − lse), o = p v and a direction (tq, tk, tv) along which ts = scale · (tq kᵀ + q tkᵀ):

- ``forward``: o and the log-sum-exp of every row, from which p is rebuilt wherever it is needed;
- ``backward``: the gradient of ⟨do, o⟩;
- ``jvp``: to = tp v + p tv with tp = p ∘ (ts − mu), mu = rowsum(p ∘ ts);
- ``dual_backward``: the gradient of ⟨do, o⟩ + ⟨dto, to⟩. The second term alone is the derivative of ``backward`` along the direction,
  because the Hessian of ⟨dto, o⟩ is symmetric: one function serves reverse over forward and reverse over reverse.

Directions and inner gradients concern the trailing keys only; the keys before them were carried from earlier chunks and are constants.
Shapes: q, do, o, tq, to, dto (B, Hq, Tq, D); k, v (B, Hkv, Tk, D), Hq a multiple of Hkv, Tq ≤ Tk, the last query on the last key;
tk, tv (B, Hkv, N, D) with N ≤ Tk; lse, mu (B, Hq, Tq). Statistics are float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Queries per tile. A tile reads window + tile − 1 keys, so smaller tiles waste less; products of fewer rows run below full speed.
TILE = 64


@dataclass(frozen=True)
class _Tile:
    """Queries start … stop − 1, and the keys that any of them sees: 0 … sinks − 1, then low … high − 1. The columns are in this order."""

    start: int
    stop: int
    sinks: int
    """Less than ``low``, or 0: sinks that the other keys follow on without a gap are among them."""
    low: int
    high: int
    causal: Tensor | None
    """(queries, queries) bool, True where one of the last keys lies after the query."""
    expired: Tensor | None
    """(queries, columns) bool, True where a key that is no sink lies before the query's window. None: the window cuts nothing."""
    first_expired: int
    """The column where ``expired`` begins."""

    def hide(self, scores: Tensor, value: float) -> Tensor:
        """Overwrite, in place, what no query may see; scores (B, Hkv, G · queries, keys)."""
        rows = self.stop - self.start
        grouped = scores.unflatten(2, (-1, rows))
        if self.causal is not None:
            grouped[..., -rows:].masked_fill_(self.causal, value)
        if self.expired is not None:
            grouped.narrow(-1, self.first_expired, self.expired.shape[1]).masked_fill_(self.expired, value)
        return scores

    def since(self, old: int, x: Tensor) -> Tensor:
        """The tile's keys from ``old`` on, of a tensor that begins with key ``old``."""
        near = x[:, :, max(self.low, old) - old : max(self.high - old, 0)]
        return torch.cat([x[:, :, : self.sinks - old], near], dim=2) if old < self.sinks else near

    def columns(self, old: int) -> slice:
        """Where these keys stand among the tile's columns."""
        return slice(old if old < self.sinks else self.sinks + max(self.low, old) - self.low, None)

    def add(self, total: Tensor, old: int, weights: Tensor, rows: Tensor) -> None:
        """total += weightsᵀ rows for these keys."""
        if self.high <= old:
            return
        share = weights[..., self.columns(old)].mT @ rows
        if old < self.sinks:
            far = self.sinks - old
            total[:, :, :far] += share[:, :, :far]
            share = share[:, :, far:]
        total[:, :, max(self.low, old) - old : self.high - old] += share


def _tiles(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, sink_tokens: int
) -> Iterator[tuple[_Tile, Tensor, Tensor]]:
    """Every tile with its keys and values, which hold until the next one is asked for."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    first = num_keys - num_queries
    originals = k, v
    for start in range(0, num_queries, TILE):
        stop = min(start + TILE, num_queries)
        rows, high = stop - start, first + stop
        low = 0 if window is None else max(0, first + start - window + 1)
        causal = expired = None
        if rows > 1:
            causal = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
        # The first key that a query of the tile may have left behind.
        cut = max(low, sink_tokens)
        sinks, low = (sink_tokens, low) if sink_tokens < low else (0, 0 if sink_tokens else low)
        if window is not None and cut < high - window:
            query = torch.arange(first + start, high, device=q.device)[:, None]
            expired = torch.arange(cut, high - window, device=q.device)[None, :] <= query - window
        if sinks:
            # In a copy the sinks move along, right before the window, over keys that no later tile sees.
            if k is originals[0]:
                k, v = k.clone(), v.clone()
            for moving, original in zip((k, v), originals, strict=True):
                moving[:, :, low - sinks : low] = original[:, :, :sinks]
        span = slice(low - sinks, high)
        tile = _Tile(start, stop, sinks, low, high, causal, expired, sinks + cut - low)
        yield tile, k[:, :, span], v[:, :, span]


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sink_tokens: int
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Tq, D) and the natural log-sum-exp of every row of scores (B, Hq, Tq)."""
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _statistics(q)
    kv_heads = k.shape[1]
    for tile, keys, values in _tiles(q, k, v, window, sink_tokens):
        scores = tile.hide(_product(_rows(q, tile, kv_heads) * scale, keys.mT), float("-inf"))
        peak = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        _put(out, tile, (weights.to(v.dtype) @ values).div_(total))
        _put(lse, tile, peak.add_(total.log_()).squeeze(-1))
    return out, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    sink_tokens: int,
    num_new: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of ⟨do, o⟩: dq, and dk and dv of the trailing ``num_new`` keys (B, Hkv, num_new, D)."""
    kv_heads, old = k.shape[1], k.shape[2] - num_new
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = _sums(k, num_new), _sums(v, num_new)
    delta = _dot(do, o)
    for tile, keys, values in _tiles(q, k, v, window, sink_tokens):
        rows, grad = _rows(q, tile, kv_heads), _rows(do, tile, kv_heads)
        p = _weights(rows, keys, lse, tile, scale)
        ds = _product(grad, values.mT).sub_(_row_values(delta, tile, kv_heads)).mul_(p).to(q.dtype)
        _put(dq, tile, (ds @ keys).mul_(scale))
        tile.add(dk, old, ds, rows * scale)
        tile.add(dv, old, p.to(do.dtype), grad)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    scale: float,
    window: int | None,
    sink_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Derivative of the output along (tq, tk, tv), and mu."""
    kv_heads, old = k.shape[1], k.shape[2] - tk.shape[2]
    to, mu = torch.empty_like(q, memory_format=torch.contiguous_format), _statistics(q)
    for tile, keys, values in _tiles(q, k, v, window, sink_tokens):
        rows = _rows(q, tile, kv_heads)
        new = tile.columns(old)
        p = _weights(rows, keys, lse, tile, scale)
        pts = _tangent_scores(rows, _rows(tq, tile, kv_heads), keys, tile.since(old, tk), new, scale).mul_(p)
        stat = pts.sum(dim=-1, keepdim=True)
        out = pts.to(v.dtype) @ values
        out = out + p[..., new].to(v.dtype) @ tile.since(old, tv)
        out = out - stat.to(v.dtype) * _rows(o, tile, kv_heads)
        _put(to, tile, out)
        _put(mu, tile, stat.squeeze(-1))
    return to, mu


def dual_backward(
    do: Tensor | None,
    dto: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    to: Tensor,
    mu: Tensor,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    scale: float,
    window: int | None,
    sink_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of ⟨do, o⟩ + ⟨dto, to⟩ as (dq, dk, dv, dtq, dtk, dtv); ``do`` None is zero. dk and dv are of all keys."""
    kv_heads, old = k.shape[1], k.shape[2] - tk.shape[2]
    dq, dtq = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(2))
    dk, dv, dtk, dtv = _sums(k, k.shape[2]), _sums(v, k.shape[2]), _sums(k, tk.shape[2]), _sums(v, tk.shape[2])
    delta_t = _dot(dto, o)
    delta = _dot(dto, to) if do is None else _dot(dto, to) + _dot(do, o)
    for tile, keys, values in _tiles(q, k, v, window, sink_tokens):
        rows, t_rows, t_grad = (_rows(x, tile, kv_heads) for x in (q, tq, dto))
        new, new_keys = tile.columns(old), tile.since(old, tk)
        p = _weights(rows, keys, lse, tile, scale)
        spread = _tangent_scores(rows, t_rows, keys, new_keys, new, scale).sub_(_row_values(mu, tile, kv_heads))
        a = _product(t_grad, values.mT).sub_(_row_values(delta_t, tile, kv_heads))
        if do is None:
            ds = torch.zeros_like(a)
        else:
            grad = _rows(do, tile, kv_heads)
            ds = _product(grad, values.mT)
        ds[..., new] += _product(t_grad, tile.since(old, tv).mT)
        ds = ds.sub_(_row_values(delta, tile, kv_heads)).addcmul_(spread, a).mul_(p).to(q.dtype)
        tp = spread.mul_(p).to(q.dtype)
        dst, p = a.mul_(p).to(q.dtype), p.to(q.dtype)
        _put(dtq, tile, (dst @ keys).mul_(scale))
        _put(dq, tile, (ds @ keys + dst[..., new] @ new_keys).mul_(scale))
        rows, t_rows = rows * scale, t_rows * scale
        tile.add(dk, 0, ds, rows)
        tile.add(dk, 0, dst, t_rows)
        tile.add(dv, 0, tp, t_grad)
        if do is not None:
            tile.add(dv, 0, p, grad)
        tile.add(dtk, old, dst, rows)
        tile.add(dtv, old, p, t_grad)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dtq, dtk.to(k.dtype), dtv.to(v.dtype)


def _statistics(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _sums(like: Tensor, num_keys: int) -> Tensor:
    """Accumulator of key gradients: several tiles add to a key, in float32 at least."""
    shape = (*like.shape[:2], num_keys, like.shape[3])
    return like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row sums of x ∘ y, (B, Hq, Tq)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * y.to(wide)).sum(dim=-1)


def _rows(x: Tensor, tile: _Tile, kv_heads: int) -> Tensor:
    """The tile's rows of x (B, Hq, Tq, D) as (B, Hkv, G · queries, D): one product serves the whole group of heads."""
    return x[:, :, tile.start : tile.stop].reshape(x.shape[0], kv_heads, -1, x.shape[3])


def _row_values(x: Tensor, tile: _Tile, kv_heads: int) -> Tensor:
    return x[:, :, tile.start : tile.stop].reshape(x.shape[0], kv_heads, -1, 1)


def _put(out: Tensor, tile: _Tile, rows: Tensor) -> None:
    out[:, :, tile.start : tile.stop] = rows.reshape(*out.shape[:2], tile.stop - tile.start, *out.shape[3:])


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, at least in float32 from here on: what enters a softmax or its derivatives."""
    return (x @ y).to(torch.promote_types(x.dtype, torch.float32))


def _weights(rows: Tensor, keys: Tensor, lse: Tensor, tile: _Tile, scale: float) -> Tensor:
    scores = _product(rows * scale, keys.mT).sub_(_row_values(lse, tile, keys.shape[1])).exp_()
    return tile.hide(scores, 0.0)


def _tangent_scores(rows: Tensor, t_rows: Tensor, keys: Tensor, new_keys: Tensor, new: slice, scale: float) -> Tensor:
    """``new_keys``: the tangents of the keys in the columns ``new``."""
    scores = _product(t_rows * scale, keys.mT)
    scores[..., new] += _product(rows * scale, new_keys.mT)
    return scores
