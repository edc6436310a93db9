"""The loss in pieces is the loss as a whole, in value and in every gradient."""

import math

import pytest
import torch
from helpers.memory import LiveBytes
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.ops.cross_entropy import token_nll, token_nll_in_pieces


def problem(batch, length, vocab=7, width=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    return hidden, head, torch.randint(vocab, (batch, length), generator=generator)


def test_it_is_minus_the_log_of_the_targets_probability():
    hidden, head, targets = (t.detach() for t in problem(2, 3))
    losses = token_nll(hidden, head, targets)
    for b in range(2):
        for t in range(3):
            scores = [math.exp(float(hidden[b, t] @ row)) for row in head]
            assert losses[b, t].item() == pytest.approx(-math.log(scores[targets[b, t]] / sum(scores)), rel=1e-12)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 11), st.integers(1, 13), st.integers(0, 10**6))
def test_pieces_equal_the_whole(batch, length, piece, seed):
    hidden, head, targets = problem(batch, length, seed=seed)
    weights = torch.linspace(-1, 2, batch * length, dtype=torch.float64).view(batch, length)
    results = []
    for losses in (token_nll(hidden, head, targets), token_nll_in_pieces(hidden, head, targets, piece=piece)):
        results.append([losses.detach(), *torch.autograd.grad((losses * weights).sum(), [hidden, head])])
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)


def test_pieces_of_a_head_that_learns_on_frozen_states():
    hidden, head, targets = problem(2, 6)
    frozen = hidden.detach()
    gradients = [
        torch.autograd.grad(loss.sum(), head)[0]
        for loss in (token_nll(frozen, head, targets), token_nll_in_pieces(frozen, head, targets, piece=2))
    ]
    torch.testing.assert_close(*gradients)


def test_the_whole_is_differentiable_twice():
    hidden, head, targets = problem(1, 2, vocab=3, width=2)
    assert torch.autograd.gradgradcheck(lambda h, w: token_nll(h, w, targets), (hidden, head))


def test_no_logits_outlive_the_forward_of_their_piece():
    hidden, head, targets = problem(2, 32, vocab=500, dtype=torch.float32)
    with LiveBytes(hidden, head, targets) as live:
        losses = token_nll_in_pieces(hidden, head, targets, piece=4)
        kept = live.now()
    logits_of_a_piece = 2 * 4 * 500 * 4
    assert kept <= losses.numel() * losses.element_size() + targets.numel() * 8
    assert live.peak < 4 * logits_of_a_piece < 2 * 32 * 500 * 4


def test_half_precision_logits_are_normalised_in_float32():
    hidden, head, targets = problem(1, 4, dtype=torch.bfloat16)
    losses = token_nll(hidden, head, targets)
    assert losses.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, head).float()
    torch.testing.assert_close(losses, -torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0])
