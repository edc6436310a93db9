"""The inner step's pieces: the clip and its derivative, one SGD step per sequence, and the configuration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ttt_lit.model.mlp import MLPWeights
from ttt_lit.ttt.inner import InnerLoop, clip_factor, sgd_step


@given(st.floats(0, 1e6), st.floats(1e-3, 1e3))
def test_the_clip_is_limit_over_the_larger_of_norm_and_limit(norm, clip):
    factor = clip_factor(torch.tensor([norm**2], dtype=torch.float64), clip)
    torch.testing.assert_close(factor.item(), clip / max(norm, clip), rtol=1e-9, atol=0)


def test_the_clip_has_no_derivative_below_the_limit_and_the_right_one_above():
    squared = torch.tensor([0.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    clip_factor(squared, 1.0).sum().backward()
    # d/ds of clip · s^(-1/2) at s = 4.
    assert squared.grad.tolist() == [0.0, 0.0, -0.5 * 4.0**-1.5]


def test_the_clip_is_differentiable_twice():
    squared = torch.tensor([0.0, 0.3, 2.0, 9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: clip_factor(s, 1.0), squared[1:].detach().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda s: clip_factor(s, 1.0), squared[1:].detach().requires_grad_())


def weights_of(*values):
    """Two layers of three 1×1 matrices for as many sequences as there are values."""
    batched = torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
    return {3: MLPWeights(batched, 2 * batched, 3 * batched), 5: MLPWeights(-batched, batched, batched)}


def test_one_norm_over_all_fast_weights_of_a_sequence_and_none_over_the_batch():
    gradients = weights_of(1.0, 100.0)
    norm = (1 + 4 + 9 + 1 + 1 + 1) ** 0.5
    new, lengths = sgd_step(weights_of(0.0, 0.0), gradients, lr=0.5, clip=10.0)
    assert lengths.tolist() == pytest.approx([0.5 * norm, 0.5 * 10.0])
    for layer, matrices in gradients.items():
        for moved, gradient in zip(new[layer], matrices, strict=True):
            expected = torch.stack([-0.5 * gradient[0], -0.5 * gradient[1] * 10.0 / (100 * norm)])
            torch.testing.assert_close(moved, expected)


def test_clip_zero_means_no_clipping():
    new, lengths = sgd_step(weights_of(1.0), weights_of(1e6), lr=1.0, clip=0.0)
    assert lengths.item() == pytest.approx(1e6 * 17**0.5)
    assert new[3].gate.item() == 1.0 - 1e6


@pytest.mark.parametrize("wrong", [{"lr": -0.1}, {"clip": -1.0}, {"lr": float("nan")}, {"clip": float("nan")}])
def test_a_negative_or_missing_number_is_refused(wrong):
    with pytest.raises(ValueError, match=r"inner: got lr .* expected both at least 0"):
        InnerLoop(**wrong)
