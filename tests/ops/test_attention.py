"""Every kernel computes what ``attention_naive`` specifies, and second order never meets a fused kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ttt_lit.ops.attention as ops
from ttt_lit.ops.attention import _KERNELS, attention, choose_kernel
from ttt_lit.ops.attention_naive import attention_naive, visible

SCALE = 0.37
# float64; fused kernels sum in blocks.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
KERNELS = ["math", "sdpa"]


def qkv(batch, heads, kv_heads, queries, keys, head_dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, queries, head_dim)] + 2 * [(batch, kv_heads, keys, head_dim)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def result_and_gradients(call, inputs):
    out = call(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_equals_naive(kernel, inputs, window):
    expected = result_and_gradients(lambda q, k, v: attention_naive(q, k, v, scale=SCALE, window=window), inputs)
    twice = kernel == "math"
    got = result_and_gradients(lambda q, k, v: attention(q, k, v, scale=SCALE, window=window, twice=twice), inputs)
    for ours, naive in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, naive, **CLOSE)


@st.composite
def problems(draw):
    """(inputs, window): fewer queries than keys, grouped heads, windows below, at and above either."""
    keys = draw(st.integers(1, 13))
    queries = draw(st.integers(1, keys))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (6, 2)]))
    window = draw(st.one_of(st.none(), st.integers(1, 15)))
    shape = (draw(st.integers(1, 2)), heads, kv_heads, queries, keys, draw(st.sampled_from([2, 4])))
    return qkv(*shape, seed=draw(st.integers(0, 10**6))), window


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=80)
@given(problem=problems())
def test_outputs_and_gradients_equal_the_naive_twin(kernel, problem):
    assert_equals_naive(kernel, *problem)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("queries, keys", [(7, 7), (3, 9), (1, 6), (5, 6)])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 6, 7, 9, 100, None])
def test_windows_around_every_edge(kernel, queries, keys, window):
    assert_equals_naive(kernel, qkv(2, 4, 2, queries, keys, 4), window)


@pytest.mark.parametrize("tile", [1, 2, 3, 7])
@pytest.mark.parametrize("queries, keys, window", [(13, 13, 5), (13, 13, 1), (9, 13, None), (7, 13, 40), (6, 6, 6)])
def test_tiles_of_queries_change_nothing(monkeypatch, tile, queries, keys, window):
    inputs = qkv(1, 2, 1, queries, keys, 4)
    monkeypatch.setattr(ops, "_TILE", tile)
    assert_equals_naive("sdpa", inputs, window)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("queries, keys", [(4, 4), (2, 5), (1, 3)])
def test_math_is_right_in_double_backward(queries, keys, window):
    inputs = qkv(1, 2, 1, queries, keys, 2)
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: attention(q, k, v, scale=SCALE, window=window, twice=True), inputs
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_window_as_wide_as_the_text_is_dense_bit_for_bit(kernel):
    q, k, v = qkv(2, 4, 2, 6, 9, 4)
    dense = attention(q, k, v, scale=SCALE, window=None, twice=kernel == "math")
    for window in (9, 10, 10**9):
        assert torch.equal(attention(q, k, v, scale=SCALE, window=window, twice=kernel == "math"), dense)


@pytest.mark.parametrize("kernel", KERNELS)
def test_window_one_sees_only_itself(kernel):
    q, k, v = qkv(1, 2, 1, 5, 5, 4)
    out = attention(q, k, v, scale=SCALE, window=1, twice=kernel == "math")
    torch.testing.assert_close(out, v.expand(1, 2, 5, 4), **CLOSE)


def test_visible_by_hand():
    """Three queries at the end of five keys, window 2: each sees its own key and the one before."""
    expected = [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert visible(3, 5, 2).int().tolist() == expected
    assert visible(2, 3, None).int().tolist() == [[1, 1, 0], [1, 1, 1]]


def test_half_precision_keeps_its_dtype_and_stays_near():
    inputs = qkv(1, 4, 2, 6, 9, 8, dtype=torch.bfloat16)
    wide = attention_naive(*(x.double() for x in inputs), scale=SCALE, window=4)
    for kernel in KERNELS:
        out = attention(*inputs, scale=SCALE, window=4, twice=kernel == "math")
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), wide, rtol=0.02, atol=0.02)


DEVICES = [torch.device("cpu"), torch.device("cuda")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_second_order_never_picks_a_fused_kernel(monkeypatch, device, dtype, installed):
    monkeypatch.setattr(ops, "_has_flash_attn", lambda: installed)
    for head_dim in (4, 64, 128, 256, 320):
        assert choose_kernel(device=device, dtype=dtype, head_dim=head_dim, twice=True) == "math"
        flash = installed and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim <= 256
        expected = "flash" if flash else "sdpa"
        assert choose_kernel(device=device, dtype=dtype, head_dim=head_dim, twice=False) == expected


def test_the_chosen_kernel_is_the_one_that_runs(monkeypatch):
    called = []
    for name, kernel in _KERNELS.items():
        monkeypatch.setitem(_KERNELS, name, lambda *a, name=name, kernel=kernel: called.append(name) or kernel(*a))
    inputs = qkv(1, 1, 1, 3, 3, 2)
    for twice in (True, False):
        attention(*inputs, scale=SCALE, window=2, twice=twice)
    assert called == ["math", "sdpa"]
