"""Memory of the scan: no chunk's graph outlives its turn, logits never exist whole, and evaluation keeps nothing."""

import gc
import math

import pytest
import torch
from helpers.compare import scan
from helpers.memory import LiveBytes
from helpers.tiny import random_decoder, random_tokens, tiny_spec, ttt_layer

from ttt_lit.model.spec import LayerSpec
from ttt_lit.ops import cross_entropy, logit_tiles
from ttt_lit.ttt.settings import KEEP_ALL, EngineConfig

CHUNK, WINDOW, BATCH, WIDTH, HIDDEN, HEADS, HEAD_DIM, PREFIX = 16, 32, 1, 96, 32, 2, 16, 3
FLOAT32 = 4
RECOMPUTE = EngineConfig()
FAST = 2 * 3 * WIDTH * HIDDEN * BATCH * FLOAT32
"""One copy of the fast weights, in bytes."""
HIDDEN_STATES = (PREFIX + 2) * CHUNK * HIDDEN * BATCH * FLOAT32
"""Of one chunk: the stream before each block that is read once, and before and after the lowest TTT layer's attention."""
CARRIED = 2 * CHUNK * HEADS * HEAD_DIM * BATCH * FLOAT32
"""Keys and values of one chunk in the one suffix layer whose attention belongs to the suffix."""


@pytest.fixture
def decoder():
    """The proportions of a real model: fast weights outweigh a chunk's hidden states, and the vocabulary is wide."""
    layers = [LayerSpec(window=WINDOW)] * PREFIX + [ttt_layer(window=WINDOW, width=WIDTH)] * 2
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_heads": HEADS, "num_kv_heads": HEADS}
    return random_decoder(tiny_spec(*layers, **sizes, head_dim=HEAD_DIM, vocab_size=200), dtype=torch.float32)


def alive(decoder, chunks, *, engine=RECOMPUTE, **arguments):
    """Bytes that the losses keep alive, and the peak over forward and backward."""
    tokens = random_tokens(BATCH, chunks * CHUNK + 1, vocab=200)
    decoder.zero_grad()
    gc.collect()
    with LiveBytes(*decoder.parameters(), tokens) as live:
        out = scan(decoder, tokens, chunk=CHUNK, engine=engine, **arguments)
        kept = live.now()
        if out.loss.requires_grad:
            out.loss.backward()
    return kept, live.peak


def per_chunk(decoder, *, few=4, many=8, **arguments):
    """Growth of both numbers for one chunk more."""
    first, second = (alive(decoder, chunks, **arguments) for chunks in (few, many))
    return [(b - a) / (many - few) for a, b in zip(first, second, strict=True)]


def test_counting_is_repeatable(decoder):
    assert alive(decoder, 2) == alive(decoder, 2)


@pytest.mark.slow
def test_the_peak_grows_per_chunk_by_the_fast_weights_and_what_the_chunk_hands_on(decoder):
    """From 4 to 64 chunks, every chunk recomputed. The rest is tables of the rotary embedding, ids, losses and sums of cotangents."""
    _, peak = per_chunk(decoder, few=4, many=64)
    assert FAST < peak <= 1.3 * (FAST + HIDDEN_STATES + CARRIED)


def test_the_peak_is_affine_in_the_number_of_chunks(decoder):
    """So a few chunks tell the rest."""
    _, early = per_chunk(decoder, few=4, many=6)
    _, late = per_chunk(decoder, few=10, many=12)
    assert late == pytest.approx(early, rel=0.01)


def test_keeping_the_products_of_every_chunk_costs_twice_as_much_and_more(decoder):
    kept, peak = per_chunk(decoder)
    all_kept, all_peak = per_chunk(decoder, engine=KEEP_ALL)
    assert all_kept > 2 * kept
    assert all_peak > 2 * peak


def test_a_budget_for_residuals_is_used_and_not_exceeded(decoder):
    chunks = 8
    base, _ = alive(decoder, chunks)
    everything, _ = alive(decoder, chunks, engine=EngineConfig(residual_gib=math.inf))
    residuals = everything - base
    for share in (0.3, 0.6, 0.9):
        budget = share * residuals
        kept, _ = alive(decoder, chunks, engine=EngineConfig(residual_gib=budget / 2**30))
        assert budget - residuals / chunks < kept - base <= budget


def test_policies_for_the_fast_weights_keep_what_they_promise(decoder):
    every, *others = (
        per_chunk(decoder, engine=EngineConfig(fast_weights=policy), few=4, many=16)[0]
        for policy in ("every", "factors", "two_level")
    )
    factors, two_level = others
    chunk_sized = (2 * HIDDEN + 3 * WIDTH) * CHUNK * 2 * BATCH * FLOAT32
    assert factors - (every - FAST) == pytest.approx(chunk_sized, rel=0.15)
    # Copies at chunks 0, 4, 8 and 12 of 16, against 0 and 2 of 4; the first one is no copy.
    assert two_level - (every - FAST) == pytest.approx(2 / 12 * FAST, rel=0.15)


def test_logits_never_exist_for_more_than_a_tile_of_a_chunk(decoder, monkeypatch):
    """Forward, inner gradient and adjoint; a tile of 4 tokens × 50 of the vocabulary's 200 columns against chunks of 16."""
    monkeypatch.setattr(logit_tiles, "tile_shape", lambda vocab_size, device: (4, 50))
    tiles = set()
    scores = cross_entropy.scores_of
    monkeypatch.setattr(cross_entropy, "scores_of", lambda x, y: tiles.add((x.shape[0], y.shape[0])) or scores(x, y))
    for mode in ("meta", "static"):
        alive(decoder, 3, mode=mode)
    assert tiles == {(4, 50)}


@pytest.mark.parametrize("mode", ["meta", "first_order", "static", "none"])
def test_evaluation_keeps_the_losses_alone(decoder, mode):
    with torch.no_grad():
        kept, _ = alive(decoder, 4, mode=mode)
    assert kept <= BATCH * 4 * CHUNK * FLOAT32 + 4 * BATCH * FLOAT32


def test_the_peak_of_evaluation_grows_by_no_fast_weights(decoder):
    """Every update replaces the fast weights; only tokens' own activations (prefix, rope, losses) grow with the context."""
    with torch.no_grad():
        _, peak = per_chunk(decoder, mode="meta")
    assert peak < FAST
