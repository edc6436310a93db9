"""Loss by position: exact sums, exact buckets."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.train.position import PositionLoss, bucket_means, position_buckets

ALL_LOSSES = torch.arange(12.0).view(3, 4)


def test_curve_mean_and_bits_per_byte_are_those_of_all_blocks_together():
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(6, 16, generator=generator, dtype=torch.float64)
    metric = PositionLoss(16)
    metric.update(nll[:4], 100)
    metric.update(nll[4:], torch.tensor([30, 20]))
    result = metric.compute()
    torch.testing.assert_close(result.curve, nll.mean(0), rtol=0, atol=1e-15)
    assert result.nats_per_token == pytest.approx(float(nll.mean()), rel=1e-14)
    assert result.bits_per_byte == pytest.approx(float(nll.sum()) / math.log(2) / 150, rel=1e-14)
    assert (result.blocks, result.tokens, result.num_bytes) == (6, 96, 150)


def test_sums_are_float64_even_for_bf16_losses_and_after_a_cast_of_the_module():
    metric = PositionLoss(2).to(torch.bfloat16).half()
    for _ in range(1000):
        metric.update(torch.full((1, 2), 3.015625, dtype=torch.bfloat16), 1)
    assert metric.compute().nats_per_token == 3.015625


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_reset_starts_anew_and_an_empty_metric_is_an_error():
    metric = PositionLoss(4)
    metric.update(torch.ones(1, 4), 4)
    metric.reset()
    with pytest.raises(ValueError, match="at least one block"):
        metric.compute()


def test_another_context_is_refused():
    with pytest.raises(ValueError, match=r"got losses of shape \(2, 8\), expected \(batch, 4\)"):
        PositionLoss(4).update(torch.ones(2, 8), 1)


def _measure_on_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metric = PositionLoss(4)
    rows = ALL_LOSSES[:1] if rank == 0 else ALL_LOSSES[1:]
    metric.update(rows, 3 if rank == 0 else 6)
    torch.save(tuple(metric.compute()), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.ranks
def test_two_ranks_with_unequal_shares_report_what_one_process_reports(tmp_path):
    torch.multiprocessing.spawn(_measure_on_rank, args=(str(tmp_path),), nprocs=2)
    whole = PositionLoss(4)
    whole.update(ALL_LOSSES, 9)
    curve, *numbers = whole.compute()
    for rank in (0, 1):
        rank_curve, *rank_numbers = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.equal(rank_curve, curve)
        assert rank_numbers == numbers


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
