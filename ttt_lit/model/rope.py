"""Rotary position embedding in Hugging Face's layout: coordinate i is rotated with coordinate i + D/2.

Positions are absolute everywhere. Attention scores depend on differences only, so keys may be cached after rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(
    base: float, head_dim: int, length: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of position × frequency for positions 0 … length-1, each (length, D).

    Computed in float64: float32 angles at position 100,000 are off by 1e-2 rad. ``dtype`` is raised to float32 at least.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    dtype = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) by tables (T, D). Keeps x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
