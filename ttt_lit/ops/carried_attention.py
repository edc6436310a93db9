"""Windowed attention of a chunk over its own and carried keys, as registered operators with exact derivatives of both orders.

``attend`` can be differentiated twice. ``attend_dual`` is the pair (output, its derivative along a direction) and can be differentiated
once, which is what the chunk adjoint does. Both are ``torch.library`` operators with autograd on every level that is offered: a pair
of ``autograd.Function`` would be exact in eager mode and silently first order under ``torch.compile``. What is not offered (a third
derivative) raises.

A learned sink is a mass m of every query head that its softmax has in the denominator beside the exponentials of the scores. It makes
lse' = log(exp lse + m) of the log-sum-exp and scales the output by exp(lse − lse'). From these two every weight and derivative of the
scores follows as without it, so the kernels know nothing of it; only m's own gradient is new, a row sum for each order.

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
    sink_mass: Tensor | None = None,
    known: Attended | None = None,
) -> Attended:
    """Causal attention of q (B, Hq, T, D) over past and k, v (B, Hkv, T, D), within ``window`` tokens. Differentiable twice in all.

    ``past``: keys and values (B, Hkv, P, D) that come before, or None. Of past and new keys in one row, every query sees the first
    ``sink_tokens`` up to its own, however far they are. ``sink_mass`` (Hq,) ≥ 0 joins the softmax's denominators; what an inner gradient
    says of it is a constant, and asking for more raises. ``known``: the result, where an earlier call has computed it; its
    gradient is that of the computation, at the cost of a copy. The log-sum-exp has no gradient.
    """
    past_k, past_v = past or (None, None)
    output, lse = known or (None, None)
    return Attended(*_attend(q, k, v, past_k, past_v, output, lse, sink_mass, scale, window, sink_tokens, kernel))


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
    sink_mass: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The known output, and its derivative along ``direction`` (as q, k, v). Differentiable once in all tensors but ``known``."""
    past_k, past_v = past or (None, None)
    settings = (scale, window, sink_tokens, kernel)
    output, tangent, _ = _attend_dual(q, k, v, past_k, past_v, *known, *direction, sink_mass, *settings)
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


def _with_mass(output: Tensor, lse: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of rows whose denominators gain a head's mass. A mass of zero changes no bit."""
    whole = torch.logaddexp(lse, mass.to(lse.dtype).log()[:, None])
    return output.mul_((lse - whole).exp_()[..., None]), whole


def _mass_gradient(mass: Tensor | None, lse: Tensor, *products: tuple[Tensor | None, Tensor]) -> Tensor:
    """Σ exp(−lse) ∘ rowsum(x ∘ y) of every head over all products (x, y); empty without a mass."""
    if mass is None:
        return lse.new_empty(0)
    rows = sum((x.to(lse.dtype) * y.to(lse.dtype)).sum(dim=-1) for x, y in products if x is not None)
    return (rows * (-lse).exp()).sum(dim=(0, 2)).to(mass.dtype)


def _like_mass(mass: Tensor | None, lse: Tensor) -> Tensor:
    return lse.new_empty(0) if mass is None else torch.empty_like(mass)


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
    mass: Tensor | None,
    scale: float,
    window: int | None,
    sink_tokens: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    if known_output is not None and known_lse is not None:
        return _copy(known_output), _copy(known_lse)
    output, lse = _functions(kernel).forward(q, _joined(past_k, k), _joined(past_v, v), scale, window, sink_tokens)
    return (output, lse) if mass is None else _with_mass(output, lse, mass)


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
    mass: Tensor | None,
    scale: float,
    window: int | None,
    sink_tokens: int,
    kernel: str,
    with_past: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk and dv of the new keys, or of carried and new ones together, and dm."""
    keys, values = _joined(past_k, k), _joined(past_v, v)
    count = keys.shape[2] if with_past else k.shape[2]
    found = _functions(kernel).backward(do, q, keys, values, output, lse, scale, window, sink_tokens, count)
    return *found, _mass_gradient(mass, lse, (-do, output))


@_attend_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    count = k.shape[2] + (past_k.shape[2] if past_k is not None and rest[-1] else 0)
    return _like(q), _like(k, count), _like(v, count), _like_mass(rest[3], rest[2])


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
    mass: Tensor | None,
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
    mass: Tensor | None,
    scale: float,
    window: int | None,
    sink_tokens: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk and dv of carried and new keys, dtq, dtk and dtv of the keys that have a direction, and dm."""
    keys, values = _joined(past_k, k), _joined(past_v, v)
    function = _functions(kernel).dual_backward
    found = function(do, dto, q, keys, values, output, lse, to, mu, tq, tk, tv, scale, window, sink_tokens)
    return *found, _mass_gradient(
        mass, lse, (mu[..., None] * dto, output), (-dto, to), (None if do is None else -do, output)
    )


@_attend_dual_backward.register_fake
def _(
    do: Tensor | None, dto: Tensor, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    count = k.shape[2] + (0 if past_k is None else past_k.shape[2])
    _, _, lse, _, _, _, tk, tv, mass, *_ = rest
    return _like(q), _like(k, count), _like(v, count), _like(q), _like(tk), _like(tv), _like_mass(mass, lse)


def _save_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, _, mass, scale, window, sink_tokens, kernel = inputs
    ctx.settings = scale, window, sink_tokens, kernel
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, mass)


def _backward_of_attend(ctx: Any, do: Tensor | None, _: None) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 12
    q, k, v, past_k, past_v, output, lse, mass = ctx.saved_tensors
    with_past = past_k is not None and any(ctx.needs_input_grad[3:5])
    dq, dk, dv, dm = _attend_backward(do, q, k, v, past_k, past_v, output, lse, mass, *ctx.settings, with_past)
    past = past_k if with_past else None
    (dpk, dk), (dpv, dv) = _split(dk, past), _split(dv, past)
    return dq, dk, dv, dpk, dpv, None, None, None if mass is None else dm, *(None,) * 4


_attend.register_autograd(_backward_of_attend, setup_context=_save_attend)


def _save_attend_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, window, sink_tokens, kernel, _ = inputs
    ctx.settings = scale, window, sink_tokens, kernel
    ctx.shapes = [x.shape for x in output[:3]]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_of_attend_backward(
    ctx: Any, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, tm: Tensor | None
) -> tuple[Any, ...]:
    """Output and log-sum-exp are functions of q, k, v and m: what flows through them is in the gradients of these."""
    do, q, k, v, past_k, past_v, output, lse, mass = ctx.saved_tensors
    if tm is not None and mass is not None:
        raise RuntimeError("the gradient of a learned sink is a constant: no outer gradient goes through it")
    direction = [q.new_zeros(s) if t is None else t for t, s in zip((tq, tk, tv), ctx.shapes, strict=True)]
    carried = (q, k, v, past_k, past_v, output, lse)
    _, to, mu = _attend_dual(*carried, *direction, mass, *ctx.settings)
    dq, dk, dv, *_, dm = _attend_dual_backward(None, do, *carried, to, mu, *direction, mass, *ctx.settings)
    (dpk, dk), (dpv, dv) = _split(dk, past_k), _split(dv, past_v)
    return to, dq, dk, dv, dpk, dpv, None, None, None if mass is None else dm, *(None,) * 5


_attend_backward.register_autograd(_backward_of_attend_backward, setup_context=_save_attend_backward)


def _save_dual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, past_k, past_v, known, lse, tq, tk, tv, mass, scale, window, sink_tokens, kernel = inputs
    ctx.settings = scale, window, sink_tokens, kernel
    _, to, mu = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mu)
    ctx.save_for_backward(q, k, v, past_k, past_v, known, lse, to, mu, tq, tk, tv, mass)


def _backward_of_dual(ctx: Any, do: Tensor | None, dto: Tensor | None, _: None) -> tuple[Any, ...]:
    q, k, v, past_k, past_v, *rest = ctx.saved_tensors
    if dto is None:
        dto = torch.zeros_like(rest[2])
    dq, dk, dv, dtq, dtk, dtv, dm = _attend_dual_backward(do, dto, q, k, v, past_k, past_v, *rest, *ctx.settings)
    (dpk, dk), (dpv, dv) = _split(dk, past_k), _split(dv, past_v)
    return dq, dk, dv, dpk, dpv, None, None, dtq, dtk, dtv, None if rest[-1] is None else dm, *(None,) * 4


_attend_dual.register_autograd(_backward_of_dual, setup_context=_save_dual)
