"""Whole sequences with attention sinks equal ``attention_naive`` in value and gradient; a second derivative is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ttt_lit.ops.attention as ops
from ttt_lit.ops import sink_attention
from ttt_lit.ops.attention import attention
from ttt_lit.ops.attention_naive import attention_naive, visible

SCALE = 0.37
# float64; tiles sum in blocks.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# Half precision against float64: eight bits of bfloat16 in operands, weights and results, for results of size one.
HALF_CLOSE = {"rtol": 0.02, "atol": 0.02}


def qkv(batch, heads, kv_heads, length, head_dim, seed=0, dtype=torch.float64, device="cpu"):
    """Leaves (B, H, T, D) as a projection leaves them, (B, T, H, D) in memory."""
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for n in (heads, kv_heads, kv_heads):
        x = torch.randn((batch, length, n, head_dim), generator=generator, dtype=torch.float64)
        leaves.append(x.to(device, dtype).transpose(1, 2).requires_grad_())
    return leaves


def result_and_gradients(call, inputs, **settings):
    out = call(*inputs, scale=SCALE, **settings)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_equals_naive(inputs, close=CLOSE, **settings):
    expected = result_and_gradients(attention_naive, inputs, **settings)
    for ours, naive in zip(result_and_gradients(attention, inputs, **settings), expected, strict=True):
        torch.testing.assert_close(ours, naive, **close)


@st.composite
def problems(draw):
    """(inputs, window, sinks): grouped heads; windows and sinks below, at and above the length, more sinks than window."""
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (6, 2)]))
    shape = (draw(st.integers(1, 2)), heads, kv_heads, draw(st.integers(1, 13)), draw(st.sampled_from([2, 4])))
    return qkv(*shape, seed=draw(st.integers(0, 10**6))), draw(st.integers(1, 15)), draw(st.integers(0, 15))


@settings(max_examples=120)
@given(problem=problems(), tile=st.sampled_from([1, 2, 3, 1024]))
def test_outputs_and_gradients_equal_the_naive_twin(problem, tile):
    inputs, window, sinks = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sink_attention, "TILE", tile)
        assert_equals_naive(inputs, window=window, sink_tokens=sinks)


@pytest.mark.parametrize("length", [64, 65, 200])
@pytest.mark.parametrize("window, sinks", [(1, 1), (1, 100), (63, 4), (64, 64), (65, 134), (130, 69), (130, 70)])
def test_lengths_around_the_edges_of_the_windows_tile_and_of_full_sight(length, window, sinks):
    assert_equals_naive(qkv(1, 2, 1, length, 2), window=window, sink_tokens=sinks)


def test_visible_by_hand():
    """Six queries, window 2, two sinks: the window, the sinks outside of it, and nothing ahead."""
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert visible(6, 6, 2, sink_tokens=2).int().tolist() == expected


def test_sinks_change_what_a_window_alone_gives():
    inputs = qkv(1, 2, 1, 9, 4)
    alone = attention(*inputs, scale=SCALE, window=3)
    with_sinks = attention(*inputs, scale=SCALE, window=3, sink_tokens=2)
    torch.testing.assert_close(with_sinks[:, :, :3], alone[:, :, :3], **CLOSE)
    assert not torch.isclose(with_sinks[:, :, 3:], alone[:, :, 3:]).all(-1).any()


def test_sinks_and_window_that_cover_the_text_are_dense_bit_for_bit():
    inputs = qkv(2, 4, 2, 9, 4)
    dense = attention(*inputs, scale=SCALE, window=None)
    for window, sinks in ((5, 4), (1, 8), (1, 100), (9, 1)):
        assert torch.equal(attention(*inputs, scale=SCALE, window=window, sink_tokens=sinks), dense)


def test_scores_that_overflow_an_exponential_stay_finite():
    """Sinks that outweigh the window by e^2000, and the other way round."""
    for strong in (slice(0, 2), slice(2, None)):
        q, k, v = qkv(1, 1, 1, 8, 2)
        with torch.no_grad():
            q.fill_(1.0)
            k.zero_()
            k[:, :, strong] = 2000.0 / SCALE
        # Gradients of q are differences of keys as large as that.
        assert_equals_naive([q, k, v], close={"rtol": 1e-10, "atol": 1e-8}, window=2, sink_tokens=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_stays_near(dtype):
    inputs = qkv(1, 4, 2, 24, 8, dtype=dtype)
    found = result_and_gradients(attention, inputs, window=5, sink_tokens=3)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = result_and_gradients(attention_naive, wide, window=5, sink_tokens=3)
    assert {x.dtype for x in found} == {dtype}
    torch.testing.assert_close(found[0].double(), expected[0], **HALF_CLOSE)


def test_autocast_leaves_float32_operands_alone():
    inputs = qkv(1, 2, 1, 12, 4, dtype=torch.float32)
    far = {"window": 1, "sink_tokens": 8}
    expected = sink_part(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sink_part(inputs), expected)
        assert attention(*inputs, scale=SCALE, **far).dtype == torch.float32


def sink_part(inputs):
    """What is added to windows that saw almost nothing: zeros with a small log-sum-exp."""
    q, k, v = (x.detach() for x in inputs)
    output, lse = torch.zeros_like(q), torch.full(q.shape[:3], -50.0)
    with sink_attention.without_autocast("cpu"):
        sink_attention._add_sinks(output, lse, q, k[:, :, :4], v[:, :, :4], SCALE, 0)
    return output


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    inputs = qkv(1, 1, 1, 6, 2)
    out = attention(*inputs, scale=SCALE, window=2, sink_tokens=1)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), inputs[0], create_graph=True)


def test_the_kernels_that_ran_are_recorded(monkeypatch):
    monkeypatch.setattr(ops, "kernels_that_ran", set())
    inputs = qkv(1, 1, 1, 5, 2)
    attention(*inputs, scale=SCALE, window=3, sink_tokens=2)
    assert ops.kernels_that_ran == {"sdpa"}
    attention(*inputs, scale=SCALE, window=2, sink_tokens=2)
    assert ops.kernels_that_ran == {"sdpa", "tiled", "sinks"}


def test_flash_attn_is_not_asked_for_a_log_sum_exp_that_it_keeps_to_itself(monkeypatch):
    monkeypatch.setattr(ops, "_installed", {"flash_attn"}.__contains__)
    monkeypatch.setattr(ops, "_flash", lambda *_: pytest.fail("flash-attn was called"))
    monkeypatch.setattr(ops, "kernels_that_ran", set())
    assert_equals_naive(qkv(1, 2, 1, 7, 4), window=2, sink_tokens=1)
    assert ops.kernels_that_ran == {"tiled", "sinks"}


def test_compiled_without_a_break_it_computes_the_same():
    """Traced as for a GPU, without a code generator."""
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    inputs, far = qkv(1, 4, 2, 12, 4), {"window": 3, "sink_tokens": 2}
    expected = result_and_gradients(attention, inputs, **far)
    for traced, eager in zip(result_and_gradients(compiled, inputs, **far), expected, strict=True):
        torch.testing.assert_close(traced, eager, **CLOSE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_windows_kernel_is_ours_and_gradients_are_those_of_the_naive_twin(dtype):
    inputs = qkv(1, 4, 2, 300, 32, dtype=dtype, device="cuda")
    found = result_and_gradients(attention, inputs, window=70, sink_tokens=5)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = result_and_gradients(attention_naive, wide, window=70, sink_tokens=5)
    for ours, naive in zip(found, expected, strict=True):
        error = (ours.double() - naive).norm() / naive.norm()
        assert error < (1e-4 if dtype == torch.float32 else 2e-2)
