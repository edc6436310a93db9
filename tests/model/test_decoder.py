"""The network is what its spec says, and is causal."""

import dataclasses

import pytest
import torch
from helpers.tiny import VOCAB, layer_specs, random_decoder, random_state, random_tokens, specs, tiny_spec, ttt_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.model.decoder import Decoder
from ttt_lit.model.rope import rope_tables, rotate
from ttt_lit.model.spec import LayerSpec
from ttt_lit.ttt.naive import sequence_nll_naive

# float64: the same sums over keys, cut in another place.
ROUNDING = 1e-11


@settings(max_examples=60)
@given(specs(ttt=False) | specs())
def test_parameters_are_those_of_the_spec_in_its_order(spec):
    with torch.device("meta"):
        decoder = Decoder(spec)
    shapes = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    assert list(shapes.items()) == list(spec.parameter_shapes().items())
    assert list(decoder.state_dict()) == list(shapes)
    assert sum(p.numel() for p in decoder.parameters()) == spec.num_parameters()


@settings(max_examples=40)
@given(specs(), st.integers(0, 9), st.integers(1, VOCAB - 1), st.integers(0, 10**6))
def test_a_token_moves_no_logit_before_it(spec, changed, shift, seed):
    decoder, tokens = random_decoder(spec, seed=seed), random_tokens(2, 10, seed=seed)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + shift) % VOCAB
    with torch.no_grad():
        before, after = decoder(tokens), decoder(other)
    assert torch.equal(before[:, :changed], after[:, :changed])


def test_a_window_hides_what_is_further_than_layers_times_window():
    """Two layers of window 3 reach 4 tokens back, and no token more."""
    decoder, tokens = random_decoder(tiny_spec(*2 * [LayerSpec(window=3)])), random_tokens(1, 10)
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % VOCAB
    with torch.no_grad():
        moved = (decoder(tokens) != decoder(other)).any(dim=-1)[0]
    assert moved.tolist() == [True] * 5 + [False] * 5


@settings(max_examples=30)
@given(specs(), st.integers(0, 10**6))
def test_logits_give_the_naive_losses(spec, seed):
    state, tokens = random_state(spec, seed=seed), random_tokens(1, 9, seed=seed)
    with torch.no_grad():
        logits = random_decoder(spec, seed=seed)(tokens[:, :-1])[0]
    losses = -torch.log_softmax(logits, -1)[torch.arange(8), tokens[0, 1:]]
    naive = sequence_nll_naive(state, spec, tokens[0], mode="static", chunk=8, inner_lr=0.0, clip=0.0)
    torch.testing.assert_close(losses, naive, rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(specs(ttt=False), st.data())
def test_windows_and_bases_may_change_in_place_without_touching_a_tensor(spec, data):
    decoder = random_decoder(spec)
    pointers = {name: p.data_ptr() for name, p in decoder.named_parameters()}
    drawn = [data.draw(layer_specs(ttt=False)) for _ in spec.layers]
    changed = spec.with_layers(
        tuple(
            dataclasses.replace(new, prime=old.prime, sink_logit=old.sink_logit)
            for new, old in zip(drawn, spec.layers, strict=True)
        )
    )
    decoder.set_spec(changed)
    assert {name: p.data_ptr() for name, p in decoder.named_parameters()} == pointers
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(decoder(tokens), random_decoder(changed)(tokens))


@pytest.mark.parametrize(
    "other",
    [
        tiny_spec(LayerSpec(), LayerSpec()),
        tiny_spec(LayerSpec(), ttt_layer(width=5)),
        tiny_spec(tied_head=False),
        tiny_spec(LayerSpec(), ttt_layer(), LayerSpec()),
    ],
)
def test_a_spec_with_other_parameters_is_refused_and_changes_nothing(other):
    spec = tiny_spec()
    decoder = random_decoder(spec)
    with pytest.raises(ValueError, match="set_spec: the parameters would change"):
        decoder.set_spec(other)
    assert decoder.spec == spec


@given(st.integers(0, 500), st.integers(0, 40), st.sampled_from([10.0, 10_000.0, 1_000_000.0]))
def test_scores_after_rotation_depend_on_differences_of_positions(shift, distance, base):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    cos, sin = rope_tables(base, 8, 600, device=torch.device("cpu"), dtype=torch.float64)

    def score(query, key):
        at = (rotate(x, cos[p : p + 1], sin[p : p + 1]) for x, p in ((q, query), (k, key)))
        return (next(at) * next(at)).sum()

    torch.testing.assert_close(score(distance + shift, shift), score(distance, 0), rtol=1e-10, atol=1e-10)


def test_rotation_pairs_the_two_halves():
    """At position 1 with base b, coordinates (i, i + D/2) turn by b^(-2i/D)."""
    cos, sin = rope_tables(100.0, 4, 2, device=torch.device("cpu"), dtype=torch.float64)
    turned = rotate(torch.tensor([[[[1.0, 0.0, 0.0, 2.0]]]], dtype=torch.float64), cos[1:], sin[1:])[0, 0, 0]
    angle = torch.tensor([1.0, 0.1], dtype=torch.float64)
    expected = torch.stack([angle[0].cos(), -2 * angle[1].sin(), angle[0].sin(), 2 * angle[1].cos()])
    torch.testing.assert_close(turned, expected)


def test_tables_are_exact_at_far_positions_in_half_precision_too():
    cos, _ = rope_tables(10_000.0, 4, 100_001, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert cos.dtype == torch.float32
    assert cos[100_000, 0].item() == pytest.approx(torch.tensor(1e5, dtype=torch.float64).cos().item(), abs=1e-7)


def test_a_model_from_nothing_is_a_function_of_the_generator_and_starts_at_the_identity():
    spec = tiny_spec(norm_unit_offset=True, qkv_bias=True, qk_norm=True, tied_head=False)
    states = []
    for seed in (1, 1, 2):
        decoder = Decoder(spec)
        decoder.initialise(0.02, torch.Generator().manual_seed(seed))
        states.append(decoder.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    for name, tensor in states[0].items():
        if "norm" in name or "bias" in name:
            assert not tensor.any(), name
        else:
            assert 0.01 < tensor.std() < 0.04, name
            assert not torch.equal(tensor, states[2][name]), name
