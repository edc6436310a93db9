"""Dense → sliding window touches no tensor and no RoPE base; a window that covers the context changes no bit."""

import dataclasses

import pytest
import torch
from helpers.tiny import random_decoder, random_tokens, specs, tiny_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.convert.windowed import preserves_function, windowed
from ttt_lit.model.spec import LayerSpec


@settings(max_examples=60)
@given(specs(), st.integers(1, 50))
def test_only_windows_change_and_none_grows(spec, window):
    after = windowed(spec, window)
    assert after.parameter_shapes() == spec.parameter_shapes()
    for old, new in zip(spec.layers, after.layers, strict=True):
        assert new == dataclasses.replace(old, window=new.window)
        assert new.window == min(window, old.window or window)
    assert dataclasses.replace(after, layers=spec.layers) == spec


@given(specs())
def test_no_window_leaves_the_checkpoint_as_it_came(spec):
    assert windowed(spec, None) == spec


@settings(max_examples=40)
@given(specs(ttt=False), st.integers(1, 12), st.integers(0, 6), st.integers(0, 10**6))
def test_a_window_that_covers_the_context_changes_no_bit(spec, context, more, seed):
    decoder, tokens = random_decoder(spec, seed=seed), random_tokens(2, context, seed=seed)
    with torch.no_grad():
        before = decoder(tokens)
        after_spec = windowed(spec, context + more)
        decoder.set_spec(after_spec)
        assert torch.equal(decoder(tokens), before)
    assert preserves_function(spec, after_spec, context)


@settings(max_examples=40)
@given(specs(ttt=False), st.integers(1, 14), st.integers(2, 12), st.integers(0, 10**6))
def test_what_is_said_to_preserve_the_function_does(spec, window, context, seed):
    after = windowed(spec, window)
    decoder, tokens = random_decoder(spec, seed=seed), random_tokens(1, context, seed=seed)
    with torch.no_grad():
        before = decoder(tokens)
        decoder.set_spec(after)
        if preserves_function(spec, after, context):
            assert torch.equal(decoder(tokens), before)


@pytest.mark.parametrize("window, context, kept", [(8, 8, True), (9, 8, True), (7, 8, False), (1, 1, True)])
def test_a_window_below_the_context_is_not_said_to_preserve_the_function(window, context, kept):
    spec = tiny_spec(LayerSpec(), LayerSpec())
    assert preserves_function(spec, windowed(spec, window), context) is kept
    decoder, tokens = random_decoder(spec), random_tokens(1, context)
    with torch.no_grad():
        before = decoder(tokens)
        decoder.set_spec(windowed(spec, window))
        assert torch.equal(decoder(tokens), before) is kept


def test_one_narrowed_layer_is_enough_to_lose_the_promise():
    spec = tiny_spec(LayerSpec(), LayerSpec(window=4))
    narrowed = tiny_spec(LayerSpec(window=7), LayerSpec(window=4))
    assert not preserves_function(spec, narrowed, 8)
    assert preserves_function(spec, narrowed, 7)
