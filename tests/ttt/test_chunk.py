"""The chunk's program is the network: in pieces as in one go; and its tangents are its derivative."""

import pytest
import torch
from helpers.tiny import layer_specs, random_decoder, random_tokens, specs, tiny_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.model.mlp import MLPWeights
from ttt_lit.model.spec import LayerSpec
from ttt_lit.ttt.chunk import KeyValues, LayerInput, layer_kind, mlp_weights, run_layer
from ttt_lit.ttt.dual import Dual, FastMLP

# float64: the same sums over keys, cut in another place.
ROUNDING = 1e-11


def layer_of(decoder, index, *, with_attention=True):
    """(kind, weights, start of the fast weights for two sequences) of a layer read as part of a suffix."""
    spec = decoder.spec
    kind = layer_kind(spec, index, device=torch.device("cpu"), dtype=torch.float64)._replace(
        with_attention=with_attention
    )
    weights = {name: p.detach() for name, p in decoder.block(index).named_parameters()}
    fast = None
    if kind.fast is not None:
        chosen = mlp_weights(weights, "prime_mlp" if kind.fast == "prime" else "mlp")
        fast = FastMLP(MLPWeights(*(w.expand(2, -1, -1) for w in chosen)))
    return kind, weights, fast


def read_in_pieces(decoder, tokens, sizes):
    """Logits from pieces of the text, layer by layer, each layer carrying its keys and values to the next piece."""
    x = decoder.embed(tokens)
    tables = decoder.rope(tokens.shape[1], x)
    past = [None] * decoder.spec.num_layers
    outputs, low = [], 0
    for size in sizes:
        span = slice(low, low + size)
        y = Dual(x[:, span])
        for i, layer in enumerate(decoder.spec.layers):
            kind, weights, fast = layer_of(decoder, i)
            result = run_layer(kind, weights, y, LayerInput(tuple(t[span] for t in tables[i]), past[i], fast=fast))
            new = result.attention.new
            joined = (
                new if past[i] is None else KeyValues(*(torch.cat(t, dim=2) for t in zip(past[i], new, strict=True)))
            )
            length = joined.keys.shape[2]
            near = 0 if layer.window is None else length - layer.window + 1
            kept = [j for j in range(length) if j >= near or j < layer.sink_tokens]
            past[i] = KeyValues(*(t[:, :, kept] for t in joined)) if kept else None
            y = result.x
        outputs.append(y.value)
        low += size
    return decoder.norm(torch.cat(outputs, dim=1)) @ decoder.head_weight.T


@settings(max_examples=50)
@given(specs(), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 10**6))
def test_pieces_with_carried_keys_equal_the_whole(spec, sizes, seed):
    """Windows below a piece, above the text, odd, and of one token, with and without sinks (specs draws them all); any pieces."""
    decoder, tokens = random_decoder(spec, seed=seed), random_tokens(2, sum(sizes), seed=seed)
    with torch.no_grad():
        torch.testing.assert_close(
            read_in_pieces(decoder, tokens, sizes), decoder(tokens), rtol=ROUNDING, atol=ROUNDING
        )


@pytest.mark.parametrize(
    "window, sinks", [(w, 0) for w in (1, 2, 3, 5, 8, 11, 12, 13, 99, None)] + [(1, 1), (3, 2), (2, 7)]
)
@pytest.mark.parametrize("piece", [1, 4, 6])
def test_pieces_equal_the_whole_at_every_edge_of_the_window(window, sinks, piece):
    layers = 2 * [LayerSpec(window=window, sink_tokens=sinks)]
    decoder, tokens = random_decoder(tiny_spec(*layers)), random_tokens(2, 12)
    with torch.no_grad():
        got = read_in_pieces(decoder, tokens, [piece] * (12 // piece))
        torch.testing.assert_close(got, decoder(tokens), rtol=ROUNDING, atol=ROUNDING)


def random_like(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    return type(tensors)(*(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors))


@st.composite
def layers(draw):
    """A model of one TTT layer, with every switch of the network."""
    layer = draw(layer_specs(ttt=True))
    spec = draw(specs(ttt=False, max_layers=1))
    return spec.with_layers((layer,))


@settings(max_examples=60)
@given(layers(), st.booleans(), st.sampled_from([0, 2, 5]), st.integers(0, 10**6))
def test_tangents_are_the_derivative_along_the_direction(spec, with_attention, carried, seed):
    """Against central differences of the layer without tangents, along a direction of the fast weights and of the input."""
    decoder = random_decoder(spec, seed=seed)
    kind, weights, fast = layer_of(decoder, 0, with_attention=with_attention)
    x = random_like(Dual(torch.empty(2, 3, 8, dtype=torch.float64), torch.empty(2, 3, 8, dtype=torch.float64)), seed)
    tables = tuple(t[carried : carried + 3] for t in decoder.rope(carried + 3, x.value)[0])
    shape = torch.empty(2, spec.num_kv_heads, carried, spec.head_dim, dtype=torch.float64)
    past = random_like(KeyValues(shape, shape), seed + 1) if carried else None
    direction = random_like(MLPWeights(*fast.weights), seed + 2)

    def at(step):
        moved = MLPWeights(*(w + step * d for w, d in zip(fast.weights, direction, strict=True)))
        given_ = LayerInput(tables, past, fast=FastMLP(moved))
        return run_layer(kind, weights, Dual(x.value + step * x.tangent), given_)

    with torch.no_grad():
        plain = at(0.0)
        known = None if plain.attention is None else plain.attention.attended
        dual = run_layer(kind, weights, x, LayerInput(tables, past, known, FastMLP(fast.weights, direction)))
        step = 1e-5
        slope = (at(step).x.value - at(-step).x.value) / (2 * step)
    torch.testing.assert_close(dual.x.value, plain.x.value, rtol=1e-12, atol=1e-12)
    # Central differences: truncation of the order of step², rounding of 1e-16 / step.
    torch.testing.assert_close(dual.x.tangent, slope, rtol=2e-5, atol=1e-6 * float(1 + slope.abs().max()))


def test_a_layer_whose_input_stands_still_has_tangents_from_its_fast_weights_alone():
    decoder = random_decoder(tiny_spec(LayerSpec(fast="mlp")))
    kind, weights, fast = layer_of(decoder, 0, with_attention=False)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    nothing = LayerInput(decoder.rope(3, x)[0], fast=FastMLP(fast.weights))
    assert run_layer(kind, weights, Dual(x), nothing).x.tangent is None
    direction = MLPWeights(*(torch.ones_like(w) for w in fast.weights))
    moved = run_layer(kind, weights, Dual(x), nothing._replace(fast=FastMLP(fast.weights, direction)))
    assert moved.x.tangent.abs().max() > 0
