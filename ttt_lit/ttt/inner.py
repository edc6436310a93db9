"""The inner step: how one chunk's loss becomes new fast weights, and what the step's adjoint is. Functions of tensors without graphs.

Equation numbers are those of "End-to-End Test-Time Training for Long Context" (arXiv 2512.23675).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ttt_lit.model.mlp import MLPWeights
from ttt_lit.model.spec import Mode
from ttt_lit.ops.wide import wide_matmul

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


class Factors(NamedTuple):
    """One layer's inner gradient as products of C columns: gate is d_gateᵀ z, up d_upᵀ z, down d_downᵀ h, per sequence."""

    z: Tensor
    h: Tensor
    d_gate: Tensor
    d_up: Tensor
    d_down: Tensor

    def gradient(self, dtype: torch.dtype) -> MLPWeights:
        """The three matrices of the gradient, summed and kept in ``dtype``."""
        return MLPWeights(
            wide_matmul(self.d_gate.mT, self.z, dtype),
            wide_matmul(self.d_up.mT, self.z, dtype),
            wide_matmul(self.d_down.mT, self.h, dtype),
        )


class Step(NamedTuple):
    """How far an inner step went, per sequence: W − rate · gradient."""

    rate: Tensor
    """(B,) the learning rate times the clip's factor."""
    clipped: Tensor
    """(B,) bool: whether the clip was active."""
    length: Tensor
    """(B,) ‖ΔW‖."""


def sgd_step(fast: FastWeights, factors: dict[int, Factors], *, lr: float, clip: float) -> tuple[FastWeights, Step]:
    """W − lr · clipped gradient for every sequence on its own (eq. 5)."""
    gradients = {i: f.gradient(fast[i].gate.dtype) for i, f in factors.items()}
    norms = [torch.linalg.vector_norm(g, dim=(1, 2)) for weights in gradients.values() for g in weights]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    clipped = norm > clip if clip > 0 else torch.zeros_like(norm, dtype=torch.bool)
    rate = lr * torch.where(clipped, clip / norm, 1.0)
    new = {i: moved(weights, gradients[i], -rate) for i, weights in fast.items()}
    return new, Step(rate, clipped, (norm * rate).abs())


def undo_step(fast: FastWeights, factors: dict[int, Factors], rate: Tensor) -> FastWeights:
    """The weights before a step, from those after it."""
    return {i: moved(weights, factors[i].gradient(weights.gate.dtype), rate) for i, weights in fast.items()}


def moved(weights: MLPWeights, gradient: MLPWeights, rate: Tensor) -> MLPWeights:
    """W + rate · gradient; ``gradient`` is overwritten, so that no third copy of the weights exists."""
    rate = rate.view(-1, 1, 1)
    return MLPWeights(*(g.mul_(rate).add_(w) for w, g in zip(weights, gradient, strict=True)))


def step_adjoint(adjoint: FastWeights, before: FastWeights, after: FastWeights, step: Step) -> FastWeights:
    """Cotangent of the inner gradient g, for the cotangent ``adjoint`` of W − rate(g) · g.

    Where the clip is active the factor depends on g, and its derivative removes the part of the cotangent along g. The direction of g is
    that of ``before`` − ``after``.
    """
    dot = squared = torch.zeros_like(step.rate)
    for i, cotangents in adjoint.items():
        for c, w, v in zip(cotangents, before[i], after[i], strict=True):
            change = (w - v).flatten(1)
            dot = dot + (change * c.flatten(1)).sum(1)
            squared = squared + change.square_().sum(1)
    active = step.clipped & (squared > 0)
    along = torch.where(active, dot / squared.clamp(min=torch.finfo(squared.dtype).tiny), 0.0).view(-1, 1, 1)
    rate = -step.rate.view(-1, 1, 1)
    return {
        i: MLPWeights(*((c - (w - v) * along) * rate for c, w, v in zip(cotangents, before[i], after[i], strict=True)))
        for i, cotangents in adjoint.items()
    }
