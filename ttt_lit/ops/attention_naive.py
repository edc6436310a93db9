"""Windowed causal attention in the most obvious way: the specification that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    num_queries: int, num_keys: int, window: int | None, device: torch.device | None = None, *, sink_tokens: int = 0
) -> Tensor:
    """Which keys each query sees, (Tq, Tk) bool. The last query sits on the last key; query i sees keys i-window+1 … i, and the sinks
    0 … sink_tokens-1 among the keys before it."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    seen = key <= query
    return seen if window is None else seen & ((key > query - window) | (key < sink_tokens))


def attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    sink_tokens: int = 0,
    sink_mass: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v under ``visible``. q (B, Hq, Tq, D); k, v (B, Hkv, Tk, D), Hq a multiple of Hkv. Returns (B, Hq, Tq, D).

    ``sink_mass`` (Hq,) ≥ 0: what each head's softmax has in its denominator beside the exponentials of its scores.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    seen = visible(q.shape[2], k.shape[2], window, q.device, sink_tokens=sink_tokens)
    scores = scores.masked_fill(~seen, float("-inf"))
    out = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(dim=-1), v)
    if sink_mass is None:
        return out
    return out / (1 + sink_mass[:, None, None] * (-scores.logsumexp(dim=-1, keepdim=True)).exp())
