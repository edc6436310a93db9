"""Batches: which blocks, in which order, for which rank, from which position."""

import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.tokens import all_tokens, indices, request
from hypothesis import given, settings
from hypothesis import strategies as st

import ttt_lit.data.shards as shards_module
from ttt_lit.data.shards import SHARDS_PER_GROUP, ShuffledOrder, first_blocks
from ttt_lit.data.stream import TokenDataModule

# On one core torch finds any number of workers excessive.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def test_the_order_is_that_of_seed_and_stage(module, packed):
    reference = indices(module.open(request(stage=1)))
    assert indices(TokenDataModule(short=str(packed), seed=5).open(request(stage=1))) == reference
    assert indices(module.open(request(stage=2))) != reference
    assert indices(TokenDataModule(short=str(packed), seed=6).open(request(stage=1))) != reference


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3 * SHARDS_PER_GROUP).filter(lambda sizes: sum(sizes) > 0),
    seed=st.integers(0, 2**40),
)
def test_every_pass_is_a_permutation_with_few_shards_at_a_time(sizes, seed):
    order = ShuffledOrder(np.cumsum([0, *sizes]), seed=seed, stage=3)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    passes = [[order(n * sum(sizes) + within) for within in range(sum(sizes))] for n in range(2)]
    assert passes[0] != passes[1] or sum(sizes) < 20
    for blocks in passes:
        assert sorted(blocks) == list(range(sum(sizes)))
        # Once a group is left, its shards do not come back: groups hold at most SHARDS_PER_GROUP shards.
        spans = [[i for i, block in enumerate(blocks) if shard_of[block] == s] for s in range(len(sizes)) if sizes[s]]
        open_at = [sum(span[0] <= i <= span[-1] for span in spans) for i in range(len(blocks))]
        assert max(open_at) <= SHARDS_PER_GROUP
    assert [pickle.loads(pickle.dumps(order))(i) for i in range(5)] == [order(i) for i in range(5)]


@settings(deadline=None, max_examples=100)
@given(tokens=st.lists(st.integers(1, 30), min_size=1, max_size=10), block_tokens=st.integers(1, 40))
def test_blocks_belong_to_the_shard_of_their_first_token(tokens, block_tokens):
    starts = np.cumsum([0, *tokens])
    firsts = first_blocks(starts, block_tokens)
    for block in range(sum(tokens) // block_tokens):
        shard = int(np.searchsorted(starts, block * block_tokens, side="right")) - 1
        assert firsts[shard] <= block < firsts[shard + 1]
    assert firsts[-1] == sum(tokens) // block_tokens


@pytest.mark.parametrize("start", [0, 7])
def test_ranks_share_a_global_batch_as_one_process_reads_it(module, start):
    alone = list(module.open(request(batch_size=4, start_batch=start)))
    two = [list(module.open(request(batch_size=2, start_batch=start), rank, 2)) for rank in (0, 1)]
    assert len(alone) == len(two[0]) == 30 - start
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in alone[0].items()} == {
        "tokens": ((4, 17), torch.int64),
        "index": ((4,), torch.int64),
        "source": ((4,), torch.int64),
    }
    for whole, *parts in zip(alone, *two, strict=True):
        assert all(torch.equal(whole[name], torch.cat([part[name] for part in parts])) for name in whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_is_the_rest_keeps_its_length_and_moves_no_random_state(packed, num_workers):
    state = torch.get_rng_state()
    whole = indices(TokenDataModule(short=str(packed)).open(request()))
    for start in (1, 13, 30):
        stream = TokenDataModule(short=str(packed), num_workers=num_workers).open(request(start_batch=start))
        assert len(stream) == 30
        assert indices(stream) == indices(stream) == whole[start:]
    assert torch.equal(torch.get_rng_state(), state)


def test_iterating_does_nothing_before_the_first_batch_is_asked_for(module):
    asked = []
    stream = module.open(request(num_batches=None, should_stop=lambda: asked.append(1)))
    first, second = iter(stream), iter(stream)
    assert not asked
    assert torch.equal(next(first)["index"], next(second)["index"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unsized_stream_asks_at_window_starts_when_the_batch_is_wanted(packed, num_workers):
    trained = []
    asked = []

    def should_stop():
        asked.append(len(trained))
        return len(trained) >= 5

    module = TokenDataModule(short=str(packed), num_workers=num_workers)
    stream = module.open(request(num_batches=None, start_batch=3, accumulate=3, should_stop=should_stop))
    with pytest.raises(TypeError):
        len(stream)
    for batch in stream:
        trained.append(batch["index"].tolist())
    # Numbers 3 … 8 of the stage: asked before 3, 6 and 9; five were not yet trained at 6.
    assert asked == [0, 3, 6]
    assert trained == indices(TokenDataModule(short=str(packed)).open(request()))[3:9]


def test_a_sized_stream_may_be_stopped_too(module):
    stops = iter([False, True])
    assert len(indices(module.open(request(accumulate=2, should_stop=lambda: next(stops))))) == 2


def test_validation_is_in_order_once_spread_over_the_split_and_its_limit_is_stated(module):
    blocks = module.manifest("short").validation.blocks
    whole = blocks // 4
    for wanted in (1, whole // 2, whole):
        served = list(itertools.chain(*indices(module.open(request(split="validation", num_batches=wanted)))))
        assert served == sorted(set(served))
        assert len(served) == wanted * 4
        # Evenly: no gap is more than one block wider than another, up to the end of the split.
        gaps = {after - before for before, after in zip(served, [*served[1:], blocks], strict=True)}
        assert max(gaps) - min(gaps) <= 1
    with pytest.raises(ValueError, match=rf"there are {blocks} blocks of 17 tokens: at most {whole} batches"):
        module.open(request(split="validation", num_batches=whole + 1))


def test_a_per_document_folder_serves_its_own_block_size_only(module):
    assert len(indices(module.open(request(dataset="long", block_tokens=65)))) == 30
    with pytest.raises(ValueError, match="got 17, but the folder is per_document with blocks of 65"):
        module.open(request(dataset="long"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_batches": None}, "num_batches"),
        ({"num_batches": None, "split": "validation", "should_stop": bool}, "num_batches"),
        ({"num_batches": 3, "start_batch": 4}, "num_batches: got 3, expected at least 4"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_a_bad_request_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        request(**changes)


def test_unknown_names_and_too_large_blocks_are_errors(module, packed):
    with pytest.raises(ValueError, match="data.long"):
        TokenDataModule(short=str(packed)).open(request(dataset="long"))
    with pytest.raises(ValueError, match="'test'"):
        module.open(request(split="test"))
    with pytest.raises(ValueError, match="holds no block of 10000000 tokens"):
        module.open(request(block_tokens=10_000_000))


def test_unigram_entropy_equals_counting(module, packed, monkeypatch):
    monkeypatch.setattr(shards_module, "_PIECE", 97)  # several pieces, the last one short
    tokens = all_tokens(packed, "validation").tolist()
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    expected = -sum(share * math.log(share) for share in shares)
    assert math.isclose(module.unigram_entropy("short"), expected, rel_tol=1e-12)
