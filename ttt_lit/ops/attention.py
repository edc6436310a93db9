"""The one place that chooses an attention kernel.

Four kernels compute the function that ``attention_naive`` specifies:

- ``flash``: flash-attn, where it is installed and the tensors are half precision on CUDA. First order only, and without sinks.
- ``sdpa``: PyTorch's fused attention, for dense layers. First order only: its backward has no derivative of its own. It takes windows
  as a mask alone, which costs more than it saves.
- ``triton``: our own kernels for windows, sinks and carried keys on CUDA, with exact derivatives of both orders.
- ``tiled``: the same in plain PyTorch, for every device and dtype.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lit.ops.carried_attention import CarriedKernel, attend

Kernel = Literal["flash", "sdpa", "triton", "tiled"]

kernels_that_ran: set[str] = set()
"""What this process has used so far, for the run record."""

_HALF = (torch.float16, torch.bfloat16)
# Triton's tiles are powers of two, and larger heads leave no room for seven operands: exact float32 ones least of all.
_TRITON_HEADS = {torch.float32: range(16, 129), torch.float16: range(16, 257), torch.bfloat16: range(16, 257)}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    sink_tokens: int = 0,
    sink_mass: Tensor | None = None,
) -> Tensor:
    """Causal attention of whole sequences, each query within ``window`` tokens (None: the whole past). Differentiable once.

    The first ``sink_tokens`` tokens are seen from everywhere; without a window that means nothing. ``sink_mass`` (Hq,) ≥ 0 joins the
    softmax's denominators. q (B, Hq, T, D); k, v (B, Hkv, T, D) with Hq a multiple of Hkv. Returns (B, Hq, T, D).
    """
    if window is not None and window + sink_tokens >= k.shape[2]:
        window = None
    kernel: Kernel
    if sink_mass is not None or (window is not None and sink_tokens):
        kernel = choose_carried_kernel(device=q.device, dtype=q.dtype, head_dim=q.shape[-1], window=window)
    else:
        kernel = choose_kernel(device=q.device, dtype=q.dtype, head_dim=q.shape[-1], window=window, second_order=False)
        _note(kernel)
    if kernel == "flash":
        return _flash(q, k, v, scale, window)
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return attend(
        q, k, v, scale=scale, window=window, sink_tokens=sink_tokens, sink_mass=sink_mass, kernel=kernel
    ).output


def choose_carried_kernel(
    *, device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None
) -> CarriedKernel:
    """The kernel for chunks and their carried keys, and for sinks of either kind."""
    kernel = choose_kernel(device=device, dtype=dtype, head_dim=head_dim, window=window, second_order=True)
    _note(kernel)
    assert kernel == "triton" or kernel == "tiled"  # noqa: PLR1714 (one by one, for the type)
    return kernel


def choose_kernel(
    *, device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None, second_order: bool
) -> Kernel:
    """The kernel for these tensors; a pure function of its arguments and of what is installed."""
    cuda = device.type == "cuda"
    if not second_order:
        if cuda and dtype in _HALF and head_dim <= 256 and _installed("flash_attn"):
            return "flash"
        if window is None:
            return "sdpa"
    if cuda and head_dim in _TRITON_HEADS.get(dtype, ()) and _installed("triton"):
        return "triton"
    return "tiled"


@torch.compiler.assume_constant_result
def _note(kernel: Kernel) -> None:
    kernels_that_ran.add(kernel)


@torch.compiler.assume_constant_result
def _installed(package: str) -> bool:
    return _found(package)


@functools.cache
def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


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
