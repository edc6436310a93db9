"""The one place that chooses an attention kernel.

Three kernels compute the function that ``attention_naive`` specifies:

- ``math``: plain matrix products, differentiable twice. The only choice where the inner gradient crosses attention.
- ``sdpa``: PyTorch's fused attention, tiled over queries for windows so that no T × T matrix exists. First order only: its
  backward has no derivative of its own.
- ``flash``: flash-attn, where it is installed and the tensors are half precision on CUDA. First order only.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lit.ops.attention_naive import visible

Kernel = Literal["math", "sdpa", "flash"]

kernels_that_ran: set[Kernel] = set()
"""What this process has used so far, for the run record."""

# Queries per tile of windowed SDPA: each tile reads window + tile - 1 keys, so smaller tiles waste less and launch more.
_TILE = 1024


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, twice: bool) -> Tensor:
    """Causal attention of the last Tq of Tk positions, within ``window`` tokens (None: the whole past).

    q (B, Hq, Tq, D); k, v (B, Hkv, Tk, D) with Hq a multiple of Hkv and Tq ≤ Tk. Returns (B, Hq, Tq, D).
    ``twice``: the result will be differentiated twice.
    """
    kernel = choose_kernel(device=q.device, dtype=q.dtype, head_dim=q.shape[-1], twice=twice)
    kernels_that_ran.add(kernel)
    if window is not None and window >= k.shape[2]:
        window = None
    return _KERNELS[kernel](q, k, v, scale, window)


def choose_kernel(*, device: torch.device, dtype: torch.dtype, head_dim: int, twice: bool) -> Kernel:
    """The kernel for these tensors; a pure function of its arguments and of whether flash-attn is installed."""
    if twice:
        return "math"
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_dim <= 256 and _has_flash_attn():
        return "flash"
    return "sdpa"


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    batch, num_heads, num_queries, head_dim = q.shape
    num_kv, num_keys = k.shape[1], k.shape[2]
    grouped = (q * scale).reshape(batch, num_kv, -1, head_dim)  # (B, Hkv, G·Tq, D): one product serves the whole group
    scores = (grouped @ k.mT).view(batch, num_heads, num_queries, num_keys)
    if num_queries > 1:
        scores = scores.masked_fill(~visible(num_queries, num_keys, window, q.device), float("-inf"))
    elif window is not None:
        scores = scores[..., -window:]
        v, num_keys = v[:, :, -window:], window
    # Statistics in float32 at least: half-precision softmax loses the tail of long contexts.
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return (weights.view(batch, num_kv, -1, num_keys) @ v).view(batch, num_heads, num_queries, -1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    num_queries, num_keys = q.shape[2], k.shape[2]
    call = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if window is None and num_queries == num_keys:
        return call(q, k, v, is_causal=True)
    tiles = []
    first = num_keys - num_queries
    for start in range(0, num_queries, _TILE):
        stop = min(start + _TILE, num_queries)
        low = 0 if window is None else max(0, first + start - window + 1)
        high = first + stop
        mask = visible(stop - start, high - low, window, q.device)
        tiles.append(call(q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high], attn_mask=mask))
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    from flash_attn import flash_attn_func

    left = -1 if window is None else window - 1
    out = flash_attn_func(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        softmax_scale=scale,
        causal=True,
        window_size=(left, 0 if window is not None else -1),
    )
    return out.transpose(1, 2)


_KERNELS = {"math": _math, "sdpa": _sdpa, "flash": _flash}
