"""Windowed attention of whole sequences in which the first tokens, the sinks, are seen from everywhere. Differentiable once.

What a query sees is two disjoint sets of keys: its window, and the sinks that lie before it. The window runs on an ordinary kernel; for
the rest, few keys, plain products do. With the log-sum-exps a and b of the two and c = log(exp a + exp b), p = exp(s − c) everywhere, so

- the output is exp(a − c) times the window's output, plus the sinks' p v;
- in the backward each set adds its share, once the output and c of the whole row are known.

Queries and keys count from the first token: query window + r has the sinks 0 … r before its window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ttt_lit.ops.carried_attention import Attended, CarriedKernel, attend, gradient_through
from ttt_lit.ops.wide import without_autocast

# Queries that meet the sinks at once: bounds what is held beside operands and results, TILE scores per sink and head.
TILE = 1024


def attend_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int, sink_tokens: int, kernel: CarriedKernel
) -> Tensor:
    """Causal attention of q (B, Hq, T, D) over k, v (B, Hkv, T, D) within ``window`` tokens and over the first ``sink_tokens`` ones.

    Returns (B, Hq, T, D). ``kernel`` is that of the window. At least one query must have sinks before its window: window < T.
    """
    output: Tensor = _WithSinks.apply(q, k, v, scale, window, sink_tokens, kernel)
    return output


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sink_tokens: int, kernel: CarriedKernel
    ) -> Tensor:
        output, lse = attend(q, k, v, scale=scale, window=window, kernel=kernel)
        sinks = k[:, :, :sink_tokens], v[:, :, :sink_tokens]
        with without_autocast(q.device.type):
            for rows in _tiles(window, q.shape[2]):
                _add_sinks(output[:, :, rows], lse[:, :, rows], q[:, :, rows], *sinks, scale, rows.start - window)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.settings = scale, window, sink_tokens, kernel
        return output

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        # torch's once_differentiable would pass a constant off as the gradient's graph where ``do`` has none.
        if torch.is_grad_enabled():
            raise RuntimeError("attention with sinks is differentiable once; create_graph asks for more")
        q, k, v, output, lse = ctx.saved_tensors
        scale, window, sink_tokens, kernel = ctx.settings
        known = Attended(output, lse)
        dq, dk, dv = gradient_through(do, q, k, v, known, scale=scale, window=window, kernel=kernel)
        k, v = k[:, :, :sink_tokens], v[:, :, :sink_tokens]
        dk_sinks, dv_sinks = (x[:, :, :sink_tokens].to(lse.dtype) for x in (dk, dv))
        with without_autocast(q.device.type):
            for rows in _tiles(window, q.shape[2]):
                known = Attended(output[:, :, rows], lse[:, :, rows])
                parts = _sink_gradients(do[:, :, rows], q[:, :, rows], k, v, known, scale, rows.start - window)
                for total, part in zip((dq[:, :, rows], dk_sinks, dv_sinks), parts, strict=True):
                    total += part
        dk[:, :, :sink_tokens], dv[:, :, :sink_tokens] = dk_sinks, dv_sinks
        return dq, dk, dv, None, None, None, None


def _tiles(start: int, stop: int) -> Iterator[slice]:
    """The queries from ``start`` on, at most ``TILE`` at a time."""
    for first in range(start, stop, TILE):
        yield slice(first, min(first + TILE, stop))


def _add_sinks(output: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, first: int) -> None:
    """Complete, in place, the output and log-sum-exp of rows whose windows are done; row r has the sinks 0 … first + r before it."""
    scores = _scores(q, k, scale, first)
    whole = torch.logaddexp(lse, scores.logsumexp(dim=-1).view_as(lse))
    weights = scores.sub_(_grouped(whole[..., None], k.shape[1])).exp_()
    sinks = (weights.to(v.dtype) @ v).view_as(output)
    output.mul_((lse - whole).exp_()[..., None]).add_(sinks)
    lse.copy_(whole)


def _sink_gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, known: Attended, scale: float, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sinks' share of the gradient of ⟨do, output⟩ for some rows: dq as q, dk and dv as k and v."""
    output, lse = known
    heads, wide = k.shape[1], lse.dtype
    delta = (do.to(wide) * output.to(wide)).sum(dim=-1)
    weights = _scores(q, k, scale, first).sub_(_grouped(lse[..., None], heads)).exp_()
    grad = _grouped(do, heads)
    ds = (grad @ v.mT).to(wide).sub_(_grouped(delta[..., None], heads)).mul_(weights).mul_(scale).to(q.dtype)
    return (ds @ k).view_as(q), ds.mT @ _grouped(q, heads), weights.to(q.dtype).mT @ grad


def _scores(q: Tensor, k: Tensor, scale: float, first: int) -> Tensor:
    """Scaled scores (B, Hkv, G · R, S) of rows q (B, Hq, R, D) and sinks k (B, Hkv, S, D), float32 at least; -inf inside the window."""
    scores = (_grouped(q, k.shape[1]) @ k.mT).to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)
    row = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    not_before = torch.arange(k.shape[2], device=q.device)[None, :] > row
    scores.unflatten(2, (-1, q.shape[2])).masked_fill_(not_before, float("-inf"))
    return scores


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, R, N) as (B, Hkv, G · R, N): the heads that share keys in one product."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[3])
