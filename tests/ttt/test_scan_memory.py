"""Memory of the scan: with recomputation no chunk's graph outlives its forward, and evaluation keeps nothing."""

import gc

import pytest
import torch
from helpers.compare import scan
from helpers.memory import LiveBytes
from helpers.tiny import random_decoder, random_tokens, tiny_spec, ttt_layer

from ttt_lit.model.spec import LayerSpec

CHUNK, WINDOW, BATCH, WIDTH = 8, 8, 2, 16
FLOAT32 = 4


@pytest.fixture
def decoder():
    """Activations outweigh the fast weights, as they do at real sizes: 8 tokens of 2 sequences against matrices of 16 × 8."""
    spec = tiny_spec(
        LayerSpec(window=WINDOW), ttt_layer(window=WINDOW, width=WIDTH), ttt_layer(window=WINDOW, width=WIDTH),
        intermediate_size=64, vocab_size=200,
    )  # fmt: skip
    return random_decoder(spec, dtype=torch.float32)


def alive_after_forward(decoder, chunks, *, recompute, **arguments):
    """Bytes that the losses keep alive, and the peak over forward and backward."""
    tokens = random_tokens(BATCH, chunks * CHUNK + 1, vocab=200)
    decoder.zero_grad()
    gc.collect()
    with LiveBytes(*decoder.parameters(), tokens) as live:
        out = scan(decoder, tokens, chunk=CHUNK, recompute=recompute, **arguments)
        kept = live.now()
        if out.loss.requires_grad:
            out.loss.backward()
    return kept, live.peak


def per_chunk(decoder, **arguments):
    """Growth of both numbers for one chunk more."""
    few, many = (alive_after_forward(decoder, chunks, **arguments) for chunks in (2, 4))
    return [(b - a) / 2 for a, b in zip(few, many, strict=True)]


def test_counting_is_repeatable(decoder):
    first, second = (alive_after_forward(decoder, 2, recompute=True) for _ in range(2))
    assert first == second


def test_recomputing_keeps_per_chunk_the_fast_weights_and_the_carried_keys(decoder):
    spec = decoder.spec
    fast = len(spec.ttt_layers) * 3 * WIDTH * spec.hidden_size
    carried = len(spec.ttt_layers) * 2 * (WINDOW - 1 + CHUNK) * spec.head_dim  # a slice keeps its whole chunk alive
    tokens = CHUNK * (2 * spec.hidden_size + 2 * spec.head_dim + 8)  # prefix in and out, rope tables, ids and losses
    floor, allowed = BATCH * fast * FLOAT32, BATCH * (fast + carried + tokens) * FLOAT32
    kept, _ = per_chunk(decoder, recompute=True)
    assert floor <= kept <= allowed


def test_keeping_every_graph_costs_several_times_as_much(decoder):
    """Growth per chunk of what forward keeps and of the peak, which includes one chunk's rebuilt graph in both terms alike."""
    kept, peak = per_chunk(decoder, recompute=True)
    graphs, graphs_peak = per_chunk(decoder, recompute=False)
    assert graphs > 6 * kept
    assert graphs_peak > 4 * peak


@pytest.mark.parametrize("mode", ["meta", "first_order", "static", "none"])
def test_evaluation_keeps_the_losses_alone(decoder, mode):
    with torch.no_grad():
        kept, _ = alive_after_forward(decoder, 4, recompute=True, mode=mode)
    assert kept <= BATCH * 4 * CHUNK * FLOAT32 + 4 * BATCH * FLOAT32


def test_the_peak_of_evaluation_grows_by_no_fast_weights(decoder):
    """Every update replaces the fast weights; only tokens' own activations (prefix, rope, losses) grow with the context."""
    with torch.no_grad():
        _, peak = per_chunk(decoder, recompute=True, mode="meta")
    assert peak < BATCH * len(decoder.spec.ttt_layers) * 3 * WIDTH * decoder.spec.hidden_size * FLOAT32
