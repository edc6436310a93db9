"""Dense → sliding window touches no tensor and no RoPE base; a window that covers the context changes no bit."""

import dataclasses

import pytest
import torch
from helpers.compare import scan
from helpers.tiny import decoder_of, random_decoder, random_state, random_tokens, specs, tiny_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.convert.fast_mlp import new_tensors
from ttt_lit.convert.windowed import preserves_function, windowed, with_sink_logits, with_windows
from ttt_lit.model.spec import LayerSpec


def imported(**choices):
    """Any network without sinks of either kind, as no published model of our families has any."""
    none = {"sink_tokens": 0, "sink_logit": False}
    return specs(**choices).map(
        lambda spec: spec.with_layers(tuple(dataclasses.replace(layer, **none) for layer in spec.layers))
    )


@settings(max_examples=60)
@given(imported(), st.integers(1, 50))
def test_only_windows_change_and_none_grows(spec, window):
    after = windowed(spec, window)
    assert after.parameter_shapes() == spec.parameter_shapes()
    for old, new in zip(spec.layers, after.layers, strict=True):
        assert new == dataclasses.replace(old, window=new.window)
        assert new.window == min(window, old.window or window)
    assert dataclasses.replace(after, layers=spec.layers) == spec


@given(imported())
def test_no_window_leaves_the_checkpoint_as_it_came(spec):
    assert windowed(spec, None) == spec


@settings(max_examples=40)
@given(imported(ttt=False), st.integers(1, 12), st.integers(0, 6), st.integers(0, 10**6))
def test_a_window_that_covers_the_context_changes_no_bit(spec, context, more, seed):
    decoder, tokens = random_decoder(spec, seed=seed), random_tokens(2, context, seed=seed)
    with torch.no_grad():
        before = decoder(tokens)
        after_spec = windowed(spec, context + more)
        decoder.set_spec(after_spec)
        assert torch.equal(decoder(tokens), before)
    assert preserves_function(spec, after_spec, context)


@settings(max_examples=40)
@given(imported(ttt=False), st.integers(1, 14), st.integers(2, 12), st.integers(0, 10**6))
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


@settings(max_examples=60)
@given(imported(), st.integers(1, 50), st.integers(0, 9), st.data())
def test_sinks_are_for_narrowed_full_attention_and_kept_layers_are_left_alone(spec, window, sinks, data):
    keep = data.draw(st.sets(st.integers(0, spec.num_layers - 1)))
    after = windowed(spec, window, sink_tokens=sinks, keep=keep)
    for index, (old, new, plain) in enumerate(
        zip(spec.layers, after.layers, windowed(spec, window).layers, strict=True)
    ):
        if index in keep or (old.window is not None and old.window <= window):
            assert new == old
        else:
            assert plain.sink_tokens == 0
            assert new == dataclasses.replace(plain, sink_tokens=sinks if old.window is None else 0)


@settings(max_examples=60)
@given(imported(ttt=False), st.integers(1, 9), st.integers(0, 9), st.integers(2, 12), st.integers(0, 10**6))
def test_with_sinks_too_what_is_said_to_preserve_the_function_does(spec, window, sinks, context, seed):
    after = windowed(spec, window, sink_tokens=sinks)
    decoder, tokens = random_decoder(spec, seed=seed), random_tokens(1, context, seed=seed)
    with torch.no_grad():
        before = decoder(tokens)
        decoder.set_spec(after)
        if preserves_function(spec, after, context):
            assert torch.equal(decoder(tokens), before)


@pytest.mark.parametrize(
    "window, sinks, context, kept", [(5, 3, 8, True), (1, 7, 8, True), (5, 2, 8, False), (5, 0, 8, False)]
)
def test_sinks_that_close_the_gap_restore_the_function(window, sinks, context, kept):
    spec = tiny_spec(LayerSpec(), LayerSpec())
    after = windowed(spec, window, sink_tokens=sinks)
    assert preserves_function(spec, after, context) is kept
    decoder, tokens = random_decoder(spec), random_tokens(1, context)
    with torch.no_grad():
        before = decoder(tokens)
        decoder.set_spec(after)
        assert torch.equal(decoder(tokens), before) is kept


def test_a_layer_that_had_a_window_gets_no_sinks_when_it_is_narrowed_further():
    spec = tiny_spec(LayerSpec(window=6), LayerSpec(), LayerSpec(window=3))
    after = windowed(spec, 4, sink_tokens=2)
    assert [(layer.window, layer.sink_tokens) for layer in after.layers] == [(4, 0), (4, 2), (3, 0)]


def test_sinks_that_go_are_seen():
    spec = tiny_spec(LayerSpec(), LayerSpec())
    sinks, narrow = windowed(spec, 3, sink_tokens=2), windowed(spec, 3)
    assert not preserves_function(sinks, narrow, 8)
    assert not preserves_function(sinks, windowed(spec, 4, sink_tokens=1), 8)
    assert preserves_function(sinks, narrow, 3)


def test_one_kept_layer_is_enough_to_see_everything():
    """Two layers, window 1: only through a dense layer does the first token reach the last prediction."""
    spec = tiny_spec(LayerSpec(), LayerSpec())
    tokens = random_tokens(1, 6)
    other = torch.cat([(tokens[:, :1] + 1) % spec.vocab_size, tokens[:, 1:]], dim=1)
    for keep, reaches in (((), False), ((0,), True), ((1,), True)):
        decoder = random_decoder(windowed(spec, 1, keep=keep))
        with torch.no_grad():
            assert torch.equal(decoder(tokens)[:, -1], decoder(other)[:, -1]) is not reaches


@pytest.mark.parametrize("given", [{"sink_tokens": 1}, {"keep": (0,)}])
def test_without_a_window_there_is_nothing_to_except_from(given):
    with pytest.raises(ValueError, match="without a window"):
        windowed(tiny_spec(), None, **given)


def test_a_layer_that_does_not_exist_cannot_be_kept():
    with pytest.raises(ValueError, match=r"keep has layers \[-1, 2\], expected indices from 0 to 1"):
        windowed(tiny_spec(), 4, keep=(1, 2, -1))


@settings(max_examples=30)
@given(
    imported(ttt=False),
    st.integers(1, 9),
    st.integers(0, 3),
    st.sampled_from(["none", "static"]),
    st.integers(0, 10**6),
)
def test_learned_sinks_begin_without_effect_and_with_a_gradient(spec, window, sinks, mode, seed):
    """Where a window cuts, the same kernel runs and no bit changes."""
    narrow = windowed(spec, window, sink_tokens=sinks)
    layers = [i for i, layer in enumerate(narrow.layers) if layer.window + layer.sink_tokens < 12]
    with_sinks = with_sink_logits(narrow, layers)
    state, tokens = random_state(narrow, seed=seed), random_tokens(2, 13, seed=seed)
    added = {name: torch.zeros(shape).double() for name, shape in new_tensors(narrow, with_sinks).items()}
    assert len(added) == len(layers)
    before, decoder = decoder_of(narrow, state), decoder_of(with_sinks, state | added)
    losses = [scan(d, tokens, mode=mode).token_nll for d in (before, decoder)]
    assert torch.equal(*losses)
    losses[1].mean().backward()
    # A window of one without a token sink gives every head the value of its own key, which a scale moves; norms may undo it.
    assert all(decoder.get_parameter(name).grad.isfinite().all() for name in added)
    if not spec.post_norms:
        assert all(decoder.get_parameter(name).grad.any() for name in added)


@given(imported(), st.integers(1, 9))
def test_imported_windows_come_back_without_sinks(spec, window):
    narrow = windowed(spec, window, sink_tokens=3)
    assert with_windows(narrow, [layer.window for layer in spec.layers]) == spec
