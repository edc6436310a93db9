"""Next-token loss and divergence from a teacher over the whole vocabulary, in one sweep over tiles of logits of both networks.

``nll_and_kl`` is a registered operator that saves log-sum-exps alone; its backward makes the logits again. ``token_kl``, beside
``token_nll``, is the plain twin.
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
    wide_full,
    wide_zeros,
)


def token_kl(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats of each token's distribution over the vocabulary, the teacher constant. Returns (B, T).

    hidden (B, T, D), head (V, D), teacher_hidden (B, T, E), teacher_head (V, E).
    """
    student, teacher = (
        F.log_softmax(all_logits(*operands), dim=-1)
        for operands in ((hidden, head), (teacher_hidden.detach(), teacher_head.detach()))
    )
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def nll_and_kl(
    hidden: Tensor, head: Tensor, targets: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
) -> tuple[Tensor, Tensor]:
    """``token_nll`` and ``token_kl``, (B, T) each, in one sweep without ever holding all logits of either network.

    Differentiable once in hidden and head; a second derivative raises. The teacher is a constant.
    """
    if head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"the teacher's head has {teacher_head.shape[0]:,} rows and the student's {head.shape[0]:,}; "
            "a divergence needs one vocabulary"
        )
    teacher = under_autocast(teacher_hidden.detach(), teacher_head.detach())
    nll, kl, *_ = _nll_and_kl(*under_autocast(hidden, head), targets, *teacher)
    return nll, kl


@custom_op("ttt_lit::nll_and_kl", mutates_args=())
def _nll_and_kl(
    hidden: Tensor, head: Tensor, targets: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, divergences, and log-sum-exps of student and teacher, (B, T) each."""
    results = tuple(statistics(hidden) for _ in range(4))
    rows, theirs = hidden.reshape(-1, head.shape[1]), teacher_hidden.reshape(-1, teacher_head.shape[1])
    for piece in pieces_of(rows, head):
        found = _statistics_of_piece(rows[piece], head, targets.reshape(-1)[piece], theirs[piece], teacher_head)
        for result, values in zip(results, found, strict=True):
            result.view(-1)[piece] = values
    nll, kl, lse, teacher_lse = results
    return nll, kl, lse, teacher_lse


def _statistics_of_piece(
    rows: Tensor, head: Tensor, targets: Tensor, teacher_rows: Tensor, teacher_head: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse, teacher_lse = LogSumExp(rows), LogSumExp(teacher_rows)
    at_targets, gap = wide_full(rows, torch.nan), wide_full(rows, 0.0)
    for columns in columns_of(head):
        scores = scores_of(rows, head[columns])
        teacher = scores_of(teacher_rows, teacher_head[columns])
        lse.add(scores)
        at_targets = picked(scores, targets, columns, at_targets)
        # Differences of logits first: equal networks have none, so their divergence is exactly 0.
        scores.neg_().add_(teacher)
        gap *= teacher_lse.add(teacher)
        gap += scores.mul_(teacher_lse.softmax_(teacher)).sum(dim=1)
    return lse.value - at_targets, gap + (lse.value - teacher_lse.value), lse.value, teacher_lse.value


@_nll_and_kl.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return statistics(hidden), statistics(hidden), statistics(hidden), statistics(hidden)


@custom_op("ttt_lit::nll_and_kl_backward", mutates_args=())
def _nll_and_kl_backward(
    dnll: Tensor,
    dkl: Tensor,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ dnll · nll + dkl · kl in hidden and head."""
    d_hidden, d_head = empty_contiguous(hidden), wide_zeros(head)
    rows, theirs = hidden.reshape(-1, head.shape[1]), teacher_hidden.reshape(-1, teacher_head.shape[1])
    wanted = targets.reshape(-1)
    dnll, dkl, lse, teacher_lse = (x.reshape(-1, 1) for x in (dnll, dkl, lse, teacher_lse))
    for piece in pieces_of(rows, head):
        d_rows = wide_zeros(rows[piece])
        for columns in columns_of(head):
            p = scores_of(rows[piece], head[columns]).sub_(lse[piece]).exp_().mul_((dnll + dkl)[piece])
            p -= scores_of(theirs[piece], teacher_head[columns]).sub_(teacher_lse[piece]).exp_().mul_(dkl[piece])
            add_at(p, wanted[piece], columns, -dnll[piece, 0])
            add_gradients(p, rows[piece], head, columns, d_rows, d_head)
        d_hidden.view(rows.shape)[piece] = d_rows
    return d_hidden, d_head.to(head.dtype)


@_nll_and_kl_backward.register_fake
def _(dnll: Tensor, dkl: Tensor, hidden: Tensor, head: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_contiguous(hidden), empty_contiguous(head)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs, *output[2:])


def _backward(ctx: Any, dnll: Tensor, dkl: Tensor, *_: Any) -> tuple[Any, ...]:
    return *_nll_and_kl_backward(dnll, dkl, *ctx.saved_tensors), None, None, None


_nll_and_kl.register_autograd(_backward, setup_context=_save)
_nll_and_kl_backward.register_autograd(refuse_second_derivative)
