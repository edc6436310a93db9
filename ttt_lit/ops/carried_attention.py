"""Windowed attention of a chunk over its own and carried keys, as registered operators with exact derivatives of both orders.

``attend`` can be differentiated twice. ``attend_dual`` is the pair (output, its derivative along a direction) and can be differentiated
once, which is what the chunk adjoint does. Both are ``torch.library`` operators with autograd on every level that is offered: a pair
of ``autograd.Function`` would be exact in eager mode and silently first order under ``torch.compile``. What is not offered (a third
derivative) raises.

Carried keys are constants of the inner gradient and of every direction; the outer gradient reaches them. ``kernel`` names the
implementation: ``tiled`` (``tiled_attention.py``, any device) or ``triton`` (``triton_attention.py``, CUDA).

Source of the identity behind the second derivative: the Hessian of ⟨do, attention(q, k, v)⟩ is symmetric, so the transpose of the
backward's derivative is the derivative of forward and backward along the cotangents.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from ttt_lit.ops import tiled_attention

CarriedKernel = Literal["tiled", "triton"]


class Attended(NamedTuple):
    """Output (B, Hq, T, D) and the log-sum-exp of its rows of scores (B, Hq, T), from which the weights can be rebuilt."""

    output: Tensor
    lse: Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor] | None = None,
    *,
    scale: float,
    window: int | None,
    kernel: CarriedKernel,
    sink_tokens: int = 0,
    known: Attended | None = None,
) -> Attended:
    """Causal attention of q (B, Hq, T, D) over past and k, v (B, Hkv, T, D), within ``window`` tokens. Differentiable twice in all.

    ``past``: keys and values (B, Hkv, P, D) that come before, or None. Of past and new keys in one row, every query sees the first
    ``sink_tokens`` up to its own, however far they are. ``known``: the result, where an earlier call has computed it; its
    gradient is that of the computation, at the cost of a copy. The log-sum-exp has no gradient.
    """
    past_k, past_v = past or (None, None)
    output, lse = known or (None, None)
    return Attended(*_attend(q, k, v, past_k, past_v, output, lse, scale, window, sink_tokens, kernel))


def attend_dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor] | None,
    known: Attended,
    direction: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
    window: int | None,
    kernel: CarriedKernel,
    sink_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """The known output, and its derivative along ``direction`` (as q, k, v). Differentiable once in all tensors but ``known``."""
    past_k, past_v = past or (None, None)
    settings = (scale, window, sink_tokens, kernel)
    output, tangent, _ = _attend_dual(q, k, v, past_k, past_v, *known, *direction, *settings)
    return output, tangent


def _functions(kernel: str) -> ModuleType:
    if kernel == "tiled":
        return tiled_attention
    from ttt_lit.ops import triton_attention  # needs triton, which exists for CUDA builds of torch

    return triton_attention


def _joined(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat([past, new], dim=2)


def _like(x: Tensor, num_keys: int | None = None) -> Tensor:
    return x.new_empty(x.shape if num_keys is None else (*x.shape[:2], num_keys, x.shape[3]))


def _copy(x: Tensor) -> Tensor:
    """Contiguous whatever x is, as the operators promise of their results."""
    return x.clone(memory_format=torch.contiguous_format)


def _statistics(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _split(gradient: Tensor, past: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """A gradient of all keys as (of the carried ones, of the new ones)."""
    if past is None:
        return None, gradient
    return gradient[:, :, : past.shape[2]], gradient[:, :, past.shape[2] :]


@custom_op("ttt_lit::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    known_output: Tensor | None,
    known_lse: Tensor | None,
    scale: float,
    window: int | None,
    sink_tokens: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    if known_output is not None and known_lse is not None:
        return _copy(known_output), _copy(known_lse)
    return _functions(kernel).forward(q, _joined(past_k, k), _joined(past_v, v), scale, window, sink_tokens)


@_attend.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q), _statistics(q)


@custom_op("ttt_lit::attend_backward", mutates_args=())
def _attend_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    sink_tokens: int,
    kernel: str,
    with_past: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, and dk and dv of the new keys, or of carried and new ones together."""
    keys, values = _joined(past_k, k), _joined(past_v, v)
    count = keys.shape[2] if with_past else k.shape[2]
    return _functions(kernel).backward(do, q, keys, values, output, lse, scale, window, sink_tokens, count)


@_attend_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = k.shape[2] + (past_k.shape[2] if past_k is not None and rest[-1] else 0)
    return _like(q), _like(k, count), _like(v, count)


@custom_op("ttt_lit::attend_dual", mutates_args=())
def _attend_dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    output: Tensor,
    lse: Tensor,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    scale: float,
    window: int | None,
    sink_tokens: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, its tangent, and mu. ``tk`` and ``tv`` may cover carried keys too."""
    keys, values = _joined(past_k, k), _joined(past_v, v)
    tangent, mu = _functions(kernel).jvp(q, keys, values, output, lse, tq, tk, tv, scale, window, sink_tokens)
    return _copy(output), tangent, mu


@_attend_dual.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(q), _statistics(q)


@custom_op("ttt_lit::attend_dual_backward", mutates_args=())
def _attend_dual_backward(
    do: Tensor | None,
    dto: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    output: Tensor,
    lse: Tensor,
    to: Tensor,
    mu: Tensor,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    scale: float,
    window: int | None,
    sink_tokens: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk and dv of carried and new keys, dtq, and dtk and dtv of the keys that have a direction."""
    keys, values = _joined(past_k, k), _joined(past_v, v)
    function = _functions(kernel).dual_backward
    return function(do, dto, q, keys, values, output, lse, to, mu, tq, tk, tv, scale, window, sink_tokens)


@_attend_dual_backward.register_fake
def _(
    do: Tensor | None, dto: Tensor, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = k.shape[2] + (0 if past_k is None else past_k.shape[2])
    tk, tv = rest[6], rest[7]
    return _like(q), _like(k, count), _like(v, count), _like(q), _like(tk), _like(tv)


def _save_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, _, scale, window, sink_tokens, kernel = inputs
    ctx.settings = scale, window, sink_tokens, kernel
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward_of_attend(ctx: Any, do: Tensor | None, _: None) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 11
    q, k, v, past_k, past_v, output, lse = ctx.saved_tensors
    with_past = past_k is not None and any(ctx.needs_input_grad[3:5])
    dq, dk, dv = _attend_backward(do, q, k, v, past_k, past_v, output, lse, *ctx.settings, with_past)
    past = past_k if with_past else None
    (dpk, dk), (dpv, dv) = _split(dk, past), _split(dv, past)
    return dq, dk, dv, dpk, dpv, *(None,) * 6


_attend.register_autograd(_backward_of_attend, setup_context=_save_attend)


def _save_attend_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, window, sink_tokens, kernel, _ = inputs
    ctx.settings = scale, window, sink_tokens, kernel
    ctx.save_for_backward(*tensors)


def _backward_of_attend_backward(ctx: Any, tq: Tensor, tk: Tensor, tv: Tensor) -> tuple[Any, ...]:
    """Output and log-sum-exp are functions of q, k and v: what flows through them is in the gradients of q, k and v."""
    do, q, k, v, past_k, past_v, output, lse = ctx.saved_tensors
    carried = (q, k, v, past_k, past_v, output, lse)
    _, to, mu = _attend_dual(*carried, tq, tk, tv, *ctx.settings)
    dq, dk, dv, *_ = _attend_dual_backward(None, do, *carried, to, mu, tq, tk, tv, *ctx.settings)
    (dpk, dk), (dpv, dv) = _split(dk, past_k), _split(dv, past_v)
    return to, dq, dk, dv, dpk, dpv, *(None,) * 7


_attend_backward.register_autograd(_backward_of_attend_backward, setup_context=_save_attend_backward)


def _save_dual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, past_k, past_v, known, lse, tq, tk, tv, scale, window, sink_tokens, kernel = inputs
    ctx.settings = scale, window, sink_tokens, kernel
    _, to, mu = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mu)
    ctx.save_for_backward(q, k, v, past_k, past_v, known, lse, to, mu, tq, tk, tv)


def _backward_of_dual(ctx: Any, do: Tensor | None, dto: Tensor | None, _: None) -> tuple[Any, ...]:
    q, k, v, past_k, past_v, *rest = ctx.saved_tensors
    if dto is None:
        dto = torch.zeros_like(rest[2])
    dq, dk, dv, dtq, dtk, dtv = _attend_dual_backward(do, dto, q, k, v, past_k, past_v, *rest, *ctx.settings)
    (dpk, dk), (dpv, dv) = _split(dk, past_k), _split(dv, past_v)
    return dq, dk, dv, dpk, dpv, None, None, dtq, dtk, dtv, *(None,) * 4


_attend_dual.register_autograd(_backward_of_dual, setup_context=_save_dual)
