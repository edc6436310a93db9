"""Next-token loss from hidden states, with the logits of one piece of the tokens, or of two neighbouring ones, alive at a time.

``linear_nll`` is a registered operator that can be differentiated twice and saves the log-sum-exp alone; logits are made again where a
derivative needs them. Where the loss ends a computation and its cotangents are known beforehand, ``nll_with_gradient`` and
``nll_adjoint`` give loss and derivatives in one sweep over the pieces. ``token_nll`` is the plain twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ttt_lit.ops.wide import wide_matmul

# Logits of a piece, in numbers. On CPU a piece stays near the caches; on an accelerator it is large enough for full speed: 441 tokens at a
# vocabulary of 152k, 256 MiB in float32.
_PIECE_ELEMENTS = {"cpu": 1 << 19}
_PIECE_ELEMENTS_ELSEWHERE = 1 << 26


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats. hidden (B, T, D), head (V, D), targets (B, T) int64. Returns (B, T).

    Differentiable twice, and as obvious as it can be. The log-softmax runs in float32 at least: at loss 3 the spacing of bfloat16 is
    0.016 nats.
    """
    logits = F.linear(hidden, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def linear_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """``token_nll`` without ever holding all logits. Differentiable twice in hidden and head; a third derivative raises."""
    return _linear_nll(*_under_autocast(hidden, head), targets)[0]


def nll_with_gradient(hidden: Tensor, head: Tensor, targets: Tensor, seed: float) -> tuple[Tensor, Tensor]:
    """Losses (B, T), and the gradient of ``seed`` × their sum in hidden, in one sweep. Nothing is differentiable."""
    given, head = _under_autocast(hidden.detach(), head.detach())
    nll, gradient = _statistics(given), _like(given)
    for piece, scores, lse in _scored(given, head):
        nll.view(-1)[piece] = lse - _picked(scores, targets, piece)
        gradient.view(-1, head.shape[1])[piece] = (
            _residual(scores, lse, targets, piece).mul_(seed).to(head.dtype) @ head
        )
    return nll, gradient.to(hidden.dtype)


def nll_adjoint(
    hidden: Tensor,
    tangent: Tensor | None,
    head: Tensor,
    targets: Tensor,
    cotangent: Tensor,
    seed: float,
    d_head: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of Σ cotangent · nll + seed · Σ (derivative of nll along ``tangent``) in hidden and tangent.

    cotangent (B, T). ``tangent`` None: the second term is absent. The gradient in the head is added to ``d_head`` (V, D), float32 at
    least, in place; None: it is not computed.
    """
    kept = hidden.dtype
    hidden, head = _under_autocast(hidden.detach(), head.detach())
    tangent = None if tangent is None else tangent.detach().to(hidden.dtype)
    width = head.shape[1]
    rows = hidden.reshape(-1, width)
    d_hidden = _like(rows)
    d_tangent = None if tangent is None else _like(rows)
    for piece, scores, lse in _scored(hidden, head):
        p = scores.sub_(lse[:, None]).exp_()
        weight = cotangent.reshape(-1)[piece, None].to(p.dtype)
        first = p * weight
        if tangent is not None and d_tangent is not None:
            t_rows = tangent.reshape(-1, width)[piece]
            spread = _scores(t_rows, head)
            spread.sub_((p * spread).sum(dim=1, keepdim=True)).mul_(p).mul_(seed)
            first += spread
            second = _minus_target(p.mul_(seed), targets, piece, seed).to(head.dtype)
            d_tangent[piece] = second @ head
            if d_head is not None:
                d_head += wide_matmul(second.mT, t_rows, d_head.dtype)
        first = _minus_target(first, targets, piece, weight[:, 0]).to(head.dtype)
        d_hidden[piece] = first @ head
        if d_head is not None:
            d_head += wide_matmul(first.mT, rows[piece], d_head.dtype)
    shaped = None if d_tangent is None else d_tangent.view(hidden.shape).to(kept)
    return d_hidden.view(hidden.shape).to(kept), shaped


def piece_tokens(vocab_size: int, device: str) -> int:
    """Tokens whose logits are made together."""
    return max(1, _PIECE_ELEMENTS.get(device, _PIECE_ELEMENTS_ELSEWHERE) // vocab_size)


def _under_autocast(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast would make of the operands of a product: operators of our own are not on its list."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return hidden.to(dtype), head.to(dtype)
    return hidden, head


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _statistics(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[:-1], dtype=_wide(hidden.dtype))


def _like(x: Tensor) -> Tensor:
    """Contiguous whatever x is: results are written row by row."""
    return x.new_empty(x.shape)


def _scores(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows matrixᵀ in float32 at least: logits, or their tangents."""
    return wide_matmul(rows, matrix.mT, _wide(rows.dtype))


def _scored(hidden: Tensor, head: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Pieces of the tokens with their logits (n, V) and log-sum-exps (n,). The logits may be overwritten."""
    rows = hidden.reshape(-1, head.shape[1])
    size = piece_tokens(head.shape[0], hidden.device.type)
    for low in range(0, rows.shape[0], size):
        piece = slice(low, min(low + size, rows.shape[0]))
        scores = _scores(rows[piece], head)
        yield piece, scores, scores.logsumexp(dim=1)


def _picked(scores: Tensor, targets: Tensor, piece: slice) -> Tensor:
    return scores.gather(1, targets.reshape(-1)[piece, None])[:, 0]


def _minus_target(weights: Tensor, targets: Tensor, piece: slice, amount: Tensor | float) -> Tensor:
    """Subtract ``amount`` at each row's target, in place."""
    where = torch.arange(weights.shape[0], device=weights.device)
    weights[where, targets.reshape(-1)[piece]] -= amount
    return weights


def _residual(scores: Tensor, lse: Tensor, targets: Tensor, piece: slice) -> Tensor:
    """Softmax minus one-hot, (n, V): the derivative of the losses in the logits."""
    return _minus_target(scores.sub_(lse[:, None]).exp_(), targets, piece, 1.0)


@custom_op("ttt_lit::linear_nll", mutates_args=())
def _linear_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps, (B, T) each."""
    nll, stat = _statistics(hidden), _statistics(hidden)
    for piece, scores, lse in _scored(hidden, head):
        nll.view(-1)[piece] = lse - _picked(scores, targets, piece)
        stat.view(-1)[piece] = lse
    return nll, stat


@_linear_nll.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _statistics(hidden), _statistics(hidden)


@custom_op("ttt_lit::linear_nll_backward", mutates_args=())
def _linear_nll_backward(
    dnll: Tensor, hidden: Tensor, head: Tensor, targets: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ dnll · nll in hidden and head."""
    d_head = torch.zeros(head.shape, dtype=_wide(head.dtype), device=head.device)
    d_hidden, _ = nll_adjoint(hidden, None, head, targets, dnll, 0.0, d_head)
    return d_hidden, d_head.to(head.dtype)


@_linear_nll_backward.register_fake
def _(dnll: Tensor, hidden: Tensor, head: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(hidden), _like(head)


@custom_op("ttt_lit::linear_nll_second", mutates_args=())
def _linear_nll_second(
    a: Tensor, b: Tensor, dnll: Tensor, hidden: Tensor, head: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of (dnll, hidden, head) for cotangents a (as hidden) and b (as head) of the backward's results.

    The derivative of the losses and of their gradient along the direction (a, b).
    """
    width = head.shape[1]
    d_nll = _like(dnll)
    d_hidden, d_head = _like(hidden), torch.zeros(head.shape, dtype=_wide(head.dtype), device=head.device)
    rows, direction = hidden.reshape(-1, width), a.reshape(-1, width)
    for piece, scores, lse in _scored(hidden, head):
        weight = dnll.reshape(-1)[piece, None]
        spread = _scores(direction[piece], head) + _scores(rows[piece], b)
        p = scores.sub_(lse[:, None]).exp_()
        mean = (p * spread).sum(dim=1)
        d_nll.view(-1)[piece] = mean - _picked(spread, targets, piece)
        second = (spread.sub_(mean[:, None]).mul_(p).mul_(weight)).to(head.dtype)
        first = _minus_target(p.mul_(weight), targets, piece, weight[:, 0]).to(head.dtype)
        d_hidden.view(-1, width)[piece] = second @ head + first @ b
        d_head += second.mT @ rows[piece] + first.mT @ direction[piece]
    return d_nll, d_hidden, d_head.to(head.dtype)


@_linear_nll_second.register_fake
def _(a: Tensor, b: Tensor, dnll: Tensor, hidden: Tensor, head: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(dnll), _like(hidden), _like(head)


def _save_nll(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward_of_nll(ctx: Any, dnll: Tensor | None, _: None) -> tuple[Any, ...]:
    if dnll is None:
        return None, None, None
    return *_linear_nll_backward(dnll, *ctx.saved_tensors), None


_linear_nll.register_autograd(_backward_of_nll, setup_context=_save_nll)


def _save_nll_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward_of_nll_backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return *_linear_nll_second(a, b, *ctx.saved_tensors), None, None


_linear_nll_backward.register_autograd(_backward_of_nll_backward, setup_context=_save_nll_backward)
