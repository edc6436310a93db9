"""The inner step: how a gradient of one chunk's loss becomes new fast weights. Pure functions of tensors.

Equation numbers are those of "End-to-End Test-Time Training for Long Context" (arXiv 2512.23675).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ttt_lit.model.mlp import MLPWeights
from ttt_lit.model.spec import Mode

FastWeights = dict[int, MLPWeights]
"""Layer index → matrices with a leading batch axis, one copy a sequence: gate, up (B, F, D), down (B, D, F)."""


@dataclass(frozen=True, kw_only=True)
class InnerLoop:
    """How the model learns while it reads."""

    lr: float = 1.0
    """Step size of the inner SGD."""
    clip: float = 1.0
    """Limit on the global norm of one sequence's inner gradient over all fast weights. 0: no clipping."""

    def __post_init__(self) -> None:
        if not (self.lr >= 0 and self.clip >= 0):
            raise ValueError(f"inner: got lr {self.lr} and clip {self.clip}, expected both at least 0 (clip 0 = none)")


def check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(get_args(Mode))}")


def clip_factor(squared_norm: Tensor, clip: float) -> Tensor:
    """clip / max(norm, clip) per sequence, (B,). Exactly 1 with zero derivative below the limit, also at a zero gradient.

    Written on the square: the square root's infinite slope at 0 would turn the outer gradient of an unclipped step into NaN.
    """
    limit = clip * clip
    return torch.where(squared_norm > limit, clip * squared_norm.clamp(min=limit).rsqrt(), 1.0)


def sgd_step(fast: FastWeights, gradients: FastWeights, *, lr: float, clip: float) -> tuple[FastWeights, Tensor]:
    """W − lr · clipped gradient for every sequence on its own (eq. 5). Returns the new weights and each sequence's ‖ΔW‖, (B,)."""
    squared = torch.stack([g.square().flatten(1).sum(1) for weights in gradients.values() for g in weights]).sum(0)
    factor = clip_factor(squared, clip) if clip > 0 else torch.ones_like(squared)
    step = (lr * factor).view(-1, 1, 1)
    new = {
        index: MLPWeights(*(w - step * g for w, g in zip(weights, gradients[index], strict=True)))
        for index, weights in fast.items()
    }
    return new, (squared.detach().sqrt() * factor.detach() * abs(lr))
