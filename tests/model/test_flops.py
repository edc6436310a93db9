"""FLOP counts: published figures, brute-force masks, and what torch itself counts."""

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ttt_lit.model.decoder import Decoder
from ttt_lit.model.flops import average_keys, forward_flops, key_count, training_flops
from ttt_lit.model.spec import LayerSpec, ModelSpec, PrimeSpec, last_quarter
from ttt_lit.ttt.scan import sequence_loss

SHORT, LONG, CHUNK = 8192, 32768, 1024


def qwen(window=None, prime=None):
    """Qwen2.5-1.5B, with a prime MLP of the given width in the last quarter."""
    ttt = last_quarter(28) if prime else ()
    layers = tuple(
        LayerSpec(
            window=window,
            prime=PrimeSpec(intermediate_size=prime) if i in ttt else None,
            fast="prime" if i in ttt else None,
        )
        for i in range(28)
    )
    return ModelSpec(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        layers=layers,
    )


def gemma():
    """Gemma-3-1B: 22 local layers (window 512) and 4 global ones."""
    return ModelSpec(
        vocab_size=262_144,
        hidden_size=1152,
        intermediate_size=6912,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        layers=tuple(LayerSpec(window=None if i % 6 == 5 else 512) for i in range(26)),
    )


def small(**changes):
    layers = (
        LayerSpec(window=6),
        LayerSpec(),
        LayerSpec(window=4, prime=PrimeSpec(intermediate_size=24), fast="prime"),
    )
    defaults = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 40, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6,
        "layers": layers,
    }  # fmt: skip
    return ModelSpec(**(defaults | changes))


@pytest.mark.parametrize(
    "spec, context, plain, recomputed",
    [
        (qwen(), SHORT, 11.38, 14.70),
        (qwen(), LONG, 17.72, 23.16),
        (qwen(window=SHORT), LONG, 12.96, 16.81),
        (gemma(), SHORT, 6.33, 7.84),
        (gemma(), LONG, 6.94, 8.65),
    ],
)
def test_real_models_without_an_inner_loop(spec, context, plain, recomputed):
    """GFLOP per trained token, from an independent calculation with the published sizes."""
    got = training_flops(spec, context=context, mode="none")
    again = training_flops(spec, context=context, mode="none", recompute=True)
    assert (round(got.total / 1e9, 2), round(again.total / 1e9, 2)) == (plain, recomputed)


def _without_skipping_the_last_update(spec, context):
    """Training cost if the last chunk were updated too: extrapolate from the chunks that are."""
    suffix = range(spec.suffix_start, spec.num_layers)
    forward = forward_flops(spec, context=context, mode="static")
    factor = {"attention_projections": 6, "mlp": 6, "prime": 9, "attention_scores": 9}
    prefix = 3 * sum(layer.total for layer in forward.layers[: spec.suffix_start])
    inner = sum(factor[name] * getattr(forward.layers[index], name) for index in suffix for name in factor)
    return prefix + inner + 6 * forward.head


@pytest.mark.parametrize(
    "prime, context, published", [(8960, SHORT, 21.00), (8960, LONG, 23.38), (2240, SHORT, 17.10), (2240, LONG, 19.48)]
)
def test_real_models_with_exact_inner_gradients(prime, context, published):
    """The published figure updates every chunk; ours skips the last update, which saves less than 1 / chunks of it."""
    spec = qwen(window=SHORT, prime=prime)
    every_chunk = _without_skipping_the_last_update(spec, context)
    assert round(every_chunk / 1e9, 2) == published
    got = training_flops(spec, context=context, mode="meta", chunk=CHUNK).total
    assert every_chunk * (1 - CHUNK / context) < got < every_chunk


def test_one_chunk_needs_no_update_and_costs_what_static_costs():
    spec = small()
    one = training_flops(spec, context=12, mode="meta", chunk=12)
    assert one.total == pytest.approx(training_flops(spec, context=12, mode="static").total)


def test_exact_gradients_by_hand():
    """Two chunks of 4; the suffix is the last layer alone: window 4, so its keys are 1+2+3+4 and then 4 each."""
    spec = small()
    got = training_flops(spec, context=8, mode="meta", chunk=4)
    suffix = got.layers[2]
    assert suffix.attention_scores == 4 * 24 * (9 * 10 + 3 * 16) / 8
    assert suffix.prime == 6 * 16 * 24 * (9 * 4 + 3 * 4) / 8
    assert suffix.mlp == 6 * 16 * 40 * (6 * 4 + 3 * 4) / 8
    assert suffix.attention_projections == 2 * 16 * (2 * 24 + 2 * 12) * 4.5
    assert got.head == 2 * 16 * 50 * 4.5
    assert got.layers[0].attention_scores == 3 * 4 * 24 * (1 + 2 + 3 + 4 + 5 + 6 + 6 + 6) / 8
    assert got.layers[0].prime == 0


def test_first_order_lies_between_static_and_exact():
    spec = small()
    totals = [
        training_flops(spec, context=16, mode=m, chunk=4).total for m in ("none", "static", "first_order", "meta")
    ]
    assert totals == sorted(set(totals))


def test_recompute_adds_one_forward_pass_with_its_inner_gradient():
    spec = small()
    for mode in ("meta", "first_order"):
        plain = training_flops(spec, context=16, mode=mode, chunk=4)
        again = training_flops(spec, context=16, mode=mode, chunk=4, recompute=True)
        evaluation = forward_flops(spec, context=16, mode=mode, chunk=4)
        assert again.total - plain.total == pytest.approx(evaluation.total)


def test_fast_ordinary_mlps_are_charged_as_fast():
    layers = (LayerSpec(), LayerSpec(fast="mlp"))
    got = training_flops(small(layers=layers), context=8, mode="meta", chunk=4)
    assert got.layers[1].mlp == 6 * 16 * 40 * 6
    assert got.layers[0].mlp == 6 * 16 * 40 * 3


def test_parts_add_up():
    count = training_flops(small(), context=16, mode="meta", chunk=4)
    assert sum(count.parts().values()) == pytest.approx(count.total)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50)), st.data())
def test_key_counts_equal_brute_force_masks(context, window, data):
    query, key = torch.arange(context)[:, None], torch.arange(context)[None, :]
    mask = (key <= query) & (query - key < (window or context))
    start = data.draw(st.integers(0, context))
    stop = data.draw(st.integers(start, context))
    assert key_count(start, stop, window) == int(mask[start:stop].sum())
    assert average_keys(context, window) == int(mask.sum()) / context


def _counted(spec, context, mode):
    model = Decoder(spec)
    tokens = torch.zeros(2, context, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, use_prime=mode != "none")
    return {str(op).removeprefix("aten."): flops for op, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("tied, mode", [(True, "none"), (False, "static")])
def test_linear_maps_equal_what_torch_counts_in_the_decoder(tied, mode):
    """Attention is compared through the masks above: kernels compute masked scores too, or are not counted at all."""
    spec = small(tied_head=tied, qkv_bias=True)
    context = 12
    counted = _counted(spec, context, mode)
    linear = sum(flops for name, flops in counted.items() if name in ("mm", "addmm"))
    parts = forward_flops(spec, context=context, mode=mode).parts()
    assert linear == 2 * context * sum(parts[name] for name in ("attention_projections", "mlp", "prime", "head"))
    assert (parts["prime"] > 0) == (mode == "static")


# The count knows no boundary effects: the lowest TTT layer needs no inner gradient of its input, the embedding no outer
# one, and recomputation stops at the last tensor that is needed. In a network of six layers these are a few percent.
BOUNDARY_EFFECTS = 0.10


@pytest.mark.parametrize(
    "mode, recompute", [("none", False), ("static", True), ("first_order", False), ("meta", False), ("meta", True)]
)
def test_training_work_is_what_torch_counts_when_the_method_runs(mode, recompute):
    """Forward, inner gradients and outer backward of the real code; tiny heads, because torch miscounts attention."""
    layers = tuple(
        LayerSpec(window=4, prime=PrimeSpec(intermediate_size=256), fast="prime") if i >= 4 else LayerSpec(window=4)
        for i in range(6)
    )
    spec = small(vocab_size=512, hidden_size=128, intermediate_size=256, num_heads=2, head_dim=4, layers=layers)
    batch, context, chunk = 2, 12, 4
    decoder = Decoder(spec)
    decoder.initialise(generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(batch * (context + 1)).view(batch, -1)
    counter = FlopCounterMode(display=False)
    # Its module tracker hooks leaves, which torch forbids inside autograd.grad; the total needs no modules.
    counter.mod_tracker = _WholeProgram()
    with counter:
        arguments = {"mode": mode, "chunk": chunk, "inner_lr": 0.1, "clip": 1.0, "recompute": recompute}
        sequence_loss(decoder, tokens, **arguments).loss.backward()
    expected = training_flops(spec, context=context, mode=mode, chunk=chunk, recompute=recompute).total
    assert counter.get_total_flops() / (batch * context) == pytest.approx(expected, rel=BOUNDARY_EFFECTS)


class _WholeProgram(contextlib.nullcontext):
    """Stands for torch's module tracker: everything belongs to the program as a whole."""

    parents = frozenset({"Global"})


def test_misuse_is_an_error():
    plain = dataclasses.replace(small(), layers=(LayerSpec(),))
    with pytest.raises(ValueError, match="expected one of"):
        training_flops(plain, context=8, mode="off")
    with pytest.raises(ValueError, match="has none"):
        training_flops(plain, context=8, mode="meta", chunk=4)
    with pytest.raises(ValueError, match="got chunk 3 for context 8"):
        training_flops(small(), context=8, mode="meta", chunk=3)
    with pytest.raises(ValueError, match="got chunk None"):
        training_flops(small(), context=8, mode="meta")
