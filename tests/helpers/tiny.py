"""Tiny random models: a fixed one to vary, a strategy that varies everything, and their weights."""

import torch
from hypothesis import strategies as st

from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import LayerSpec, ModelSpec, PrimeSpec

VOCAB = 11


def ttt_layer(window=None, width=6, **changes):
    """A layer with a prime MLP as fast weights."""
    return LayerSpec(
        **{"window": window, "prime": PrimeSpec(intermediate_size=width), "fast": "prime", "rope_base": 100.0} | changes
    )


def tiny_spec(*layers, **changes):
    """Hidden 8, two heads over one key head; by default a dense layer below a windowed TTT layer."""
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "layers": layers or (LayerSpec(rope_base=100.0), ttt_layer(window=5)),
    }
    return ModelSpec(**defaults | changes)


def random_state(spec, *, seed=0, dtype=torch.float64):
    """Weights of which every one moves the loss: matrices and biases of size 0.4, norms scattered around the identity."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in spec.parameter_shapes().items():
        identity = 1.0 if "norm" in name and not spec.norm_unit_offset else 0.0
        state[name] = (identity + 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    return state


def decoder_of(spec, state):
    """A decoder that holds copies of these weights."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    decoder.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return decoder


def random_decoder(spec, *, seed=0, dtype=torch.float64):
    return decoder_of(spec, random_state(spec, seed=seed, dtype=dtype))


def random_tokens(batch, length, *, seed=0, vocab=VOCAB):
    """(batch, length) int64: different sequences."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


WINDOWS = st.one_of(st.none(), st.sampled_from([1, 2, 3, 5, 7, 8, 40]))
SINKS = st.sampled_from([0, 0, 1, 2, 4, 9])
BASES = st.sampled_from([10.0, 100.0, 10_000.0])


@st.composite
def layer_specs(draw, *, ttt):
    """One layer; ``ttt`` asks for fast weights."""
    fast = draw(st.sampled_from(["prime", "mlp"])) if ttt else None
    prime = None
    # A prime MLP that never learns inside, and fast ordinary MLPs beside a prime MLP, are legal too.
    if fast == "prime" or draw(st.booleans()):
        prime = PrimeSpec(intermediate_size=draw(st.sampled_from([3, 6])), post_norm=draw(st.booleans()))
    window = draw(WINDOWS)
    sinks = 0 if window is None else draw(SINKS)
    return LayerSpec(
        window=window,
        sink_tokens=sinks,
        sink_logit=draw(st.sampled_from([False, False, True])),
        rope_base=draw(BASES),
        prime=prime,
        fast=fast,
    )


@st.composite
def specs(draw, *, ttt=True, max_layers=3):
    """Any network the spec can describe at hidden size 8: every switch, layers that differ, TTT layers with gaps."""
    num_layers = draw(st.integers(1, max_layers))
    chosen = draw(st.sets(st.integers(0, num_layers - 1), min_size=1)) if ttt else set()
    pre_norms, post_norms = draw(st.booleans()), draw(st.booleans())
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]))
    return ModelSpec(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=draw(st.sampled_from([5, 6])),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        layers=tuple(draw(layer_specs(ttt=i in chosen)) for i in range(num_layers)),
        norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
        norm_unit_offset=draw(st.booleans()),
        pre_norms=pre_norms,
        post_norms=post_norms,
        qk_norm=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", "gelu_tanh"])),
        tied_head=draw(st.booleans()),
        # Without any norm larger embeddings saturate every softmax, and gradients are what rounding leaves of cancelling sums.
        embedding_scale=draw(st.sampled_from([1.0, 2.5])) if pre_norms or post_norms else 1.0,
        score_scale=draw(st.sampled_from([None, 0.3])),
    )
