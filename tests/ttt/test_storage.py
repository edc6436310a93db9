"""Each policy gives back what it was given, and keeps what it promises."""

import pytest
import torch
from helpers.compare import scan
from helpers.tiny import random_decoder, random_tokens, tiny_spec, ttt_layer

from ttt_lit.model.mlp import MLPWeights
from ttt_lit.model.spec import LayerSpec
from ttt_lit.ttt.inner import Factors, sgd_step
from ttt_lit.ttt.settings import EngineConfig
from ttt_lit.ttt.storage import make_store

POLICIES = ["every", "factors", "two_level", "offload"]


def steps(num_chunks):
    """Weights of every chunk of a made-up reading, and the step that made each."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    weights = [{0: MLPWeights(draw(3, 2), draw(3, 2), draw(2, 3))}]
    made = [None]
    for _ in range(num_chunks - 1):
        factors = {0: Factors(draw(4, 2), draw(4, 3), draw(4, 3), draw(4, 3), draw(4, 2))}
        new, step = sgd_step(weights[-1], factors, lr=0.3, clip=2.0)
        weights.append(new)
        made.append((factors, step.rate))
    return weights, made


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4, 5, 9, 10, 17])
def test_weights_come_back_from_the_last_chunk_to_the_first(policy, num_chunks):
    weights, made = steps(num_chunks)
    taken_again = []

    def resume(index, fast):
        taken_again.append(index)
        torch.testing.assert_close(fast[0].gate, weights[index][0].gate)
        return weights[index + 1]

    store = make_store(policy, num_chunks, resume)
    for i, (w, step) in enumerate(zip(weights, made, strict=True)):
        store.save(i, w, step)
    for i in reversed(range(num_chunks)):
        for got, wanted in zip(store.load(i)[0], weights[i][0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert bool(taken_again) == (policy == "two_level" and num_chunks > 1)
    assert len(set(taken_again)) == len(taken_again)  # each step at most once


def test_a_second_backward_is_refused_since_the_first_has_freed_everything():
    decoder = random_decoder(tiny_spec(LayerSpec(), ttt_layer(window=5), ttt_layer(window=3)))
    loss = scan(decoder, random_tokens(2, 21)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="read the sequence again for a second backward"):
        loss.backward()


def test_the_meta_gradient_cannot_be_differentiated_again():
    decoder = random_decoder(tiny_spec())
    loss = scan(decoder, random_tokens(1, 9)).loss
    with pytest.raises(RuntimeError, match="cannot be differentiated again: call backward without create_graph"):
        torch.autograd.grad(loss, list(decoder.parameters()), create_graph=True)


def test_a_parameter_that_changed_since_the_forward_is_noticed():
    decoder = random_decoder(tiny_spec())
    loss = scan(decoder, random_tokens(1, 9)).loss
    with torch.no_grad():
        decoder.layers[1].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"fast_weights": "disk"},
            r"engine.fast_weights: got 'disk', expected one of every, factors, two_level, offload",
        ),
        ({"residual_gib": -1.0}, r"engine.residual_gib: got -1.0, expected at least 0"),
        ({"residual_gib": float("nan")}, r"engine.residual_gib: got nan"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**wrong)
