"""Root-mean-square normalisation, and its derivative along a direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) · weight, or · (1 + weight) with ``unit_offset``. Statistics in float32 at least; keeps x's dtype."""

    def __init__(self, size: int, *, eps: float, unit_offset: bool) -> None:
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.zeros(size) if unit_offset else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, unit_offset=self.unit_offset)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool) -> Tensor:
    """x (…, D) normalised over its last axis."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return _rescaled(wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps), weight, x.dtype, unit_offset)


def rms_norm_dual(
    x: Tensor, tangent: Tensor, weight: Tensor, *, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    """``rms_norm`` and its derivative at x along ``tangent``, both (…, D)."""
    wide, direction = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (x, tangent))
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normed = wide * inverse
    along = (direction - normed * (normed * direction).mean(dim=-1, keepdim=True)) * inverse
    return _rescaled(normed, weight, x.dtype, unit_offset), _rescaled(along, weight, x.dtype, unit_offset)


def _rescaled(normed: Tensor, weight: Tensor, dtype: torch.dtype, unit_offset: bool) -> Tensor:
    if unit_offset:
        return (normed * (1.0 + weight)).to(dtype)
    return (normed.to(dtype) * weight).to(dtype)
