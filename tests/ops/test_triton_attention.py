"""The Triton kernels equal the naive twin in value, first and second order, and compile for GPUs that this machine need not have.

Values are checked on the CPU, in Triton's interpreter. Its tl.dot is wrong for bfloat16 (1e10, without an error), so dtypes here are
float32 and float16; bfloat16 is only compiled.
"""

import functools
import importlib.util
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.ops.attention_naive import attention_naive, visible

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from ttt_lit.ops import triton_attention as ours  # noqa: E402

SCALE = 0.37
# Against float64; results reach 7. The float32 sums behind them have up to a hundred terms and come out within 5e-6. With 16 bits, p, ds
# and their like are rounded (to 11 bits in float16, to 8 in bfloat16) before the second products, and so are the results; float16 comes
# out within 2e-3.
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 16e-3, "atol": 40e-3},
}
# Shared memory of a block on the smallest GPUs that have bfloat16 (sm_86, sm_89, sm_120).
SMALLEST_SHARED_MEMORY = 99 * 1024


def copy_of_kernels(name):
    """The kernels' module under a private name: nobody else in this process may meet interpreted or wrongly targeted kernels."""
    spec = importlib.util.spec_from_file_location(name, ours.kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreted():
    # Read when a kernel is decorated, which is when its module is imported.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return copy_of_kernels("interpreted_attention_kernels")


@pytest.fixture
def _interpreter(monkeypatch, interpreted):
    """Launch interpreted kernels on CPU tensors, and leave Triton as it was."""
    monkeypatch.setattr(ours, "kernels", interpreted)
    # Triton's own library was decorated when somebody imported it, Lightning for one, without the interpreter in mind.
    for name in ("max", "sum", "zeros"):
        monkeypatch.setattr(tl, name, InterpretedFunction(getattr(tl, name).fn))
    # The interpreter patches this module for those three functions and does not undo it.
    for name, value in list(vars(tl.core).items()):
        monkeypatch.setitem(vars(tl.core), name, value)


interpreter = pytest.mark.usefixtures("_interpreter")


@dataclass(frozen=True)
class Problem:
    """Sizes of one call: Tq, Tk, N, the window, its sinks, (Hq, Hkv), D."""

    queries: int
    keys: int
    new: int
    window: int | None
    sinks: int = 0
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 16
    batch: int = 1
    dtype: torch.dtype = torch.float32


@functools.cache
def inputs(problem):
    """q, k, v, do, dto, tq, tk, tv."""
    p, generator = problem, torch.Generator().manual_seed(0)
    query, key, new = (p.heads[0], p.queries), (p.heads[1], p.keys), (p.heads[1], p.new)
    shapes = {"q": query, "k": key, "v": key, "do": query, "dto": query, "tq": query, "tk": new, "tv": new}
    # Wide heads would have scores in the hundreds and one key take all the weight.
    size = min(1.0, (16 / p.head_dim) ** 0.25)
    return SimpleNamespace(
        **{
            name: (torch.randn(p.batch, *shape, p.head_dim, generator=generator) * size).to(p.dtype)
            for name, shape in shapes.items()
        }
    )


def naive_dual(q, k, v, tq, tk, tv, window, sinks):
    """(o, lse) and their derivatives along (tq, tk, tv), tangents of earlier keys being zero."""

    def value(q, k, v):
        seen = visible(q.shape[2], k.shape[2], window, sink_tokens=sinks)
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (SCALE * q @ keys.mT).masked_fill(~seen, float("-inf"))
        return attention_naive(q, k, v, scale=SCALE, window=window, sink_tokens=sinks), scores.logsumexp(dim=-1)

    old = k.shape[2] - tk.shape[2]
    direction = (tq, *(F.pad(x, (0, 0, old, 0)) for x in (tk, tv)))
    return torch.func.jvp(value, (q, k, v), direction)


FORWARD, BACKWARD, JVP = ["o", "lse"], ["dq", "dk", "dv"], ["to", "mu"]
# In capitals: the first three have namesakes in the first order.
DUAL_BACKWARD = ["DQ", "DK", "DV", "DTQ", "DTK", "DTV"]
RESULTS = [*FORWARD, *BACKWARD, *JVP, *DUAL_BACKWARD]


@functools.cache
def expected(problem, with_do=True):
    """Every result in float64: values, tangents, the gradients of ⟨do, o⟩ and those of ⟨do, o⟩ + ⟨dto, to⟩."""
    x = SimpleNamespace(**{name: value.double() for name, value in vars(inputs(problem)).items()})
    arguments = (x.q, x.k, x.v, x.tq, x.tk, x.tv)
    do = x.do if with_do else torch.zeros_like(x.do)

    def objective(*arguments, dto=x.dto):
        (o, _), (to, _) = naive_dual(*arguments, problem.window, problem.sinks)
        return (do * o).sum() + (dto * to).sum()

    (o, lse), (to, mu) = naive_dual(*arguments, problem.window, problem.sinks)
    dq, dk, dv = torch.func.grad(functools.partial(objective, dto=0 * x.dto), argnums=(0, 1, 2))(*arguments)
    first_order = (dq, dk[:, :, -problem.new :], dv[:, :, -problem.new :])
    second_order = torch.func.grad(objective, argnums=tuple(range(6)))(*arguments)
    return dict(zip(RESULTS, (o, lse, *first_order, to, mu, *second_order), strict=True))


def operands(problem):
    """The inputs, and the saved results o, lse, to and mu, right to the last bit that their dtypes have."""
    e, dtype = expected(problem), problem.dtype
    saved = {"o": e["o"].to(dtype), "lse": e["lse"].float(), "to": e["to"].to(dtype), "mu": e["mu"].float()}
    return SimpleNamespace(**vars(inputs(problem)), **saved)


def changed(x, change):
    return SimpleNamespace(**{name: change(value) for name, value in vars(x).items()})


def forward(problem, x):
    return dict(zip(FORWARD, ours.forward(x.q, x.k, x.v, SCALE, problem.window, problem.sinks), strict=True))


def backward(problem, x):
    results = ours.backward(x.do, x.q, x.k, x.v, x.o, x.lse, SCALE, problem.window, problem.sinks, problem.new)
    return dict(zip(BACKWARD, results, strict=True))


def jvp(problem, x):
    results = ours.jvp(x.q, x.k, x.v, x.o, x.lse, x.tq, x.tk, x.tv, SCALE, problem.window, problem.sinks)
    return dict(zip(JVP, results, strict=True))


def dual_backward(problem, x):
    saved = (x.q, x.k, x.v, x.o, x.lse, x.to, x.mu)
    results = ours.dual_backward(x.do, x.dto, *saved, x.tq, x.tk, x.tv, SCALE, problem.window, problem.sinks)
    return dict(zip(DUAL_BACKWARD, results, strict=True))


def all_results(problem, x):
    return forward(problem, x) | backward(problem, x) | jvp(problem, x) | dual_backward(problem, x)


def assert_equal_naive(got, wanted, dtype):
    for name, result in got.items():
        assert result.dtype == (torch.float32 if name in ("lse", "mu") else dtype), name
        assert result.is_contiguous(), name
        message = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(result.double().cpu(), wanted[name], **CLOSE[result.dtype], msg=message)


def assert_all_equal_naive(problem, device="cpu"):
    x = changed(operands(problem), lambda value: value.to(device))
    assert_equal_naive(all_results(problem, x), expected(problem), problem.dtype)


def assert_same_bits(got, wanted, names=RESULTS, rows=slice(None)):
    for name in set(names) & set(got):
        assert torch.equal(got[name][:, :, rows], wanted[name][:, :, rows]), name


# Tiles of float32 are 16 by 16. Windows of 2 and 18 make the last row in reach of a tile the first of a tile that is walked over.
PROBLEMS = {
    "one query": Problem(1, 1, 1, None),
    "one query of many keys": Problem(1, 37, 5, 20),
    "less than a tile": Problem(5, 9, 5, None),
    "odd sizes": Problem(37, 37, 37, None),
    "exact tiles": Problem(32, 48, 32, 16),
    "window of one": Problem(19, 19, 19, 1),
    "window below a tile": Problem(37, 50, 20, 2),
    "window above a tile": Problem(35, 50, 35, 18),
    "window of all keys": Problem(20, 30, 11, 30),
    "window beyond all keys": Problem(20, 30, 11, 2**31 - 1),
    "keys that nobody sees": Problem(5, 60, 40, 3),
    "one tangent": Problem(18, 33, 1, None),
    "more tangents than queries": Problem(18, 45, 40, 20),
    "one sink": Problem(20, 40, 20, 3, 1),
    "sinks with tangents": Problem(37, 37, 37, 5, 4),
    "sinks of both kinds": Problem(20, 60, 50, 9, 20),
    "sinks that touch the windows": Problem(18, 50, 20, 16, 17),
    "a window with its sinks of all keys": Problem(20, 30, 11, 20, 10),
    "groups, batch and sinks": Problem(9, 40, 11, 7, 3, heads=(6, 2), batch=2),
    "groups and batch": Problem(9, 18, 11, 7, heads=(6, 2), batch=2),
    "D = 24": Problem(18, 21, 10, 9, head_dim=24),
    "D = 64": Problem(18, 21, 10, 9, head_dim=64),
    "D = 80": Problem(18, 21, 10, None, head_dim=80),
    "D = 256": Problem(17, 20, 9, 9, head_dim=256, heads=(1, 1)),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


@interpreter
@every_problem
def test_output_and_log_sum_exp_equal_the_naive_twin(problem):
    assert_equal_naive(forward(problem, operands(problem)), expected(problem), problem.dtype)


@interpreter
@every_problem
def test_gradients_equal_autograd_of_the_naive_twin(problem):
    assert_equal_naive(backward(problem, operands(problem)), expected(problem), problem.dtype)


@interpreter
@every_problem
def test_tangents_equal_forward_differentiation_of_the_naive_twin(problem):
    assert_equal_naive(jvp(problem, operands(problem)), expected(problem), problem.dtype)


@interpreter
@every_problem
def test_second_order_gradients_equal_autograd_of_the_naive_tangents(problem):
    assert_equal_naive(dual_backward(problem, operands(problem)), expected(problem), problem.dtype)


@interpreter
@pytest.mark.parametrize("name", ["odd sizes", "window below a tile", "sinks of both kinds"])
def test_no_cotangent_of_the_output_is_a_zero_cotangent(name):
    problem = PROBLEMS[name]
    x = operands(problem)
    x.do = None
    assert_equal_naive(dual_backward(problem, x), expected(problem, with_do=False), problem.dtype)


@st.composite
def problems(draw):
    keys = draw(st.integers(1, 36))
    queries, new = draw(st.integers(1, keys)), draw(st.integers(1, keys))
    window, sinks = draw(st.one_of(st.none(), st.integers(1, 40))), draw(st.sampled_from([0, 1, 4, 18]))
    return Problem(queries, keys, new, window, sinks, heads=(1, 1))


@interpreter
@settings(max_examples=8)
@given(problem=problems())
def test_all_four_functions_equal_the_naive_twin_for_any_lengths(problem):
    assert_all_equal_naive(problem)


HALF = {
    "D = 16": Problem(70, 131, 67, 66, heads=(1, 1)),
    "D = 80": Problem(40, 70, 35, 37, head_dim=80, heads=(1, 1)),
    "D = 256": Problem(40, 40, 20, None, head_dim=256, heads=(1, 1)),
    "sinks": Problem(70, 200, 67, 66, 5, heads=(1, 1)),
}


@interpreter
@pytest.mark.parametrize("problem", HALF.values(), ids=HALF)
def test_float16_stays_near_in_its_own_tiles(problem):
    assert_all_equal_naive(replace(problem, dtype=torch.float16))


@interpreter
@pytest.mark.parametrize("owned, walked", [(32, 16), (16, 32)])
def test_tiles_of_any_shape_give_the_same(monkeypatch, owned, walked):
    monkeypatch.setattr(ours, "_FLOAT32_TILE", ours.Tile(owned, walked, 4, 1))
    assert_all_equal_naive(Problem(37, 50, 20, 21, heads=(1, 1)))
    assert_all_equal_naive(Problem(37, 70, 60, 11, 20, heads=(1, 1)))


def scattered(x):
    """The same values in other strides: gaps between columns, rows outside heads; statistics transposed."""
    if x.ndim == 3:
        return x.mT.contiguous().mT
    with_gaps = torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)
    return with_gaps.transpose(1, 2).contiguous().transpose(1, 2)[..., 0]


@interpreter
def test_strides_of_the_operands_do_not_matter():
    problem = Problem(18, 20, 9, 11, heads=(2, 2))
    contiguous = operands(problem)
    strided = changed(contiguous, scattered)
    assert not any(x.is_contiguous() for x in vars(strided).values())
    assert_same_bits(all_results(problem, strided), all_results(problem, contiguous))


@interpreter
def test_a_cotangent_of_one_repeated_value_is_read_right():
    problem = Problem(18, 20, 9, 11)
    ones, repeated = operands(problem), operands(problem)
    ones.do = torch.ones_like(ones.q)
    repeated.do = torch.ones(()).expand(ones.q.shape)
    assert_same_bits(backward(problem, repeated), backward(problem, ones))


@interpreter
@pytest.mark.parametrize("name", ["keys that nobody sees", "less than a tile", "D = 24", "sinks of both kinds"])
def test_every_element_of_every_result_is_written(monkeypatch, name):
    problem, poisoned = PROBLEMS[name], set()

    def poison(make, *args, **kwargs):
        out = make(*args, **kwargs).fill_(float("nan"))
        poisoned.add(out.data_ptr())
        return out

    x = operands(problem)
    monkeypatch.setattr(torch, "empty", functools.partial(poison, torch.empty))
    monkeypatch.setattr(torch, "empty_like", functools.partial(poison, torch.empty_like))
    results = all_results(problem, x)
    assert {result.data_ptr() for result in results.values()} <= poisoned
    assert not [name for name, result in results.items() if result.isnan().any()]


OF_KEYS = ["dk", "dv", "DK", "DV", "DTK", "DTV"]
OF_QUERIES = [name for name in RESULTS if name not in OF_KEYS]


def with_nan(x, names, rows):
    """A copy of x whose named operands are NaN in ``rows``: a tile that reads them cannot give a number, for 0 · NaN is NaN."""
    copy = changed(x, torch.clone)
    for name in names.split():
        getattr(copy, name)[:, :, rows] = float("nan")
    return copy


# NumPy's remark on rows that are not compared.
blind_rows_have_no_maximum = pytest.mark.filterwarnings("ignore:All-NaN slice encountered")


@interpreter
def test_keys_out_of_every_window_are_never_read():
    # Queries 48 … 63 see keys 40 … 63. Tiles of new keys begin at 24, 40 and 56.
    problem = Problem(16, 64, 40, 9, heads=(1, 1))
    x = operands(problem)
    blind = with_nan(with_nan(x, "k v", slice(0, 40)), "tk tv", slice(0, 16))
    got, wanted = all_results(problem, blind), all_results(problem, x)
    assert_same_bits(got, wanted, OF_QUERIES)
    assert_same_bits(got, wanted, OF_KEYS, rows=slice(-24, None))


@interpreter
def test_keys_between_the_sinks_and_every_window_are_never_read():
    # Queries 48 … 63 see keys 0 … 3 and 40 … 63. A tile of sinks reads no key beyond them; tiles of new keys begin at 24, 40 and 56.
    problem = Problem(16, 64, 40, 9, 4, heads=(1, 1))
    x = operands(problem)
    blind = with_nan(with_nan(x, "k v", slice(4, 40)), "tk tv", slice(0, 16))
    got, wanted = all_results(problem, blind), all_results(problem, x)
    assert_same_bits(got, wanted, OF_QUERIES)
    assert_same_bits(got, wanted, OF_KEYS, rows=slice(-24, None))


@interpreter
def test_sinks_of_which_a_window_hides_none_change_no_bit():
    problem = Problem(20, 40, 20, 33, heads=(1, 1))
    x = operands(replace(problem, window=40))
    assert_same_bits(all_results(replace(problem, sinks=7), x), all_results(replace(problem, window=None), x))


@interpreter
@blind_rows_have_no_maximum
def test_keys_after_a_tile_of_queries_are_never_read():
    problem = Problem(48, 48, 48, None, heads=(1, 1))
    x = operands(problem)
    blind = with_nan(x, "k v tk tv", slice(16, None))
    got, wanted = all_results(problem, blind), all_results(problem, x)
    assert_same_bits(got, wanted, OF_QUERIES, rows=slice(0, 16))


@interpreter
@blind_rows_have_no_maximum
def test_queries_that_do_not_see_a_tile_of_keys_are_never_read():
    # Keys 16 … 31 are seen by queries 16 … 47.
    problem = Problem(64, 64, 64, 17, heads=(1, 1))
    x = operands(problem)
    blind = with_nan(x, "q do dto tq lse mu", slice(0, 16))
    blind = with_nan(blind, "q do dto tq lse mu", slice(48, None))
    got, wanted = all_results(problem, blind), all_results(problem, x)
    assert_same_bits(got, wanted, OF_KEYS, rows=slice(16, 32))


class CompileOnly:
    """A kernel that its launch compiles, and that never runs."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))

        return launch


def pretend_gpu(monkeypatch, cache, capability):
    """Make launches compile for a GPU; returns the list that collects what they compiled."""
    target = GPUTarget("cuda", capability, 32)
    here = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target
    )
    monkeypatch.setattr(driver, "_active", here)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9's default, but unset it warns
    kernels, compiled = copy_of_kernels("compiled_attention_kernels"), []
    wrapped = {name: CompileOnly(x, compiled) for name, x in vars(kernels).items() if name.endswith("_kernel")}
    monkeypatch.setattr(ours, "kernels", SimpleNamespace(**wrapped))
    return compiled


@pytest.mark.parametrize("sinks", [0, 4])
def test_bfloat16_kernels_compile_and_fit_the_smallest_shared_memory(monkeypatch, tmp_path, sinks):
    problem = Problem(70, 100, 33, 19, sinks, head_dim=128, dtype=torch.bfloat16)
    x = operands(problem)
    compiled = pretend_gpu(monkeypatch, tmp_path, capability=90)
    all_results(problem, x)
    names = [kernel.metadata.name for kernel in compiled]
    # The key side of the dual twice: keys without and with tangents.
    query_side = ["forward_kernel", "backward_query_kernel", "jvp_kernel", "dual_query_kernel"]
    assert sorted(names) == sorted([*query_side, "backward_key_kernel", *2 * ["dual_key_kernel"]])
    assert all("mma" in kernel.asm["ptx"] for kernel in compiled), "products on tensor cores"
    assert max(kernel.metadata.shared for kernel in compiled) <= SMALLEST_SHARED_MEMORY


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("problem", HALF.values(), ids=HALF)
def test_a_gpu_computes_what_the_naive_twin_does(problem, dtype):
    assert_all_equal_naive(replace(problem, dtype=dtype), device="cuda")
