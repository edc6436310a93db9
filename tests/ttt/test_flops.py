"""FLOP counts: published figures, brute-force masks, work by hand, and what torch itself counts when the method runs."""

import contextlib
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import LayerSpec, ModelSpec, PrimeSpec, last_quarter
from ttt_lit.ops import tiled_attention
from ttt_lit.ops.cross_entropy import nll_adjoint
from ttt_lit.ops.distillation import _nll_and_kl_backward
from ttt_lit.train.teacher import Teacher
from ttt_lit.ttt.flops import (
    _ADJOINT,
    _LAST_SWEEP,
    _PLAIN_ADJOINT,
    _STEP_AGAIN,
    _SWEEP,
    average_keys,
    chunks_kept,
    forward_flops,
    key_count,
    product_numbers,
    training_flops,
)  # fmt: skip
from ttt_lit.ttt.scan import sequence_loss
from ttt_lit.ttt.settings import EngineConfig

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
    "spec, context, published",
    [
        (qwen(), SHORT, 11.38),
        (qwen(), LONG, 17.72),
        (qwen(window=SHORT), LONG, 12.96),
        (gemma(), SHORT, 6.33),
        (gemma(), LONG, 6.94),
    ],
)
def test_real_models_without_an_inner_loop(spec, context, published):
    """GFLOP per trained token, from an independent calculation with the published sizes that counts every part three times."""
    got = training_flops(spec, context=context, mode="none").total
    logits_again = 2 * spec.hidden_size * spec.vocab_size
    assert round((got - logits_again) / 1e9, 2) == published


def test_one_chunk_whose_products_are_kept_costs_what_static_costs():
    spec = small()
    one = training_flops(spec, context=12, mode="meta", chunk=12, kept_chunks=1)
    assert one.total == pytest.approx(training_flops(spec, context=12, mode="static").total)


def test_exact_gradients_by_hand():
    """Two chunks of 4; above the lowest TTT layer one more with window 6: pairs 1+2+3+4 in both chunks, 5+6+6+6 in the second with the
    carried keys. First chunk: sweep 4A + 2N, adjoint 10A + 6N; last chunk: 2A + 4A. A product is 2 · 24 over the heads."""
    ttt = LayerSpec(window=6, prime=PrimeSpec(intermediate_size=24), fast="prime")
    got = training_flops(small(layers=(LayerSpec(), ttt, ttt)), context=8, mode="meta", chunk=4)
    lowest, above = got.layers[1:]
    assert above.attention_scores == 48 * ((14 + 8) * 10 + 6 * 23) / 8
    assert above.attention_projections == 2 * 16 * (2 * 24 + 2 * 12) * (8 + 4) / 2
    assert above.mlp == 6 * 16 * 40 * (8 + 4) / 2
    assert above.prime == 6 * 16 * 24 * (11 + 4) / 2
    assert lowest.prime == 2 * 16 * 24 * ((7 + 4) + (7 + 4) + (11 + 4)) / 2
    assert lowest.mlp == 6 * 16 * 40 * (8 + 4) / 2
    assert lowest.attention_scores == 3 * 4 * 24 * (1 + 2 + 3 + 4 + 5 + 6 + 6 + 6) / 8
    assert lowest.attention_projections == 3 * 2 * 16 * (2 * 24 + 2 * 12)
    assert got.head == 2 * 16 * 50 * (8 + 4) / 2
    assert got.layers[0].prime == 0


def test_first_order_lies_between_static_and_exact():
    spec = small()
    totals = [
        training_flops(spec, context=16, mode=m, chunk=4).total for m in ("none", "static", "first_order", "meta")
    ]
    assert totals == sorted(set(totals))


def test_parts_add_up():
    count = training_flops(small(), context=16, mode="meta", chunk=4)
    assert sum(count.parts().values()) == pytest.approx(count.total)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50)), st.data())
def test_key_counts_equal_brute_force_masks(context, window, data):
    query, key = torch.arange(context)[:, None], torch.arange(context)[None, :]
    sinks = data.draw(st.integers(0, 50)) if window is not None else 0
    mask = (key <= query) & ((query - key < (window or context)) | (key < sinks))
    start = data.draw(st.integers(0, context))
    stop = data.draw(st.integers(start, context))
    assert key_count(start, stop, window, sinks) == int(mask[start:stop].sum())
    assert average_keys(context, window, sinks) == int(mask.sum()) / context


def test_sinks_are_counted_in_the_layers_that_have_them():
    """Window 3 over 8 tokens: 1+2+3·6 pairs; two sinks come back once for the query 3 and twice for the queries 4 to 7."""
    layers = (LayerSpec(window=3), LayerSpec(window=3, sink_tokens=2))
    without, with_sinks = training_flops(small(layers=layers), context=8, mode="none").layers
    assert (without.attention_scores, with_sinks.attention_scores) == (3 * 4 * 24 * 21 / 8, 3 * 4 * 24 * (21 + 9) / 8)
    assert dataclasses.replace(with_sinks, attention_scores=without.attention_scores) == without


def test_sinks_of_chunks_by_hand():
    """Window 3, five sinks, chunks of 4: the first five queries see everything, every later one the sinks and its window where they do
    not overlap. Inside the second chunk the first token is a sink, so all is seen; in the third there is none: 1+2+3+3."""
    layers = (LayerSpec(), ttt(), LayerSpec(window=3, sink_tokens=5))
    got = training_flops(small(layers=layers), context=12, mode="meta", chunk=4).layers[2]
    updating = [(1 + 2 + 3 + 4, 10), (5 + 6 + 7 + 8, 10)]
    work = sum(14 * visible + 8 * inside for visible, inside in updating) + 6 * (4 * 8)
    assert got.attention_scores == 48 * work / 12


@pytest.mark.parametrize("past", [7, 1])
@pytest.mark.parametrize("window, sinks", [(None, 0), (5, 0), (5, 2), (2, 3)])
def test_products_of_queries_and_keys_are_what_torch_counts_in_the_kernels(monkeypatch, window, sinks, past):
    """One query a tile: then no pair is masked. Scores that a backward makes again are subtracted; the count leaves them out."""
    monkeypatch.setattr(tiled_attention, "TILE", 1)
    heads, dim, new = 2, 4, 4
    reach = (1.0, window, sinks)
    q, tq, do, dto = (torch.randn(1, heads, new, dim) for _ in range(4))
    k, v = (torch.randn(1, 1, past + new, dim) for _ in range(2))
    tk, tv = (torch.randn(1, 1, new, dim) for _ in range(2))
    visible, inside = key_count(past, past + new, window, sinks), key_count(0, new, window, max(0, sinks - past))
    made = {}

    def count(name, function, *arguments):
        with FlopCounterMode(display=False) as counter:
            result = function(*arguments)
        made[name] = counter.get_total_flops() / (2 * dim * heads)
        return result

    o, lse = count("forward", tiled_attention.forward, q, k, v, *reach)
    known = (q, k, v, o, lse)
    count("inner", tiled_attention.backward, do, *known, *reach, new)
    count("outer", tiled_attention.backward, do, *known, *reach, past + new)
    to, mu = count("tangent", tiled_attention.jvp, *known, tq, tk, tv, *reach)
    count("dual", tiled_attention.dual_backward, do, dto, *known, to, mu, tq, tk, tv, *reach)
    again = {"forward": (0, 0), "inner": (1, 0), "outer": (1, 0), "tangent": (1, 0), "dual": (2, 1)}
    needed = {name: flops - again[name][0] * visible - again[name][1] * inside for name, flops in made.items()}
    sweep, last = needed["forward"] + needed["inner"], needed["forward"]
    for pairs, work in (
        (_SWEEP.pairs, sweep),
        (_LAST_SWEEP.pairs, last),
        (_STEP_AGAIN.pairs, needed["inner"]),
        (_ADJOINT.pairs, needed["tangent"] + needed["dual"]),
        (_PLAIN_ADJOINT.pairs, needed["outer"]),
    ):
        assert pairs.visible * visible + pairs.inside * inside == work


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


# Sums of integers below 2^53, divided once.
EXACT = 1e-12


def _logits(hidden, head):
    return 2 * math.prod(hidden) * head[0]


# Operators that torch does not know are opaque to its counter: attention stays uncounted, the loss is opened below.
LOSS = {
    torch.ops.ttt_lit.linear_nll: lambda hidden, head, *_, **__: _logits(hidden, head),
    torch.ops.ttt_lit.linear_nll_backward: lambda _, hidden, head, *__, **___: 3 * _logits(hidden, head),
    torch.ops.ttt_lit.nll_and_kl: lambda hidden, head, _, theirs, their_head, **__: (
        _logits(hidden, head) + _logits(theirs, their_head)
    ),
    torch.ops.ttt_lit.nll_and_kl_backward: lambda _, __, hidden, head, ___, theirs, their_head, *____, **_____: (
        3 * _logits(hidden, head) + _logits(theirs, their_head)
    ),
}


def test_a_divergences_backward_makes_the_logits_of_both_again():
    hidden, head, theirs, their_head = (torch.randn(shape) for shape in ((2, 3, 4), (5, 4), (2, 3, 6), (5, 6)))
    dnll, lse, targets = torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        _nll_and_kl_backward._init_fn(dnll, dnll, hidden, head, targets, theirs, their_head, lse, lse)
    assert counter.get_total_flops() == 3 * _logits(hidden.shape, head.shape) + _logits(theirs.shape, their_head.shape)


def test_the_losses_backward_makes_the_logits_again():
    hidden, head, targets = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        nll_adjoint(hidden, None, head, targets, torch.ones(2, 3), 0.0, torch.zeros(5, 4))
    assert counter.get_total_flops() == 3 * _logits(hidden.shape, head.shape)


def with_heads(*layers, **changes):
    return small(vocab_size=64, hidden_size=32, intermediate_size=48, num_heads=2, head_dim=4, layers=layers, **changes)


def ttt(**changes):
    return LayerSpec(**{"window": 6, "prime": PrimeSpec(intermediate_size=40), "fast": "prime"} | changes)


NETWORKS = {
    "two TTT layers": with_heads(LayerSpec(window=6), ttt(), ttt()),
    "a gap between TTT layers": with_heads(LayerSpec(window=6), ttt(), LayerSpec(window=6), ttt()),
    "a prime MLP that learns nothing inside": with_heads(ttt(fast=None), ttt(), ttt(fast=None)),
    "fast ordinary MLPs": with_heads(LayerSpec(window=6), LayerSpec(window=6, fast="mlp"), LayerSpec(window=6, fast="mlp")),
    "fast ordinary MLPs above prime MLPs": with_heads(ttt(fast="mlp"), ttt(fast="mlp")),
    "every norm and bias": with_heads(LayerSpec(window=6), ttt(), ttt(), post_norms=True, qk_norm=True, qkv_bias=True),
    "untied head": with_heads(LayerSpec(window=6), ttt(), tied_head=False),
}  # fmt: skip


def _products_that_torch_counts(spec, context, mode, chunk, engine, *, train=True, teacher=None):
    """Operations per token in matrix products outside of attention, over forward and backward of the real code."""
    decoder = Decoder(spec)
    decoder.initialise(generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(2 * (context + 1)).view(2, -1) % spec.vocab_size
    counter = FlopCounterMode(display=False, custom_mapping=LOSS)
    # Its module tracker hooks leaves, which torch forbids inside autograd.grad; the total needs no modules.
    counter.mod_tracker = _WholeProgram()
    with counter, torch.set_grad_enabled(train):
        arguments = {"mode": mode, "chunk": chunk, "inner_lr": 0.1, "clip": 1.0, "engine": engine}
        arguments |= {} if teacher is None else {"teacher": Teacher(Decoder(teacher))(tokens)}
        out = sequence_loss(decoder, tokens, **arguments)
        if train:
            (out.loss if teacher is None else out.loss + out.token_kl.mean()).backward()
    counted = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counted.items() if "scaled_dot" not in str(op)) / tokens[:, 1:].numel()


def _linear(count):
    return count.total - count.parts()["attention_scores"]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mode", ["meta", "first_order"])
@pytest.mark.parametrize("kept", [0, 5])
def test_linear_maps_are_what_torch_counts_when_the_method_runs(network, mode, kept):
    """Forward, inner gradients and outer backward of the real engine over five chunks, to the last operation."""
    spec, context, chunk = NETWORKS[network], 20, 4
    engine = EngineConfig(recompute_blocks=False, residual_gib=math.inf if kept else 0)
    counted = _products_that_torch_counts(spec, context, mode, chunk, engine)
    expected = training_flops(spec, context=context, mode=mode, chunk=chunk, kept_chunks=kept)
    assert counted == pytest.approx(_linear(expected), rel=EXACT)


@pytest.mark.parametrize("network", ["two TTT layers", "every norm and bias", "a prime MLP that learns nothing inside"])
@pytest.mark.parametrize("mode", ["none", "static", "meta"])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_read_whole_is_what_torch_counts(network, mode, recompute):
    spec = NETWORKS[network]
    counted = _products_that_torch_counts(spec, 12, mode, 4, EngineConfig(recompute_blocks=recompute))
    expected = training_flops(spec, context=12, mode=mode, chunk=4, recompute_blocks=recompute)
    assert counted == pytest.approx(_linear(expected), rel=EXACT)


@pytest.mark.parametrize("mode", ["none", "static"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_teacher_costs_what_torch_counts(mode, recompute):
    spec, teacher = NETWORKS["two TTT layers"], with_heads(LayerSpec(), LayerSpec(), LayerSpec())
    engine = EngineConfig(recompute_blocks=recompute)
    counted = _products_that_torch_counts(spec, 12, mode, 4, engine, teacher=teacher)
    expected = training_flops(spec, context=12, mode=mode, recompute_blocks=recompute, teacher=teacher)
    scores = forward_flops(teacher, context=12, mode="none").parts()["attention_scores"]
    assert counted == pytest.approx(_linear(expected) - scores, rel=EXACT)
    assert expected.parts()["teacher"] > 0
    assert expected.total == pytest.approx(sum(expected.parts().values()))
    with pytest.raises(ValueError, match="got a teacher with mode 'meta', expected none or static"):
        training_flops(spec, context=12, mode="meta", chunk=4, teacher=teacher)


@pytest.mark.parametrize("storage", ["every", "factors", "two_level", "offload"])
@pytest.mark.parametrize("chunks", [2, 4, 5, 7])
def test_every_way_to_keep_fast_weights_costs_what_torch_counts(storage, chunks):
    spec = NETWORKS["a gap between TTT layers"]
    engine = EngineConfig(recompute_blocks=False, fast_weights=storage)
    counted = _products_that_torch_counts(spec, 4 * chunks, "meta", 4, engine)
    expected = training_flops(spec, context=4 * chunks, mode="meta", chunk=4, fast_weights=storage)
    assert counted == pytest.approx(_linear(expected), rel=EXACT)


@pytest.mark.parametrize("budget, kept", [(0, 0), (1, 1), (2.5, 2), (4.99, 4), (5, 5), (100, 5), (math.inf, 5)])
def test_a_budget_keeps_whole_chunks(budget, kept):
    """``budget`` in products of a chunk: two sequences of 4 tokens in float32."""
    spec = NETWORKS["two TTT layers"]
    of_chunk = product_numbers(spec) * 8 * 4
    assert chunks_kept(spec, tokens=8, chunks=5, number_bytes=4, budget_bytes=budget * of_chunk) == kept
    engine = EngineConfig(recompute_blocks=False, residual_gib=budget * of_chunk / 2**30)
    counted = _products_that_torch_counts(spec, 20, "meta", 4, engine)
    expected = training_flops(spec, context=20, mode="meta", chunk=4, kept_chunks=kept)
    assert counted == pytest.approx(_linear(expected), rel=EXACT)


@pytest.mark.parametrize("mode", ["none", "static", "meta", "first_order"])
def test_an_evaluation_is_what_torch_counts(mode):
    spec = NETWORKS["a gap between TTT layers"]
    counted = _products_that_torch_counts(spec, 12, mode, 4, EngineConfig(), train=False)
    assert counted == pytest.approx(_linear(forward_flops(spec, context=12, mode=mode, chunk=4)), rel=EXACT)


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
