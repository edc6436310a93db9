"""The scan on a network of Gemma's shape: every switch of that family at once, TTT on the global layers.

The suffix begins at the lowest global layer, so local layers without fast weights lie inside it, and the fast layers carry the keys
and values of the whole past.
"""

import dataclasses

import pytest
import torch
from helpers.bugs import past_forgotten, slope_of_the_gate_forgotten, window_off_by_one
from helpers.compare import ENGINES, assert_equals_naive, scan
from helpers.tiny import random_decoder, random_tokens, tiny_spec, ttt_layer

from ttt_lit.convert.windowed import windowed
from ttt_lit.model.spec import LayerSpec, PrimeSpec

LOCAL = LayerSpec(window=3, rope_base=10.0)
GLOBAL = ttt_layer(rope_base=1000.0)
# Four chunks of four tokens: the local window is narrower than a chunk, the past of the last chunk three chunks long.
CHUNK, TOKENS = 4, 17


def gemma_spec(fast=GLOBAL):
    """Two local layers, a global TTT layer, two local layers, a global TTT layer, a local one on top."""
    hidden = 8
    return tiny_spec(
        LOCAL,
        LOCAL,
        fast,
        LOCAL,
        LOCAL,
        fast,
        LOCAL,
        hidden_size=hidden,
        num_heads=4,
        num_kv_heads=1,
        norm_unit_offset=True,
        post_norms=True,
        qk_norm=True,
        activation="gelu_tanh",
        embedding_scale=hidden**0.5,
        score_scale=6**-0.5,
    )


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_losses_and_every_gradient_equal_the_naive_twin_in_every_engine(engine):
    spec = gemma_spec()
    assert spec.suffix_start == 2
    assert spec.ttt_layers == (2, 5)
    assert_equals_naive(random_decoder(spec), random_tokens(2, TOKENS), chunk=CHUNK, engine=engine)


@pytest.mark.parametrize("mode", ["none", "static", "first_order"])
def test_the_other_modes_too(mode):
    assert_equals_naive(random_decoder(gemma_spec()), random_tokens(2, TOKENS), chunk=CHUNK, mode=mode)


FAST = {
    "post-norm on the prime MLP": dataclasses.replace(GLOBAL, prime=PrimeSpec(intermediate_size=6, post_norm=True)),
    "ordinary MLPs are fast, before their post-norm": LayerSpec(rope_base=1000.0, fast="mlp"),
    "windowed global layers": dataclasses.replace(GLOBAL, window=6),
}


@pytest.mark.parametrize("fast", FAST.values(), ids=FAST)
def test_other_fast_layers_of_that_shape(fast):
    for engine in (ENGINES["recompute"], ENGINES["keep all"]):
        assert_equals_naive(random_decoder(gemma_spec(fast)), random_tokens(2, TOKENS), chunk=CHUNK, engine=engine)


@pytest.mark.parametrize("bug", [past_forgotten, slope_of_the_gate_forgotten, window_off_by_one])
def test_a_planted_mistake_does_not_pass(bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        assert_equals_naive(random_decoder(gemma_spec()), random_tokens(2, TOKENS), chunk=CHUNK)


def test_without_an_inner_step_the_scan_reads_what_the_decoder_reads():
    """Windows wider than the past leave the function alone; a narrower one on the global layers changes it."""
    decoder, tokens = random_decoder(gemma_spec()), random_tokens(2, TOKENS)
    with torch.no_grad():
        logits = decoder(tokens[:, :-1])
        whole = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    static = scan(decoder, tokens, mode="static", chunk=CHUNK).token_nll.detach()
    torch.testing.assert_close(static, whole, rtol=1e-10, atol=1e-10)
    spec = decoder.spec
    decoder.set_spec(windowed(spec, TOKENS - 1))
    wide = scan(decoder, tokens, mode="static", chunk=CHUNK).token_nll.detach()
    torch.testing.assert_close(wide, static, rtol=1e-10, atol=1e-10)
    decoder.set_spec(windowed(spec, 6))
    narrow = scan(decoder, tokens, mode="static", chunk=CHUNK).token_nll.detach()
    assert (narrow[:, :6] - static[:, :6]).abs().max() < 1e-10
    assert (narrow[:, 6:] - static[:, 6:]).abs().max() > 1e-4
