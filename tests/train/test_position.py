"""Loss by position: exact sums, exact buckets."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.metrics import position_buckets
from ttt_lit.train.position import PositionLoss, block_ids, bucket_means, deciles

ALL_LOSSES = torch.arange(12.0).view(3, 4)
NUM_BYTES = torch.tensor([3, 2, 4])
IDS = torch.tensor([2**48 - 1, 5, 2**47 + 3])


def test_curve_mean_and_bits_per_byte_are_those_of_all_blocks_together():
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(6, 16, generator=generator, dtype=torch.float64)
    metric = PositionLoss(16)
    metric.update(nll[:4], torch.full((4,), 25), torch.arange(4), torch.arange(4))
    metric.update(nll[4:], torch.tensor([30, 20]), torch.arange(4, 6), torch.arange(2))
    result = metric.compute()
    torch.testing.assert_close(result.curve, nll.mean(0), rtol=0, atol=1e-15)
    assert result.nats_per_token == pytest.approx(float(nll.mean()), rel=1e-14)
    assert result.bits_per_byte == pytest.approx(float(nll.sum()) / math.log(2) / 150, rel=1e-14)
    assert (result.blocks, result.tokens, result.num_bytes) == (6, 96, 150)


def test_sums_are_float64_even_for_bf16_losses_and_after_a_cast_of_the_module():
    metric = PositionLoss(2).to(torch.bfloat16).half()
    for _ in range(1000):
        metric.update(
            torch.full((1, 2), 3.015625, dtype=torch.bfloat16), torch.tensor([1]), torch.tensor([7]), torch.tensor([0])
        )
    assert metric.compute().nats_per_token == 3.015625


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_reset_starts_anew_and_an_empty_metric_is_an_error():
    metric = PositionLoss(4)
    metric.update(torch.ones(1, 4), torch.tensor([4]), torch.tensor([7]), torch.tensor([0]))
    metric.reset()
    with pytest.raises(ValueError, match="at least one block"):
        metric.compute()


def test_another_context_is_refused():
    with pytest.raises(ValueError, match=r"got losses of shape \(2, 8\), expected \(batch, 4\)"):
        PositionLoss(4).update(torch.ones(2, 8), torch.ones(2), torch.arange(2), torch.arange(2))


def _measure_on_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metric = PositionLoss(4)
    mine = slice(2, 3) if rank == 0 else slice(0, 2)
    metric.update(ALL_LOSSES[mine], NUM_BYTES[mine], IDS[mine], IDS[mine] % 7)
    *result, documents = metric.compute()
    torch.save((*result, [dataclasses.astuple(block) for block in documents]), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.ranks
def test_two_ranks_with_unequal_shares_report_what_one_process_reports(tmp_path):
    torch.multiprocessing.spawn(_measure_on_rank, args=(str(tmp_path),), nprocs=2)
    whole = PositionLoss(4)
    whole.update(ALL_LOSSES, NUM_BYTES, IDS, IDS % 7)
    curve, *numbers, documents = whole.compute()
    for rank in (0, 1):
        rank_curve, *rank_numbers, rank_documents = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.equal(rank_curve, curve)
        assert rank_numbers == numbers
        assert rank_documents == [dataclasses.astuple(block) for block in documents]


def test_every_block_is_reported_apart_and_sorted_by_its_id():
    nll = torch.arange(40.0).view(2, 20)
    metric = PositionLoss(20, short=5)
    metric.update(nll, torch.tensor([30, 20]), torch.tensor([9, 4]), torch.tensor([1, 2]))
    second, first = metric.compute().documents[::-1]
    assert (first.source, second.source) == (2, 1)
    assert (first.id, first.bytes, first.nats_per_token, first.short) == ("000000000004", 20, 29.5, 22.0)
    assert (second.id, second.bytes, second.nats_per_token, second.short) == ("000000000009", 30, 9.5, 2.0)
    assert second.deciles == [2 * tenth + 0.5 for tenth in range(10)]


def test_a_blocks_id_is_that_of_its_tokens_alone():
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 2, 3]])
    ids = block_ids(tokens)
    assert ids[0] == ids[2] != ids[1]
    assert torch.equal(block_ids(tokens[1:2].int()), ids[1:2])
    assert int(ids.max()) < 2**48


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 70_000))
def test_deciles_are_equal_tenths(context):
    tenths = deciles(context)
    assert len(tenths) == 10
    assert all(0 <= start < stop <= context for start, stop in tenths)
    if context >= 10:
        assert [start for start, _ in tenths[1:]] == [stop for _, stop in tenths[:-1]]
        assert max(b - a for a, b in tenths) - min(b - a for a, b in tenths) <= 1


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 70_000))
def test_buckets_cover_every_position_once(context):
    buckets = position_buckets(context)
    assert buckets[0][0] == 0
    assert buckets[-1][1] == context
    assert all(start < stop for start, stop in buckets)
    assert all(left[1] == right[0] for left, right in zip(buckets, buckets[1:], strict=False))
    assert len(buckets) <= 16
    assert len(buckets) >= 8 or context < 16


@pytest.mark.parametrize("context", [256, 1024, 8192, 32768])
def test_a_window_of_a_quarter_of_the_context_ends_a_bucket(context):
    stops = {stop for _, stop in position_buckets(context)}
    assert {context // 4, context // 2, context} <= stops


def test_bucket_means_average_positions():
    assert bucket_means(torch.tensor([1.0, 2.0, 4.0, 8.0]), [(0, 1), (1, 4)]) == [1.0, pytest.approx(14 / 3)]
