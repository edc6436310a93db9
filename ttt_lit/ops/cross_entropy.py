"""Next-token loss, and divergence from a teacher, from hidden states: logits exist for one tile of tokens × vocabulary at a time.

``linear_nll`` and ``nll_and_kl`` are registered operators that save log-sum-exps alone; their backward makes the logits again. Where the
loss ends a computation and its cotangents are known beforehand, ``nll_with_gradient`` and ``nll_adjoint`` give loss and derivatives
directly. ``token_nll`` and ``token_kl`` are the plain twins.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ttt_lit.ops.logit_tiles import (
    LogSumExp,
    add_at,
    add_gradients,
    all_logits,
    columns_of,
    empty_contiguous,
    picked,
    pieces_of,
    refuse_second_derivative,
    scores_of,
    statistics,
    under_autocast,
    wide_dtype,
    wide_full,
    wide_zeros,
)
from ttt_lit.ops.wide import add_wide_matmul


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats. hidden (B, T, D), head (V, D), targets (B, T) int64. Returns (B, T).

    Differentiable twice, and as obvious as it can be. The log-softmax runs in float32 at least: at loss 3 the spacing of bfloat16 is
    0.016 nats.
    """
    logits = all_logits(hidden, head)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def linear_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """``token_nll`` without ever holding all logits. Differentiable once in hidden and head; a second derivative raises."""
    return _linear_nll(*under_autocast(hidden, head), targets)[0]


def nll_with_gradient(hidden: Tensor, head: Tensor, targets: Tensor, seed: float) -> tuple[Tensor, Tensor]:
    """Losses (B, T), and the gradient of ``seed`` × their sum in hidden, in one sweep. Nothing is differentiable."""
    given, head = under_autocast(hidden.detach(), head.detach())
    rows, wanted = given.reshape(-1, head.shape[1]), targets.reshape(-1)
    nll, gradient = statistics(given), empty_contiguous(given)
    for piece in pieces_of(rows, head):
        _, nll.view(-1)[piece], others, _ = _expectation(rows[piece], head, wanted[piece])
        gradient.view(rows.shape)[piece] = _gradient(nll.view(-1)[piece], others, head, wanted[piece]).mul_(seed)
    return nll, gradient.to(hidden.dtype)


def nll_adjoint(
    hidden: Tensor,
    tangent: Tensor | None,
    head: Tensor,
    targets: Tensor,
    cotangent: Tensor,
    seed: float,
    d_head: Tensor | None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of Σ cotangent · nll + seed · Σ (derivative of nll along ``tangent``) in hidden and tangent.

    cotangent (B, T). ``tangent`` None: the second term is absent. The gradient in the head is added to ``d_head`` (V, D), float32 at
    least, in place; None: it is not computed. ``lse`` (B, T): log-sum-exps of the logits, where they are known and there is no tangent.
    Where they are not, all logits but those of one tile are made twice.
    """
    kept = hidden.dtype
    hidden, head = under_autocast(hidden.detach(), head.detach())
    rows, wanted = hidden.reshape(-1, head.shape[1]), targets.reshape(-1)
    weights = cotangent.reshape(-1).to(wide_dtype(hidden.dtype))
    directions = None if tangent is None else tangent.detach().to(hidden.dtype).reshape(rows.shape)
    d_hidden, d_tangent = empty_contiguous(rows), None if tangent is None else empty_contiguous(rows)
    for piece in pieces_of(rows, head):
        given = rows[piece], head, wanted[piece], weights[piece]
        if directions is None or d_tangent is None:
            d_hidden[piece] = _first_order(*given, None if lse is None else lse.reshape(-1)[piece], d_head)
        else:
            d_hidden[piece], d_tangent[piece] = _second_order(*given, directions[piece], seed, d_head)
    shaped = None if d_tangent is None else d_tangent.view(hidden.shape).to(kept)
    return d_hidden.view(hidden.shape).to(kept), shaped


def _expectation(rows: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sweep over a piece of the tokens.

    Log-sum-exps (n,), losses (n,), Σ p · row of the head without the target's term (n, D), and p (n, columns) of the last tile with zeros
    at targets. Without that term, which is large and known in float32, half precision loses nothing where the target is nearly certain.
    """
    lse, others = LogSumExp(rows), wide_zeros(rows)
    at_targets, p = wide_full(rows, torch.nan), rows
    for columns in columns_of(head):
        scores = scores_of(rows, head[columns])
        at_targets = picked(scores, targets, columns, at_targets)
        others *= lse.add(scores)[:, None]
        p = lse.softmax_(scores)
        add_at(p, targets, columns, -picked(p, targets, columns, wide_full(rows, 0.0)))
        add_wide_matmul(others, p.to(head.dtype), head[columns])
    return lse.value, lse.value - at_targets, others, p


def _gradient(nll: Tensor, others: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Of the losses in the rows, (n, D): Σ p · row of the head, minus the target's."""
    return others + torch.expm1(-nll)[:, None] * head[targets]


def _first_order(
    rows: Tensor, head: Tensor, targets: Tensor, weight: Tensor, lse: Tensor | None, d_head: Tensor | None
) -> Tensor:
    """Gradient of Σ weight · nll in a piece's rows; that in the head is added to ``d_head``."""
    tiles, d_rows, p = columns_of(head), wide_zeros(rows), None
    if lse is None:
        lse, _, scores = _losses(rows, head, targets)
        p = scores.sub_(lse[:, None]).exp_()
    for columns in reversed(tiles):
        if p is None:
            p = scores_of(rows, head[columns]).sub_(lse[:, None]).exp_()
        add_at(p.mul_(weight[:, None]), targets, columns, -weight)
        add_gradients(p, rows, head, columns, d_rows, d_head)
        p = None
    return d_rows


def _second_order(
    rows: Tensor,
    head: Tensor,
    targets: Tensor,
    weight: Tensor,
    direction: Tensor,
    seed: float,
    d_head: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ weight · nll + seed · Σ (derivative of nll along ``direction``) in rows and direction."""
    lse, nll, others, last = _expectation(rows, head, targets)
    tiles, d_rows, p_target = columns_of(head), wide_zeros(rows), torch.exp(-nll)
    average = (direction * (others + p_target[:, None] * head[targets])).sum(dim=1)
    shift = (weight - seed * average)[:, None]
    p: Tensor | None = add_at(last, targets, tiles[-1], p_target)
    del last
    for columns in reversed(tiles):
        if p is None:
            p = scores_of(rows, head[columns]).sub_(lse[:, None]).exp_()
        first = scores_of(direction, head[columns]).mul_(seed).add_(shift).mul_(p)
        add_gradients(add_at(first, targets, columns, -weight), rows, head, columns, d_rows, d_head)
        del first
        if d_head is not None:
            add_at(p.mul_(seed), targets, columns, -seed)
            add_wide_matmul(d_head[columns], p.to(head.dtype).mT, direction)
        p = None
    return d_rows, _gradient(nll, others, head, targets).mul_(seed)


def _losses(rows: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps (n,) and losses (n,) of a piece, and the logits of the last tile."""
    lse, scores = LogSumExp(rows), rows
    at_targets = wide_full(rows, torch.nan)
    for columns in columns_of(head):
        scores = scores_of(rows, head[columns])
        lse.add(scores)
        at_targets = picked(scores, targets, columns, at_targets)
    return lse.value, lse.value - at_targets, scores


@custom_op("ttt_lit::linear_nll", mutates_args=())
def _linear_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps, (B, T) each."""
    rows, wanted = hidden.reshape(-1, head.shape[1]), targets.reshape(-1)
    nll, lse = statistics(hidden), statistics(hidden)
    for piece in pieces_of(rows, head):
        lse.view(-1)[piece], nll.view(-1)[piece], _ = _losses(rows[piece], head, wanted[piece])
    return nll, lse


@_linear_nll.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return statistics(hidden), statistics(hidden)


@custom_op("ttt_lit::linear_nll_backward", mutates_args=())
def _linear_nll_backward(
    dnll: Tensor, hidden: Tensor, head: Tensor, targets: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ dnll · nll in hidden and head."""
    d_head = wide_zeros(head)
    d_hidden, _ = nll_adjoint(hidden, None, head, targets, dnll, 0.0, d_head, lse)
    return d_hidden, d_head.to(head.dtype)


@_linear_nll_backward.register_fake
def _(dnll: Tensor, hidden: Tensor, head: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_contiguous(hidden), empty_contiguous(head)


def _save_nll(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward_of_nll(ctx: Any, dnll: Tensor | None, _: None) -> tuple[Any, ...]:
    if dnll is None:
        return None, None, None
    return *_linear_nll_backward(dnll, *ctx.saved_tensors), None


_linear_nll.register_autograd(_backward_of_nll, setup_context=_save_nll)
_linear_nll_backward.register_autograd(refuse_second_derivative)
