"""The inner step: how one chunk's loss becomes new fast weights, and what the step's adjoint is. Functions of tensors without graphs.

Equation numbers are those of "End-to-End Test-Time Training for Long Context" (arXiv 2512.23675).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ttt_lit.model.mlp import MLPWeights
from ttt_lit.model.spec import Mode
from ttt_lit.ops.wide import wide_matmul

FastWeights = dict[int, MLPWeights]
"""Layer index → matrices with a leading batch axis, one copy a sequence: gate, up (B, F, D), down (B, D, F)."""


InnerRule = Literal["sgd", "normalised"]

NORM_EPS = 1e-3
"""Of the normalised step, in units of the inner gradient's norm. A thousandth of the usual clip: above a norm of 0.1 the step's length is
the rate to 1 %; towards 0 it is SGD at 1,000 times the rate, so that a gradient of zero takes no step and has a finite adjoint."""


@dataclass(frozen=True, kw_only=True)
class InnerLoop:
    """How the model learns while it reads."""

    lr: float = 1.0
    """Step size; with ``rule: normalised`` the length of the step over all fast weights of a sequence. A property of the weights: the
    published 1.0 is for models trained with it from the start."""
    clip: float = 1.0
    """Limit on the global norm of one sequence's inner gradient over all fast weights; 0: no clipping. Refused with ``rule:
    normalised``."""
    rule: InnerRule = "sgd"
    """``sgd``: the clipped gradient times the rate. ``normalised``: the gradient's direction times the rate, whatever its norm
    (docs/method.md)."""

    def __post_init__(self) -> None:
        if not (self.lr >= 0 and self.clip >= 0):
            raise ValueError(f"inner: got lr {self.lr} and clip {self.clip}, expected both at least 0 (clip 0 = none)")
        if self.rule not in get_args(InnerRule):
            raise ValueError(f"inner.rule: got {self.rule!r}, expected one of {', '.join(get_args(InnerRule))}")
        if self.rule == "normalised" and self.clip > 0:
            raise ValueError(
                f"inner: clip {self.clip:g} has no effect with rule normalised, whose step has the length of the rate; set clip: 0"
            )


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
    """(B,) the learning rate times the factor of the clip, or of the normalisation."""
    bound: Tensor
    """(B,) from 0 to 1: how far that factor holds the step's length fixed, whatever the gradient's norm; 1 where the clip is active."""
    length: Tensor
    """(B,) ‖ΔW‖."""


def sgd_step(fast: FastWeights, factors: dict[int, Factors], *, lr: float, clip: float) -> tuple[FastWeights, Step]:
    """W − lr · clipped gradient for every sequence on its own (eq. 5)."""
    gradients, norm = _gradients(fast, factors)
    clipped = norm > clip if clip > 0 else torch.zeros_like(norm, dtype=torch.bool)
    rate = lr * torch.where(clipped, clip / norm, 1.0)
    return _stepped(fast, gradients, rate), Step(rate, clipped.to(norm.dtype), norm * rate)


def normalised_step(fast: FastWeights, factors: dict[int, Factors], *, lr: float) -> tuple[FastWeights, Step]:
    """W − lr · g / (‖g‖ + eps) for every sequence on its own; one norm over all fast weights."""
    gradients, norm = _gradients(fast, factors)
    rate = lr / (norm + NORM_EPS)
    return _stepped(fast, gradients, rate), Step(rate, norm / (norm + NORM_EPS), norm * rate)


def _gradients(fast: FastWeights, factors: dict[int, Factors]) -> tuple[FastWeights, Tensor]:
    """The inner gradient, and its norm (B,) over all fast weights of a sequence."""
    gradients = {i: f.gradient(fast[i].gate.dtype) for i, f in factors.items()}
    norms = [torch.linalg.vector_norm(g, dim=(1, 2)) for weights in gradients.values() for g in weights]
    return gradients, torch.linalg.vector_norm(torch.stack(norms), dim=0)


def _stepped(fast: FastWeights, gradients: FastWeights, rate: Tensor) -> FastWeights:
    return {i: moved(weights, gradients[i], -rate) for i, weights in fast.items()}


def undo_step(fast: FastWeights, factors: dict[int, Factors], rate: Tensor) -> FastWeights:
    """The weights before a step, from those after it."""
    return {i: moved(weights, factors[i].gradient(weights.gate.dtype), rate) for i, weights in fast.items()}


def moved(weights: MLPWeights, gradient: MLPWeights, rate: Tensor) -> MLPWeights:
    """W + rate · gradient; ``gradient`` is overwritten, so that no third copy of the weights exists."""
    rate = rate.view(-1, 1, 1)
    return MLPWeights(*(g.mul_(rate).add_(w) for w, g in zip(weights, gradient, strict=True)))


def step_adjoint(adjoint: FastWeights, before: FastWeights, after: FastWeights, step: Step) -> FastWeights:
    """Cotangent of the inner gradient g, for the cotangent ``adjoint`` of W − rate(g) · g.

    Where the rate depends on the norm of g, its derivative removes the part of the cotangent along g: all of it where the clip is active,
    the share ``step.bound`` in general. The direction of g is that of ``before`` − ``after``.
    """
    dot = squared = torch.zeros_like(step.rate)
    for i, cotangents in adjoint.items():
        for c, w, v in zip(cotangents, before[i], after[i], strict=True):
            change = (w - v).flatten(1)
            dot = dot + (change * c.flatten(1)).sum(1)
            squared = squared + change.square_().sum(1)
    # Of a gradient of zero there is no direction, and nothing to remove.
    along = torch.where(squared > 0, step.bound * dot / squared.clamp(min=torch.finfo(squared.dtype).tiny), 0.0)
    along = along.view(-1, 1, 1)
    rate = -step.rate.view(-1, 1, 1)
    return {
        i: MLPWeights(*((c - (w - v) * along) * rate for c, w, v in zip(cotangents, before[i], after[i], strict=True)))
        for i, cotangents in adjoint.items()
    }
