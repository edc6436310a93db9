"""Grouped-query self-attention; the window is an argument, not a property of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttt_lit.model.norm import RMSNorm
from ttt_lit.model.rope import rotate
from ttt_lit.model.spec import ModelSpec
from ttt_lit.ops.attention import attention


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec, *, sink_logit: bool = False) -> None:
        super().__init__()
        self.sink_logit = nn.Parameter(torch.zeros(spec.num_heads)) if sink_logit else None
        self.head_dim = spec.head_dim
        self.scale = spec.attention_scale
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, queries, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(spec.hidden_size, keys, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(spec.hidden_size, keys, bias=spec.qkv_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, eps=spec.norm_eps, unit_offset=spec.norm_unit_offset)
            self.k_norm = RMSNorm(spec.head_dim, eps=spec.norm_eps, unit_offset=spec.norm_unit_offset)
        self.o_proj = nn.Linear(queries, spec.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, window: int | None, sink_tokens: int = 0) -> Tensor:
        """Whole sequences: x (B, T, D) at the positions of cos and sin (T, head_dim) → (B, T, D).

        ``sink_tokens`` keep their positions: a query rotates against them as far as they really are.
        """
        q, k, v = self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mass = None if self.sink_logit is None else sink_mass(self.sink_logit)
        mixed = attention(q, k, v, scale=self.scale, window=window, sink_tokens=sink_tokens, sink_mass=mass)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H · head_dim) → (B, H, T, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def sink_mass(parameter: Tensor) -> Tensor:
    """What a learned sink has in its head's softmax denominator, exp(|b|) − 1 ≥ 0 for every head's b (Hq,).

    Zero at b = 0, where the slope is 1 by convention: a function begins without the sink, and b's gradient does not begin at zero, as that
    of a logit of −∞ would.
    """
    return torch.where(parameter < 0, -parameter, parameter).expm1()
