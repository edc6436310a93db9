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


def result_and_gradients(call, inputs, window):
    out = call(*inputs, scale=SCALE, window=window)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_equals_naive(inputs, window):
    expected = result_and_gradients(attention_naive, inputs, window)
    for ours, naive in zip(result_and_gradients(attention, inputs, window), expected, strict=True):
        torch.testing.assert_close(ours, naive, **CLOSE)


@st.composite
def problems(draw):
    """(inputs, window): grouped heads, both layouts, windows below, at and above the length."""
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (6, 2)]))
    shape = (draw(st.integers(1, 2)), heads, kv_heads, draw(st.integers(1, 13)), draw(st.sampled_from([2, 4])))
    inputs = qkv(*shape, seed=draw(st.integers(0, 10**6)), transposed=draw(st.booleans()))
    return inputs, draw(st.one_of(st.none(), st.integers(1, 15)))


@settings(max_examples=80)
@given(problem=problems())
def test_outputs_and_gradients_equal_the_naive_twin(problem):
    assert_equals_naive(*problem)


@pytest.mark.parametrize("length", [63, 64, 65, 130])
@pytest.mark.parametrize("window", [1, 2, 62, 63, 64, 65, 66, 129, None])
def test_windows_and_lengths_around_the_edges_of_the_real_tile(length, window):
    assert_equals_naive(qkv(1, 2, 1, length, 2), window)


def test_a_window_as_wide_as_the_text_is_dense_bit_for_bit():
    q, k, v = qkv(2, 4, 2, 9, 4)
    dense = attention(q, k, v, scale=SCALE, window=None)
    for window in (9, 10, 10**9):
        assert torch.equal(attention(q, k, v, scale=SCALE, window=window), dense)


def test_window_one_sees_only_itself():
    q, k, v = qkv(1, 2, 1, 5, 4)
    torch.testing.assert_close(attention(q, k, v, scale=SCALE, window=1), v.expand(1, 2, 5, 4), **CLOSE)


def test_visible_by_hand():
    """Three queries at the end of five keys, window 2: each sees its own key and the one before."""
    expected = [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert visible(3, 5, 2).int().tolist() == expected
    assert visible(2, 3, None).int().tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_stays_near(dtype, window):
    inputs = qkv(1, 4, 2, 9, 8, dtype=dtype)
    out, *gradients = result_and_gradients(attention, inputs, window)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected, *_ = result_and_gradients(attention_naive, wide, window)
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
