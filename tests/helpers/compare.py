"""Comparisons of tensors and of whole gradients, and the naive twin's gradients for any batch."""

import math

import torch

from ttt_lit.ttt.naive import sequence_nll_naive
from ttt_lit.ttt.scan import sequence_loss
from ttt_lit.ttt.settings import KEEP_ALL, EngineConfig

# float64 against float64: what remains is the order of sums, amplified by the softmax and the inner steps.
RELATIVE = 1e-8
# A tensor whose true gradient is zero (queries and keys of a window of 1) carries rounding noise of the whole gradient's size.
NOISE = 1e-12


def assert_same_tensors(got, expected, *, relative=RELATIVE, noise=NOISE):
    """Both mappings have the same names, and each tensor agrees to ``relative`` of its own norm."""
    assert got.keys() == expected.keys()
    total = sum(t.double().square().sum().item() for t in expected.values()) ** 0.5
    for name, wanted in expected.items():
        difference = torch.linalg.vector_norm(got[name].double() - wanted.double()).item()
        limit = relative * torch.linalg.vector_norm(wanted.double()).item() + noise * total
        assert difference <= limit, f"{name}: off by {difference:.2e}, limit {limit:.2e}"


def gradients_of(decoder):
    """Gradient per parameter; zeros where the backward did not reach."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in decoder.named_parameters()}


# Every way to trade memory for computation. The residual budget of "some" is about half of what a tiny model's chunks ask for.
ENGINES = {
    "recompute": EngineConfig(),
    "keep all": KEEP_ALL,
    "keep some": EngineConfig(recompute_blocks=False, residual_gib=8e-6),
    "factors": EngineConfig(fast_weights="factors"),
    "two levels": EngineConfig(fast_weights="two_level", residual_gib=math.inf),
    "offload": EngineConfig(fast_weights="offload"),
}


def scan(decoder, tokens, *, mode="meta", chunk=4, inner_lr=0.5, clip=1.0, rule="sgd", engine=KEEP_ALL):
    return sequence_loss(
        decoder, tokens, mode=mode, chunk=chunk, inner_lr=inner_lr, clip=clip, rule=rule, engine=engine
    )


def naive_losses_and_gradients(spec, state, tokens, *, mode="meta", chunk=4, inner_lr=0.5, clip=1.0, rule="sgd"):
    """Token losses (B, T) and the gradient of their mean, sequence by sequence, from the specification."""
    weights = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    rows = [
        sequence_nll_naive(weights, spec, row, mode=mode, chunk=chunk, inner_lr=inner_lr, clip=clip, rule=rule)
        for row in tokens
    ]
    losses = torch.stack(rows)
    gradients = torch.autograd.grad(losses.mean(), list(weights.values()), allow_unused=True, materialize_grads=True)
    return losses.detach(), dict(zip(weights, gradients, strict=True))


def assert_equals_naive(decoder, tokens, *, engine=KEEP_ALL, **inner):
    """Losses and every parameter's gradient of the fast scan against the naive twin."""
    decoder.zero_grad()
    out = scan(decoder, tokens, engine=engine, **inner)
    out.loss.backward()
    state = {name: p.detach() for name, p in decoder.named_parameters()}
    losses, gradients = naive_losses_and_gradients(decoder.spec, state, tokens, **inner)
    torch.testing.assert_close(out.token_nll.detach(), losses, rtol=RELATIVE, atol=RELATIVE)
    assert_same_tensors(gradients_of(decoder), gradients)
