"""Every loss of a probe against the specification, token by token, in float64."""

import dataclasses

import pytest
import torch
from helpers.tiny import decoder_of, random_decoder, random_state, random_tokens, specs, tiny_spec, ttt_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.convert.windowed import windowed
from ttt_lit.model.spec import LayerSpec
from ttt_lit.probe.measure import (
    fresh_context_losses,
    losses_while_learning,
    losses_with_one_other,
    token_losses,
)
from ttt_lit.ttt.naive import sequence_nll_naive

# float64 against float64: what remains is the order of sums, amplified by softmax and inner steps.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
T = 24
DENSE = tiny_spec(LayerSpec(rope_base=100.0), LayerSpec(rope_base=50.0), LayerSpec(rope_base=100.0))


def naive(state, spec, tokens, *, mode="none", chunk=T, rate=0.0, clip=1.0):
    weights = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    return sequence_nll_naive(weights, spec, tokens, mode=mode, chunk=chunk, inner_lr=rate, clip=clip).detach()


@settings(max_examples=25)
@given(spec=specs(ttt=False), window=st.integers(1, T + 2), sinks=st.integers(0, 5), first=st.integers(0, T - 1))
def test_losses_under_any_window_and_sinks_are_those_of_the_specification(spec, window, sinks, first):
    spec, state = windowed(spec, window, sink_tokens=sinks), random_state(spec)
    tokens = random_tokens(1, T + 1)
    got = token_losses(decoder_of(spec, state), spec.layers, tokens, first=first)
    torch.testing.assert_close(got[0], naive(state, spec, tokens[0])[first:], **EXACT)


def test_a_window_of_the_whole_context_has_the_losses_of_the_imported_model():
    decoder, tokens = random_decoder(DENSE), random_tokens(2, T + 1)
    dense = token_losses(decoder, DENSE.layers, tokens)
    for window in (T, T + 1, 10 * T):
        torch.testing.assert_close(token_losses(decoder, windowed(DENSE, window).layers, tokens), dense, rtol=0, atol=0)


@pytest.mark.parametrize("window", [3, 8])
def test_inside_the_window_no_sinks_and_no_window_change_a_loss(window):
    decoder, tokens = random_decoder(DENSE), random_tokens(1, T + 1)
    dense = token_losses(decoder, DENSE.layers, tokens)[0]
    for sinks in (0, 2):
        cut = token_losses(decoder, windowed(DENSE, window, sink_tokens=sinks).layers, tokens)[0]
        torch.testing.assert_close(cut[:window], dense[:window], **EXACT)
        assert (cut[window + sinks :] - dense[window + sinks :]).abs().min() > 1e-6


@pytest.mark.parametrize("indices", [[0, 1, 2], [1], [2, 0]])
def test_one_sweep_gives_what_a_network_for_each_kept_layer_gives(indices):
    state, tokens = random_state(DENSE), random_tokens(1, T + 1)
    narrow = windowed(DENSE, 5, sink_tokens=1)
    others = {i: DENSE.layers[i] for i in indices}
    got = dict(losses_with_one_other(decoder_of(DENSE, state), narrow.layers, others, tokens, first=5))
    assert sorted(got) == sorted(indices)
    for i, losses in got.items():
        kept = windowed(DENSE, 5, sink_tokens=1, keep=[i])
        torch.testing.assert_close(losses[0], naive(state, kept, tokens[0])[5:], **EXACT)


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("window, stride", [(4, 4), (6, 2), (5, 3), (1, 1), (12, 7), (T - 2, 1)])
def test_the_ceiling_is_each_token_in_a_context_of_its_own(window, stride, has_bos):
    state, tokens = random_state(DENSE), random_tokens(1, T + 1)
    got = fresh_context_losses(
        decoder_of(DENSE, state), DENSE.layers, tokens, window=window, stride=stride, has_bos=has_bos
    )
    row = tokens[0]
    expected = []
    for position in range(window + stride, T):
        begin = position - (position - window) % stride - window  # of its piece's context
        seen = torch.cat([row[:1] if has_bos else row[:0], row[begin : position + 2]])
        assert window <= position - begin < window + stride
        assert begin > 0
        expected.append(naive(state, DENSE, seen)[-1])
    torch.testing.assert_close(got, torch.stack(expected), **EXACT)


def test_the_ceiling_keeps_windows_that_the_model_was_imported_with():
    spec = tiny_spec(LayerSpec(window=3), LayerSpec())
    state, tokens = random_state(spec), random_tokens(1, T + 1)
    got = fresh_context_losses(decoder_of(spec, state), spec.layers, tokens, window=8, stride=8, has_bos=False)
    torch.testing.assert_close(got, naive(state, spec, tokens[0, 8:])[8:], **EXACT)


@pytest.mark.parametrize("window, sinks", [(None, 0), (6, 0), (6, 2)])
def test_learning_at_several_rates_is_the_specification_at_each(window, sinks):
    spec = windowed(tiny_spec(LayerSpec(), ttt_layer(), ttt_layer()), window, sink_tokens=sinks)
    state, tokens = random_state(spec), random_tokens(1, T + 1)
    found = dict(losses_while_learning(decoder_of(spec, state), spec, tokens, rates=[1.0, 0.1], chunk=4, clip=0.5))
    assert list(found) == [1.0, 0.1]
    for rate, out in found.items():
        expected = naive(state, spec, tokens[0], mode="meta", chunk=4, rate=rate, clip=0.5)
        torch.testing.assert_close(out.token_nll[0], expected, **EXACT)
        assert out.update_norms.shape == (T // 4 - 1, 1)
        assert (out.update_norms <= 0.5 * rate * (1 + 1e-9)).all()


def test_learning_at_rate_0_is_reading_without_updates():
    spec = tiny_spec(LayerSpec(), ttt_layer(window=6, sink_tokens=1))
    state = {name: torch.zeros_like(t) if "prime_mlp.down" in name else t for name, t in random_state(spec).items()}
    tokens = random_tokens(1, T + 1)
    ((_, out),) = losses_while_learning(decoder_of(spec, state), spec, tokens, rates=[0.0], chunk=8, clip=1.0)
    # The prime MLP still adds nothing, so the network without it is the same.
    bare = spec.with_layers(tuple(dataclasses.replace(layer, prime=None, fast=None) for layer in spec.layers))
    torch.testing.assert_close(out.token_nll, token_losses(decoder_of(spec, state), bare.layers, tokens), **EXACT)
    assert not out.update_norms.any()
