"""Whole sequences equal ``attention_naive`` on every kernel, and the table of kernels keeps fused ones away from second order."""

import itertools
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ttt_lit.ops.attention as ops
from ttt_lit.ops.attention import attention, choose_carried_kernel, choose_kernel
from ttt_lit.ops.attention_naive import attention_naive, visible

SCALE = 0.37
# float64; tiles and fused kernels sum in blocks.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# Half precision against float64: eight bits of bfloat16 in operands, weights and results, for results of size one.
HALF_CLOSE = {"rtol": 0.02, "atol": 0.02}


def qkv(batch, heads, kv_heads, length, head_dim, seed=0, dtype=torch.float64, transposed=False):
    """Leaves (B, H, T, D); ``transposed`` lays them out as a projection leaves them, (B, T, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for n in (heads, kv_heads, kv_heads):
        shape = (batch, length, n, head_dim)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        leaves.append((x if transposed else x.contiguous()).requires_grad_())
    return leaves


def result_and_gradients(call, inputs, window, sinks=0):
    out = call(*inputs, scale=SCALE, window=window, sink_tokens=sinks)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_equals_naive(inputs, window, sinks=0, close=CLOSE):
    expected = result_and_gradients(attention_naive, inputs, window, sinks)
    for ours, naive in zip(result_and_gradients(attention, inputs, window, sinks), expected, strict=True):
        torch.testing.assert_close(ours, naive, **close)


@st.composite
def problems(draw):
    """(inputs, window, sinks): grouped heads, both layouts, windows and sinks below, at and above the length."""
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (6, 2)]))
    shape = (draw(st.integers(1, 2)), heads, kv_heads, draw(st.integers(1, 13)), draw(st.sampled_from([2, 4])))
    inputs = qkv(*shape, seed=draw(st.integers(0, 10**6)), transposed=draw(st.booleans()))
    return inputs, draw(st.one_of(st.none(), st.integers(1, 15))), draw(st.sampled_from([0, 0, 1, 2, 4, 15]))


@settings(max_examples=120)
@given(problem=problems())
def test_outputs_and_gradients_equal_the_naive_twin(problem):
    assert_equals_naive(*problem)


@pytest.mark.parametrize("length", [63, 64, 65, 130])
@pytest.mark.parametrize("window", [1, 2, 62, 63, 64, 65, 66, 129, None])
def test_windows_and_lengths_around_the_edges_of_the_real_tile(length, window):
    assert_equals_naive(qkv(1, 2, 1, length, 2), window)


@pytest.mark.parametrize("length", [64, 65, 200])
@pytest.mark.parametrize("window, sinks", [(1, 1), (1, 100), (63, 4), (64, 64), (65, 134), (130, 69), (130, 70)])
def test_sinks_around_the_edges_of_the_real_tile_and_of_full_sight(length, window, sinks):
    assert_equals_naive(qkv(1, 2, 1, length, 2), window, sinks)


def test_a_window_as_wide_as_the_text_is_dense_bit_for_bit():
    q, k, v = qkv(2, 4, 2, 9, 4)
    dense = attention(q, k, v, scale=SCALE, window=None)
    for window in (9, 10, 10**9):
        assert torch.equal(attention(q, k, v, scale=SCALE, window=window), dense)


def test_sinks_and_window_that_cover_the_text_are_dense_bit_for_bit():
    q, k, v = qkv(2, 4, 2, 9, 4)
    dense = attention(q, k, v, scale=SCALE, window=None)
    for window, sinks in ((5, 4), (1, 8), (1, 100), (9, 1)):
        assert torch.equal(attention(q, k, v, scale=SCALE, window=window, sink_tokens=sinks), dense)


def test_sinks_change_what_a_window_alone_gives_from_the_first_query_that_has_left_one_behind():
    inputs = qkv(1, 2, 1, 9, 4)
    alone, with_sinks = (attention(*inputs, scale=SCALE, window=3, sink_tokens=sinks) for sinks in (0, 2))
    torch.testing.assert_close(with_sinks[:, :, :3], alone[:, :, :3], **CLOSE)
    assert not torch.isclose(with_sinks[:, :, 3:], alone[:, :, 3:]).all(-1).any()


def test_scores_that_overflow_an_exponential_stay_finite():
    """Sinks that outweigh the window by e^2000, and the other way round."""
    for strong in (slice(0, 2), slice(2, None)):
        q, k, v = qkv(1, 1, 1, 8, 2)
        with torch.no_grad():
            q.fill_(1.0)
            k.zero_()
            k[:, :, strong] = 2000.0 / SCALE
        # Gradients of q are differences of keys as large as that.
        assert_equals_naive([q, k, v], 2, 2, close={"rtol": 1e-10, "atol": 1e-8})


def test_window_one_sees_only_itself():
    q, k, v = qkv(1, 2, 1, 5, 4)
    torch.testing.assert_close(attention(q, k, v, scale=SCALE, window=1), v.expand(1, 2, 5, 4), **CLOSE)


def test_visible_by_hand():
    """Three queries at the end of five keys, window 2: each sees its own key and the one before."""
    expected = [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert visible(3, 5, 2).int().tolist() == expected
    assert visible(2, 3, None).int().tolist() == [[1, 1, 0], [1, 1, 1]]


def test_visible_sinks_by_hand():
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


@pytest.mark.parametrize("window, sinks", [(None, 0), (4, 0), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_stays_near(dtype, window, sinks):
    inputs = qkv(1, 4, 2, 9, 8, dtype=dtype)
    out, *gradients = result_and_gradients(attention, inputs, window, sinks)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected, *_ = result_and_gradients(attention_naive, wide, window, sinks)
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    torch.testing.assert_close(out.double(), expected, **HALF_CLOSE)


def flash_attn_by_its_documentation(q, k, v, softmax_scale, causal, window_size):
    """(B, T, H, D); key j is seen from query i when i - left <= j <= i + right, where -1 is no limit, and j <= i."""
    left, right = window_size
    assert causal
    assert right in (-1, 0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    window = None if left == -1 else left + 1
    return attention_naive(q, k, v, scale=softmax_scale, window=window).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
def test_flash_attn_is_asked_for_the_same_layout_and_window(monkeypatch, window):
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_by_its_documentation
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(ops, "choose_kernel", lambda **_: "flash")
    monkeypatch.setattr(ops, "kernels_that_ran", set())
    assert_equals_naive(qkv(2, 4, 2, 7, 4), window)
    assert ops.kernels_that_ran == {"flash"}


def test_flash_attn_which_has_no_sinks_is_not_asked_for_them(monkeypatch):
    monkeypatch.setattr(ops, "_installed", {"flash_attn"}.__contains__)
    monkeypatch.setattr(ops, "_flash", lambda *_: pytest.fail("flash-attn was called"))
    monkeypatch.setattr(ops, "kernels_that_ran", set())
    assert_equals_naive(qkv(1, 2, 1, 7, 4), 2, 1)
    assert ops.kernels_that_ran == {"tiled"}


def test_compiled_without_a_break_sinks_are_the_same():
    """Traced as for a GPU, without a code generator."""
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    inputs = qkv(1, 4, 2, 12, 4)
    expected = result_and_gradients(attention, inputs, 3, 2)
    for traced, eager in zip(result_and_gradients(compiled, inputs, 3, 2), expected, strict=True):
        torch.testing.assert_close(traced, eager, **CLOSE)


HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
HEAD_DIMS = (4, 15, 16, 64, 96, 128, 256, 257, 320)
WINDOWS = (None, 1, 8192)
PACKAGES = (set(), {"triton"}, {"flash_attn"}, {"flash_attn", "triton"})


@pytest.fixture(params=PACKAGES, ids=lambda p: "+".join(sorted(p)) or "nothing")
def installed(request, monkeypatch):
    monkeypatch.setattr(ops, "_installed", request.param.__contains__)
    return request.param


def every_choice(device, second_order):
    """(kernel, dtype, head_dim, window) for all that can be asked."""
    for dtype, head_dim, window in itertools.product(DTYPES, HEAD_DIMS, WINDOWS):
        tensors = {"device": torch.device(device), "dtype": dtype, "head_dim": head_dim}
        yield choose_kernel(**tensors, window=window, second_order=second_order), dtype, head_dim, window


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_second_order_never_picks_flash_or_sdpa(installed, device):
    assert {kernel for kernel, *_ in every_choice(device, second_order=True)} <= {"tiled", "triton"}


def test_second_order_is_triton_on_cuda_for_what_its_tiles_hold_and_tiled_for_the_rest(installed):
    for kernel, dtype, head_dim, _ in every_choice("cuda", second_order=True):
        largest = {torch.float64: 0, torch.float32: 128}.get(dtype, 256)
        fits = "triton" in installed and 16 <= head_dim <= largest
        assert kernel == ("triton" if fits else "tiled")


def test_flash_is_first_order_half_precision_on_cuda_and_nothing_else(installed):
    for kernel, dtype, head_dim, _ in every_choice("cuda", second_order=False):
        assert (kernel == "flash") == ("flash_attn" in installed and dtype in HALF and head_dim <= 256)


def test_without_flash_dense_layers_are_sdpa_and_windows_as_in_second_order(installed):
    second = {choice[1:]: choice[0] for choice in every_choice("cuda", second_order=True)}
    for kernel, *tensors in every_choice("cuda", second_order=False):
        if kernel != "flash":
            assert kernel == ("sdpa" if tensors[-1] is None else second[tuple(tensors)])


def test_on_the_cpu_first_order_is_sdpa_where_dense_and_all_else_is_tiled(installed):
    for kernel, _, _, window in every_choice("cpu", second_order=False):
        assert kernel == ("sdpa" if window is None else "tiled")
    assert {kernel for kernel, *_ in every_choice("cpu", second_order=True)} == {"tiled"}


def test_the_kernel_that_ran_is_the_one_that_is_recorded(monkeypatch):
    called, fused, own = [], torch.nn.functional.scaled_dot_product_attention, ops.attend
    monkeypatch.setattr(ops, "kernels_that_ran", set())
    monkeypatch.setattr(ops.F, "scaled_dot_product_attention", lambda *a, **k: called.append("sdpa") or fused(*a, **k))
    monkeypatch.setattr(ops, "attend", lambda *a, **k: called.append(k["kernel"]) or own(*a, **k))
    inputs = qkv(1, 1, 1, 3, 2)
    attention(*inputs, scale=SCALE, window=3)
    assert called == ["sdpa"]
    assert ops.kernels_that_ran == {"sdpa"}
    attention(*inputs, scale=SCALE, window=2)
    assert called == ["sdpa", "tiled"]
    assert ops.kernels_that_ran == {"sdpa", "tiled"}


@pytest.mark.parametrize("window", [None, 2])
def test_a_chunk_with_carried_keys_records_the_kernel_that_it_is_given(monkeypatch, window):
    monkeypatch.setattr(ops, "kernels_that_ran", set())
    tensors = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 64}
    assert choose_carried_kernel(**tensors, window=window) == "tiled"
    assert ops.kernels_that_ran == {"tiled"}
