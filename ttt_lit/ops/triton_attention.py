"""Windowed causal attention and its derivatives as Triton kernels; the plain twin with the same functions is ``tiled_attention``.

Query i of Tq sits on key Tk − Tq + i. It sees the last ``window`` keys up to its own (None: all of them), and of the first
``sink_tokens`` keys those up to its own. Per query head,

    s = scale · q kᵀ     p = exp(s − lse)     o = p v
    ts = scale · (tq kᵀ + q tkᵀ)     mu = rowsum(p ∘ ts)     tp = p ∘ (ts − mu)     to = tp v + p tv

tk and tv exist for the trailing N keys; the keys before them are constants. The gradient of ⟨do, o⟩ + ⟨dto, to⟩ is

    a = dto vᵀ − dh     dh = rowsum(dto ∘ o)     e = rowsum(do ∘ o) + rowsum(dto ∘ to)
    dst = p ∘ a         ds = p ∘ (do vᵀ + dto tvᵀ − e + (ts − mu) ∘ a)
    dq = scale · (ds k + dst tk)     dk = scale · (dsᵀ q + dstᵀ tq)     dv = pᵀ do + tpᵀ dto
    dtq = scale · dst k              dtk = scale · dstᵀ q               dtv = pᵀ dto

Shapes everywhere: q, o, do, tq, to, dto (B, Hq, Tq, D); k, v (B, Hkv, Tk, D) with Hq a multiple of Hkv and Tq ≤ Tk; tk, tv (B, Hkv, N, D)
with 1 ≤ N ≤ Tk; lse, mu (B, Hq, Tq) float32. Matrices share one dtype: bfloat16, float16 or float32. D is at most 256, B · Hq at most
65,535 (a limit of CUDA's grids). Results are contiguous.

Operands of any strides are accepted and made contiguous here. That moves each value once, against a window's worth of products with it
afterwards, and it spares the kernels three strides for each of up to sixteen matrices.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ttt_lit.ops import triton_attention_kernels as kernels


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: the rows that a program owns, the rows that it walks over at a time, and how the GPU runs it."""

    owned: int
    walked: int
    num_warps: int
    num_stages: int
    shared_kib: int = 99
    """Shared memory that a GPU must give to one program. 99 KiB is what every GPU from sm_80 on has."""


# The best first, the last one fits everywhere; by PADDED_DIM. For 128 the first were the fastest of five and six on an H200 in bfloat16, at
# 1,024 queries, 9,215 keys and window 8,192; the rest is not tuned. The dual kernels hold up to seven operands and four sums, hence their
# smaller tiles. The last ones spill at most 240 bytes of registers a thread (Triton 3.9.0), in the dual kernels 24.
_TILES = {
    64: (Tile(64, 64, 4, 2),),
    128: (Tile(64, 64, 4, 3, 227), Tile(64, 32, 4, 2)),
    256: (Tile(32, 16, 8, 2),),
}
_DUAL_TILES = {
    64: (Tile(32, 32, 4, 2),),
    128: (Tile(32, 64, 4, 2, 227), Tile(32, 32, 8, 2)),
    256: (Tile(16, 16, 8, 1),),
}
# Exact float32 products run outside the tensor cores and unroll into registers: it is there to be compared with, not to be fast. At
# D = 256 the dual kernels need 129 KiB of shared memory, which A100 and H100 have.
_FLOAT32_TILE = Tile(16, 16, 8, 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sink_tokens: int
) -> tuple[Tensor, Tensor]:
    """o, and lse in natural logarithm."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    o, lse = torch.empty_like(q), _row_statistic(q)
    lengths = _lengths(q, k, window, sink_tokens)
    _over_queries(kernels.forward_kernel, _tile(_TILES, q), q, (q, k, v, o, lse), scale, **lengths)
    return o, lse


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
    """Gradient of ⟨do, o⟩: dq, and dk and dv (B, Hkv, num_new, D) of the trailing ``num_new`` keys."""
    do, q, k, v, o, lse = (x.contiguous() for x in (do, q, k, v, o, lse))
    dq, dk, dv, delta = torch.empty_like(q), _some_keys(k, num_new), _some_keys(v, num_new), _row_statistic(q)
    tile, lengths = _tile(_TILES, q), _lengths(q, k, window, sink_tokens)
    pointers = (do, q, k, v, o, lse, dq, delta)
    _over_queries(kernels.backward_query_kernel, tile, q, pointers, scale, **lengths)
    pointers = (do, q, k, v, lse, delta, dk, dv)
    _over_keys(kernels.backward_key_kernel, tile, k, num_new, pointers, scale, **lengths, num_new=num_new)
    return dq, dk, dv


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
    """to and mu: the derivatives of o and lse along (tq, tk, tv)."""
    q, k, v, o, lse, tq, tk, tv = (x.contiguous() for x in (q, k, v, o, lse, tq, tk, tv))
    to, mu = torch.empty_like(q), _row_statistic(q)
    lengths = {**_lengths(q, k, window, sink_tokens), "num_new": tk.shape[2]}
    pointers = (q, k, v, o, lse, tq, tk, tv, to, mu)
    _over_queries(kernels.jvp_kernel, _tile(_TILES, q), q, pointers, scale, **lengths)
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
    do = None if do is None else do.contiguous()
    dto, q, k, v, o, lse = (x.contiguous() for x in (dto, q, k, v, o, lse))
    to, mu, tq, tk, tv = (x.contiguous() for x in (to, mu, tq, tk, tv))
    dq, dk, dv, dtq, dtk, dtv = (torch.empty_like(x) for x in (q, k, v, tq, tk, tv))
    dh, e = _row_statistic(q), _row_statistic(q)
    num_keys, num_new = k.shape[2], tk.shape[2]
    tile, lengths = _tile(_DUAL_TILES, q), _lengths(q, k, window, sink_tokens)
    pointers = (do, dto, q, k, v, o, lse, to, mu, tq, tk, tv, dq, dtq, dh, e)
    _over_queries(kernels.dual_query_kernel, tile, q, pointers, scale, **lengths, num_new=num_new)
    old, common = num_keys - num_new, (do, dto, q, k, v, lse, mu, dh, e, tq)
    # Keys without tangents in a launch of their own: it holds two operands and two sums fewer.
    if old > 0:
        constants = (*common, None, None, dk, dv, None, None)
        _over_keys(kernels.dual_key_kernel, tile, k, old, constants, scale, **lengths, first_key=0, end_key=old)
    moving = (*common, tk, tv, dk, dv, dtk, dtv)
    _over_keys(kernels.dual_key_kernel, tile, k, num_new, moving, scale, **lengths, first_key=old, end_key=num_keys)
    return dq, dk, dv, dtq, dtk, dtv


def _row_statistic(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _some_keys(x: Tensor, num_keys: int) -> Tensor:
    return torch.empty((*x.shape[:2], num_keys, x.shape[3]), dtype=x.dtype, device=x.device)


def _padded(head_dim: int) -> int:
    """Tiles are powers of two, and matrix products need sixteen."""
    return max(16, triton.next_power_of_2(head_dim))


def _tile(by_padded_dim: dict[int, tuple[Tile, ...]], q: Tensor) -> Tile:
    if q.dtype == torch.float32:
        return _FLOAT32_TILE
    tiles = by_padded_dim[max(64, _padded(q.shape[3]))]
    return next((tile for tile in tiles if tile.shared_kib <= _shared_kib(q.device)), tiles[-1])


@functools.cache
def _shared_kib(device: torch.device) -> int:
    """What one program may have; 0 where there is no GPU, in Triton's interpreter."""
    if device.type != "cuda":
        return 0
    found = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(found["max_shared_mem"]) // 1024


def _lengths(q: Tensor, k: Tensor, window: int | None, sink_tokens: int) -> dict[str, int]:
    """What every kernel needs to know of the shapes. A window that hides no key, with its sinks, is one of all the keys and none."""
    num_keys, head_dim = k.shape[2], q.shape[3]
    if window is None or window + sink_tokens >= num_keys:
        window, sink_tokens = num_keys, 0
    return {
        "num_queries": q.shape[2],
        "num_keys": num_keys,
        "window": window,
        "group": q.shape[1] // k.shape[1],
        "SINKS": sink_tokens,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": _padded(head_dim),
    }


def _over_queries(
    kernel: Any, tile: Tile, q: Tensor, pointers: tuple[Tensor | None, ...], scale: float, **lengths: int
) -> None:
    """Run a query-side kernel: programs own queries of q's heads."""
    blocks = {"BLOCK_Q": tile.owned, "BLOCK_K": tile.walked}
    _launch(kernel, tile, q, q.shape[2], pointers, scale, **lengths, **blocks)


def _over_keys(
    kernel: Any, tile: Tile, k: Tensor, count: int, pointers: tuple[Tensor | None, ...], scale: float, **lengths: int
) -> None:
    """Run a key-side kernel: programs own ``count`` keys of each of k's heads."""
    blocks = {"BLOCK_Q": tile.walked, "BLOCK_K": tile.owned}
    _launch(kernel, tile, k, count, pointers, scale, **lengths, **blocks)


def _launch(
    kernel: Any,
    tile: Tile,
    owner: Tensor,
    num_rows: int,
    pointers: tuple[Tensor | None, ...],
    scale: float,
    **sizes: int,
) -> None:
    grid = (triton.cdiv(num_rows, tile.owned), owner.shape[0] * owner.shape[1])
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(owner):
        kernel[grid](*pointers, scale, **sizes, num_warps=tile.num_warps, num_stages=tile.num_stages)
