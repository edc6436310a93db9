"""Inserting prime MLPs: which layers, which tensors, and that nothing changes at step 0."""

import dataclasses

import pytest
import torch
from helpers.compare import scan
from helpers.tiny import decoder_of, random_state, random_tokens, specs, tiny_spec, ttt_layer
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ttt_lit.convert.fast_mlp import TTTConfig, new_tensors, prime_state, ttt_layers, with_prime
from ttt_lit.convert.windowed import windowed
from ttt_lit.model.spec import LayerSpec

PRESERVING = ["copy", "random"]


@st.composite
def plain_specs(draw):
    """A network as imported: no prime MLP anywhere."""
    spec = draw(specs(ttt=False))
    return spec.with_layers(tuple(dataclasses.replace(layer, prime=None) for layer in spec.layers))


def converted(spec, state, *, init="copy", seed=0, **config):
    after = with_prime(spec, TTTConfig(prime_init=init, **config))
    return after, state | prime_state(spec, after, state, init=init, seed=seed)


@settings(max_examples=50)
@given(plain_specs(), st.sampled_from(PRESERVING), st.data())
def test_logits_are_bit_identical(spec, init, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, spec.num_layers - 1), min_size=1)))
    state, tokens = random_state(spec), random_tokens(2, 9)
    after, new_state = converted(spec, state, init=init, layers=chosen)
    assert after.ttt_layers == tuple(chosen)
    with torch.no_grad():
        assert torch.equal(decoder_of(after, new_state)(tokens), decoder_of(spec, state)(tokens))


@settings(max_examples=20)
@given(plain_specs(), st.sampled_from(PRESERVING))
def test_the_first_chunk_and_a_rate_of_zero_read_as_before(spec, init):
    """What a conversion promises of the inner loop: until the first update, and without updates at all, nothing is different."""
    state, tokens = random_state(spec), random_tokens(2, 9)
    after, new_state = converted(spec, state, init=init)
    with torch.no_grad():
        before = scan(decoder_of(spec, state), tokens, mode="none").token_nll
        decoder = decoder_of(after, new_state)
        torch.testing.assert_close(scan(decoder, tokens, inner_lr=0.0).token_nll, before, rtol=0, atol=1e-11)
        torch.testing.assert_close(scan(decoder, tokens).token_nll[:, :4], before[:, :4], rtol=0, atol=1e-11)


@pytest.mark.parametrize("init", PRESERVING)
def test_the_silent_start_is_not_a_dead_one(init):
    """The down-projection has a gradient at once, inside and outside: the new layers learn from the first step."""
    spec = tiny_spec(LayerSpec(), LayerSpec())
    after, state = converted(spec, random_state(spec), init=init)
    decoder = decoder_of(after, state)
    out = scan(decoder, random_tokens(2, 9))
    assert (out.update_norms > 0).all()
    out.loss.backward()
    assert decoder.layers[1].prime_mlp.down_proj.weight.grad.any()


def test_the_papers_start_changes_the_function():
    spec = tiny_spec(LayerSpec(), LayerSpec())
    state, tokens = random_state(spec), random_tokens(1, 9)
    after, new_state = converted(spec, state, init="paper")
    with torch.no_grad():
        difference = decoder_of(after, new_state)(tokens) - decoder_of(spec, state)(tokens)
    assert difference.abs().max() > 0.01
    assert after.layers[1].prime.post_norm
    assert new_state["layers.1.prime_mlp.down_proj.weight"].any()


@given(plain_specs(), st.sampled_from(["copy", "random", "paper"]))
def test_new_tensors_are_the_prime_mlps_and_their_norms_and_nothing_else_moves(spec, init):
    state = random_state(spec)
    after, new_state = converted(spec, state, init=init)
    added = new_tensors(spec, after)
    assert new_state.keys() == after.parameter_shapes().keys()
    for name, tensor in new_state.items():
        if name in added:
            assert any(part in name for part in ("prime_mlp.", "pre_prime_layernorm.", "post_prime_layernorm."))
            assert tuple(tensor.shape) == added[name]
            assert tensor.dtype == state["norm.weight"].dtype
        else:
            assert tensor is state[name]
    norms = spec.pre_norms + (init == "paper")
    assert len(added) == len(after.ttt_layers) * (3 + norms)


def test_copy_takes_gate_up_and_pre_norm_of_the_layers_own_mlp():
    spec = tiny_spec(LayerSpec(), LayerSpec())
    state = random_state(spec)
    _, new = converted(spec, state, layers=[0, 1])
    for layer in (0, 1):
        for part in ("gate", "up"):
            assert torch.equal(
                new[f"layers.{layer}.prime_mlp.{part}_proj.weight"], state[f"layers.{layer}.mlp.{part}_proj.weight"]
            )
        own, pre = (f"layers.{layer}.pre_{name}_layernorm.weight" for name in ("feedforward", "prime"))
        assert torch.equal(new[pre], state[own])
        # A copy, not a view: training one must not move the other.
        assert new[pre].data_ptr() != state[own].data_ptr()
        assert not new[f"layers.{layer}.prime_mlp.down_proj.weight"].any()


@settings(max_examples=30)
@given(plain_specs(), st.sampled_from(["copy", "random", "paper"]), st.integers(0, 10**6), st.randoms())
def test_the_start_is_a_function_of_the_seed_and_not_of_the_order(spec, init, seed, random):
    state = random_state(spec)
    after = with_prime(spec, TTTConfig(prime_init=init))
    first = prime_state(spec, after, state, init=init, seed=seed)
    names = list(state)
    random.shuffle(names)
    torch.rand(3)  # the global generator is nobody's business here
    second = prime_state(spec, after, {name: state[name] for name in names}, init=init, seed=seed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("init", ["random", "paper"])
def test_random_matrices_differ_between_tensors_and_seeds(init):
    spec = tiny_spec(LayerSpec(), LayerSpec())
    state = random_state(spec)
    drawn = []
    for seed in (0, 1):
        _, new = converted(spec, state, init=init, seed=seed, layers=[0, 1])
        drawn += [t.flatten() for name, t in new.items() if "prime_mlp" in name and t.any()]
    assert len(drawn) == 2 * 2 * (3 if init == "paper" else 2)
    assert len({tuple(t.tolist()) for t in drawn}) == len(drawn)


def test_the_width_is_free_where_nothing_is_copied():
    spec = tiny_spec(LayerSpec(), LayerSpec())
    state, tokens = random_state(spec), random_tokens(1, 9)
    after, new = converted(spec, state, init="random", prime_width=3)
    assert new["layers.1.prime_mlp.gate_proj.weight"].shape == (3, 8)
    with torch.no_grad():
        assert torch.equal(decoder_of(after, new)(tokens), decoder_of(spec, state)(tokens))


def test_copy_into_another_width_is_refused():
    spec = tiny_spec(LayerSpec(), LayerSpec())
    with pytest.raises(ValueError, match=r"prime_init copy needs the width .*set ttt\.prime_width to null"):
        converted(spec, random_state(spec), prime_width=3)


def of_depth(*windows):
    return tiny_spec(*(LayerSpec(window=w) for w in windows))


@pytest.mark.parametrize("depth, chosen", [(28, range(21, 28)), (26, range(19, 26)), (6, (4, 5)), (1, (0,))])
def test_last_quarter(depth, chosen):
    assert ttt_layers(of_depth(*[None] * depth), "last_quarter") == tuple(chosen)


def test_global_means_the_dense_layers_of_a_mixed_model():
    windows = [512, 512, 512, 512, 512, None] * 4 + [512, 512]
    assert ttt_layers(of_depth(*windows), "global") == (5, 11, 17, 23)


@pytest.mark.parametrize("windows", [(None, None), (4, 4)])
def test_global_is_an_error_where_it_chooses_nothing_or_everything(windows):
    with pytest.raises(ValueError, match=r"'global' needs a checkpoint with both dense and windowed layers"):
        ttt_layers(of_depth(*windows), "global")


def test_the_global_suffix_is_the_dense_layers_of_the_upper_half():
    windows = [512 if (i + 1) % 6 else None for i in range(26)]
    assert ttt_layers(of_depth(*windows), "global_suffix") == (17, 23)
    assert ttt_layers(of_depth(8, None, 8, None), "global_suffix") == (3,)
    with pytest.raises(ValueError, match=r"needs a dense layer in the upper half, got dense layers \[0\] of 4"):
        ttt_layers(of_depth(None, 8, 8, 8), "global_suffix")


def test_global_is_read_before_windows_are_narrowed():
    """Once every layer has a window the policy means nothing, so the order of conversions cannot be mixed up silently."""
    spec = of_depth(4, None)
    assert with_prime(spec, TTTConfig(layers="global")).ttt_layers == (1,)
    with pytest.raises(ValueError, match="global"):
        with_prime(windowed(spec, 16), TTTConfig(layers="global"))


def test_a_list_is_taken_as_it_is():
    assert ttt_layers(of_depth(*[None] * 5), [3, 1]) == (1, 3)


@pytest.mark.parametrize("wrong", [[], [5], [-1], [0, 7]])
def test_layers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected layer indices from 0 to 4"):
        ttt_layers(of_depth(*[None] * 5), wrong)


def test_a_layer_that_has_a_prime_mlp_already_is_refused():
    with pytest.raises(ValueError, match=r"layers \[1\] have a prime MLP already"):
        with_prime(tiny_spec(LayerSpec(), ttt_layer()), TTTConfig())


@given(plain_specs(), plain_specs())
def test_a_conversion_only_adds(before, after):
    old, new = before.parameter_shapes(), after.parameter_shapes()
    assume(any(new.get(name) != shape for name, shape in old.items()))
    with pytest.raises(ValueError, match="would drop or resize"):
        new_tensors(before, after)
