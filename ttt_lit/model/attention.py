"""Grouped-query self-attention; the window and the carried keys are arguments, not properties of the weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ttt_lit.model.norm import RMSNorm
from ttt_lit.model.rope import rotate
from ttt_lit.model.spec import ModelSpec
from ttt_lit.ops.attention import attention


class KeyValues(NamedTuple):
    """Keys (after normalisation and rotation) and values of the past, each (B, Hkv, Tpast, D)."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
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

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: KeyValues | None = None,
        *,
        window: int | None,
        twice: bool = False,
    ) -> tuple[Tensor, KeyValues]:
        """x (B, T, D) at the positions of cos and sin (T, head_dim). Returns the output and what the next chunk needs of the past."""
        q, k, v = self._heads(self.q_proj(x)), self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past.keys, k], dim=2), torch.cat([past.values, v], dim=2)
        out = attention(q, k, v, scale=self.scale, window=window, twice=twice)
        return self.o_proj(out.transpose(1, 2).flatten(2)), _carried(k, v, window)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, H·D) → (B, H, T, D)


def _carried(k: Tensor, v: Tensor, window: int | None) -> KeyValues:
    # The next query sees window - 1 earlier keys. With a window of 1 it sees none, and [-0:] would keep them all.
    start = 0 if window is None else max(0, k.shape[2] - (window - 1))
    return KeyValues(k[:, :, start:], v[:, :, start:])
