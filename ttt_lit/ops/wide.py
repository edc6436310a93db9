"""Matrix products whose result is wider than their operands: half-precision factors, float32 sums that stay float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide_matmul(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ y as ``dtype``, for two or three dimensions and operands of one dtype. Autocast does not reach it."""
    assert x.dtype == y.dtype, f"products of {x.dtype} and {y.dtype}"
    with without_autocast(x.device.type):
        if x.dtype == dtype:
            return x @ y
        if x.is_cuda and dtype == torch.float32:
            # The units sum in float32 anyway; the ordinary product would round the sum to the operands' dtype.
            return (torch.mm if x.ndim == 2 else torch.bmm)(x, y, out_dtype=dtype)
        return x.to(dtype) @ y.to(dtype)


def add_wide_matmul(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x @ y, matrices of one dtype, to ``total`` in place, which may be wider. Autocast does not reach it."""
    if x.dtype == total.dtype:
        with without_autocast(x.device.type):
            torch.addmm(total, x, y, out=total)
    else:
        total += wide_matmul(x, y, total.dtype)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Operands keep their dtype inside."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
