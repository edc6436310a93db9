"""The inner step's pieces: one clipped SGD step per sequence, its adjoint, its undoing, and the configuration."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.model.mlp import MLPWeights
from ttt_lit.ttt.inner import NORM_EPS, Factors, InnerLoop, normalised_step, sgd_step, step_adjoint, undo_step

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def random_weights(batch, seed):
    """Two layers of small matrices, gate and up (B, 3, 2), down (B, 2, 3)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    return {i: MLPWeights(draw(3, 2), draw(3, 2), draw(2, 3)) for i in (3, 5)}


def random_factors(batch, seed, tokens=4):
    generator = torch.Generator().manual_seed(seed)

    def draw(width):
        return torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)

    return {i: Factors(z=draw(2), h=draw(3), d_gate=draw(3), d_up=draw(3), d_down=draw(2)) for i in (3, 5)}


def flat(weights):
    return [w for matrices in weights.values() for w in matrices]


def clipped_sgd_naive(weights, gradients, lr, clip):
    """One sequence after the other, for autograd."""
    rows = []
    for b in range(weights[0].shape[0]):
        norm = sum((g[b] * g[b]).sum() for g in gradients).sqrt()
        factor = clip / norm if 0 < clip < norm else 1.0
        rows.append([w[b] - lr * factor * g[b] for w, g in zip(weights, gradients, strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


# Below every norm here, between them, above them, and none.
SETTINGS = given(
    st.integers(1, 3), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.01, 9.0, 1e4, 0.0]), st.integers(0, 99)
)


@settings(max_examples=40)
@SETTINGS
def test_a_step_is_clipped_sgd_of_every_sequence_on_its_own(batch, lr, clip, seed):
    fast, factors = random_weights(batch, seed), random_factors(batch, seed + 1)
    new, step = sgd_step(fast, factors, lr=lr, clip=clip)
    gradients = flat({i: f.gradient(torch.float64) for i, f in factors.items()})
    expected = clipped_sgd_naive(flat(fast), gradients, lr, clip)
    for got, wanted in zip(flat(new), expected, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)
    change = torch.stack([(v - w).flatten(1).square().sum(1) for w, v in zip(flat(fast), expected, strict=True)])
    torch.testing.assert_close(step.length, change.sum(0).sqrt(), **EXACT)


@settings(max_examples=40)
@SETTINGS
def test_the_adjoint_of_a_step_is_what_autograd_finds_for_the_inner_gradient(batch, lr, clip, seed):
    fast, factors, cotangents = (
        random_weights(batch, seed),
        random_factors(batch, seed + 1),
        random_weights(batch, seed + 2),
    )
    new, step = sgd_step(fast, factors, lr=lr, clip=clip)
    gradients = [g.requires_grad_() for g in flat({i: f.gradient(torch.float64) for i, f in factors.items()})]
    moved = clipped_sgd_naive(flat(fast), gradients, lr, clip)
    expected = torch.autograd.grad(moved, gradients, flat(cotangents))
    for got, wanted in zip(flat(step_adjoint(cotangents, fast, new, step)), expected, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@settings(max_examples=20)
@SETTINGS
def test_undoing_a_step_gives_the_weights_before_it(batch, lr, clip, seed):
    fast, factors = random_weights(batch, seed), random_factors(batch, seed + 1)
    new, step = sgd_step(fast, factors, lr=lr, clip=clip)
    for got, wanted in zip(flat(undo_step(new, factors, step.rate)), flat(fast), strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


def normalised_naive(weights, gradients, lr):
    """One sequence after the other, for autograd."""
    rows = []
    for b in range(weights[0].shape[0]):
        norm = sum((g[b] * g[b]).sum() for g in gradients).sqrt()
        rows.append([w[b] - lr * g[b] / (norm + 1e-3) for w, g in zip(weights, gradients, strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


# Gradients far above eps, near it, and far below it.
NORMALISED = given(
    st.integers(1, 3), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1.0, 1e-2, 1e-4]), st.integers(0, 99)
)


@settings(max_examples=40)
@NORMALISED
def test_a_normalised_step_and_its_adjoint_are_those_of_its_equation(batch, lr, scale, seed):
    fast, cotangents = random_weights(batch, seed), random_weights(batch, seed + 2)
    factors = {i: f._replace(z=scale * f.z, h=scale * f.h) for i, f in random_factors(batch, seed + 1).items()}
    new, step = normalised_step(fast, factors, lr=lr)
    gradients = [g.requires_grad_() for g in flat({i: f.gradient(torch.float64) for i, f in factors.items()})]
    expected = normalised_naive(flat(fast), gradients, lr)
    for got, wanted in zip(flat(new), expected, strict=True):
        torch.testing.assert_close(got, wanted.detach(), **EXACT)
    wanted = torch.autograd.grad(expected, gradients, flat(cotangents))
    for got, one in zip(flat(step_adjoint(cotangents, fast, new, step)), wanted, strict=True):
        # The direction of g is read from the weights' change, which has the rounding of the weights.
        torch.testing.assert_close(got, one, rtol=1e-8, atol=1e-9 * one.abs().max().item())
    for got, wanted in zip(flat(undo_step(new, factors, step.rate)), flat(fast), strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@settings(max_examples=20)
@given(st.integers(1, 3), st.floats(1.0, 1e4), st.integers(0, 99))
def test_a_normalised_step_has_the_length_of_the_rate_whatever_the_gradients_size(batch, scale, seed):
    factors = {i: f._replace(z=scale * f.z, h=scale * f.h) for i, f in random_factors(batch, seed).items()}
    _, step = normalised_step(random_weights(batch, seed + 1), factors, lr=0.3)
    torch.testing.assert_close(step.length, torch.full((batch,), 0.3, dtype=torch.float64), rtol=1e-3, atol=0)


def test_a_normalised_step_goes_where_a_clipped_one_goes_that_is_always_clipped():
    fast, factors = random_weights(2, 0), random_factors(2, 1)
    clipped, _ = sgd_step(fast, factors, lr=0.3, clip=1e-2)
    normalised, _ = normalised_step(fast, factors, lr=0.3e-2)
    for got, wanted, before in zip(flat(normalised), flat(clipped), flat(fast), strict=True):
        torch.testing.assert_close(got - before, wanted - before, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("take, rate", [(partial(sgd_step, clip=1.0), 0.5), (normalised_step, 0.5 / NORM_EPS)])
def test_a_zero_gradient_takes_no_step_and_has_a_finite_adjoint(take, rate):
    fast, cotangents = random_weights(2, 0), random_weights(2, 1)
    factors = {i: Factors(*(torch.zeros_like(t) for t in f)) for i, f in random_factors(2, 2).items()}
    new, step = take(fast, factors, lr=0.5)
    assert step.length.tolist() == [0.0, 0.0]
    for got, cotangent in zip(flat(step_adjoint(cotangents, fast, new, step)), flat(cotangents), strict=True):
        torch.testing.assert_close(got, -rate * cotangent)


def test_a_clip_beside_a_normalised_step_is_refused():
    with pytest.raises(ValueError, match="inner: clip 1 has no effect with rule normalised.*set clip: 0"):
        InnerLoop(rule="normalised")
    assert InnerLoop(rule="normalised", clip=0.0, lr=0.1).lr == 0.1
    with pytest.raises(ValueError, match="inner.rule: got 'adam', expected one of sgd, normalised"):
        InnerLoop(rule="adam")


@pytest.mark.parametrize("wrong", [{"lr": -0.1}, {"clip": -1.0}, {"lr": float("nan")}, {"clip": float("nan")}])
def test_a_negative_or_missing_number_is_refused(wrong):
    with pytest.raises(ValueError, match=r"inner: got lr .* expected both at least 0"):
        InnerLoop(**wrong)
