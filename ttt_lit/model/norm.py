"""Root-mean-square normalisation."""

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
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        if self.unit_offset:
            return (normed * (1.0 + self.weight)).to(x.dtype)
        return (normed.to(x.dtype) * self.weight).to(x.dtype)
