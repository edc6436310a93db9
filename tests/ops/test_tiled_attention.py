"""The four functions in tiles equal autograd and forward-mode derivatives of ``attention_naive``, and hold no matrix of all keys."""

import pytest
import torch
from helpers.memory import LiveBytes
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.ops import tiled_attention as tiled
from ttt_lit.ops.attention_naive import attention_naive, visible

SCALE = 0.37
# float64: sums in another order, and products of up to four factors.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# float32, by norm: 24 bits, which sums of some ninety terms and products of up to four factors spend a few times over.
FLOAT32_NORM = 2e-6
# Half precision, by norm: every factor is rounded to 8 bits (bfloat16) or 11, and a second derivative multiplies several of them.
HALF_NORM = {torch.bfloat16: 0.02, torch.float16: 0.0025}
# The real tile, and tiles that end anywhere in texts of a dozen tokens.
TILES = [1, 2, 3, 7, 64]
SINKS = st.sampled_from([0, 0, 1, 2, 3, 5, 13])
KINDS = ["o", "lse", "dq", "dk", "dv", "to", "mu"] + [f"{c}:{x}" for c in ("do+dto", "dto") for x in range(6)]


class Problem:
    """Random operands, cotangents and directions; ``num_new`` trailing keys have a direction."""

    def __init__(
        self, batch, heads, kv_heads, queries, keys, num_new, head_dim, window, sinks=0, *, seed=0, dense=True
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(num_heads, length):
            x = torch.randn((batch, length, num_heads, head_dim), generator=generator, dtype=torch.float64)
            return x.transpose(1, 2).contiguous() if dense else x.transpose(1, 2)

        self.q, self.do, self.tq, self.dto = (random(heads, queries) for _ in range(4))
        self.k, self.v = random(kv_heads, keys), random(kv_heads, keys)
        self.tk, self.tv = random(kv_heads, num_new), random(kv_heads, num_new)
        self.window, self.sinks, self.num_new, self.old = window, sinks, num_new, keys - num_new

    def to(self, dtype):
        for name in ("q", "k", "v", "do", "dto", "tq", "tk", "tv"):
            setattr(self, name, getattr(self, name).to(dtype))
        return self

    def naive(self, q, k, v):
        return attention_naive(q, k, v, scale=SCALE, window=self.window, sink_tokens=self.sinks)


def ours(p):
    """All results of the four functions, by name."""
    qkv, settings = (p.q, p.k, p.v), (SCALE, p.window, p.sinks)
    o, lse = tiled.forward(*qkv, *settings)
    gradients = tiled.backward(p.do, *qkv, o, lse, *settings, p.num_new)
    direction = (p.tq, p.tk, p.tv)
    to, mu = tiled.jvp(*qkv, o, lse, *direction, *settings)
    both, second = (tiled.dual_backward(do, p.dto, *qkv, o, lse, to, mu, *direction, *settings) for do in (p.do, None))
    return dict(zip(KINDS, [o, lse, *gradients, to, mu, *both, *second], strict=True))


def expected(p):
    """The same from the naive twin, through autograd and ``torch.func.jvp``."""
    leaves = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v, p.tq, p.tk, p.tv)]
    qkv, (tq, *new) = leaves[:3], leaves[3:]
    zeros = p.k.new_zeros(*p.k.shape[:2], p.old, p.k.shape[3])
    direction = (tq, *(torch.cat([zeros, t], dim=2) for t in new))
    o, to = torch.func.jvp(p.naive, tuple(qkv), direction)
    dq, dk, dv = torch.autograd.grad((p.do * o).sum(), qkv, retain_graph=True)
    second = (p.dto * to).sum()
    both = torch.autograd.grad((p.do * o).sum() + second, leaves, retain_graph=True)
    alone = torch.autograd.grad(second, leaves)
    _, lse = _scores(p, *qkv)
    weights, tangent_scores = torch.func.jvp(lambda *x: _scores(p, *x)[0], tuple(qkv), direction)
    mu = (weights.softmax(dim=-1) * tangent_scores).sum(dim=-1)
    results = [o, lse, dq, dk[:, :, p.old :], dv[:, :, p.old :], to, mu, *both, *alone]
    return {name: x.detach() for name, x in zip(KINDS, results, strict=True)}


def _scores(p, q, k, _):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * SCALE
    scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], p.window, sink_tokens=p.sinks), float("-inf"))
    return scores, scores.logsumexp(dim=-1)


def assert_close(got, wanted):
    for name, x in wanted.items():
        torch.testing.assert_close(got[name], x, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def assert_close_in_norm(got, wanted, limit):
    for name, x in wanted.items():
        error = (torch.linalg.vector_norm(got[name].double() - x) / torch.linalg.vector_norm(x)).item()
        assert error < limit, f"{name}: off by {error:.1e} of its norm"


@st.composite
def problems(draw):
    """Fewer queries than keys, directions on some of the keys, grouped heads, both layouts, windows and sinks below, at and above the
    length."""
    keys = draw(st.integers(1, 12))
    heads = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (6, 2)]))
    lengths = (draw(st.integers(1, keys)), keys, draw(st.integers(1, keys)))
    window = draw(st.one_of(st.none(), st.integers(1, 14)))
    shape = (draw(st.integers(1, 2)), *heads, *lengths, draw(st.sampled_from([1, 3])), window, draw(SINKS))
    problem = Problem(*shape, seed=draw(st.integers(0, 10**6)), dense=draw(st.booleans()))
    return problem, draw(st.sampled_from(TILES))


@settings(max_examples=120)
@given(problem_and_tile=problems())
def test_all_four_functions_equal_derivatives_of_the_naive_twin(problem_and_tile):
    problem, tile = problem_and_tile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILE", tile)
        assert_close(ours(problem), expected(problem))


@pytest.mark.parametrize("tile", [1, 2, 3, 7])
@pytest.mark.parametrize("window", [1, 2, 3, 6, 8, 9, 100, None])
@pytest.mark.parametrize("queries, keys, num_new", [(7, 9, 7), (3, 9, 1), (2, 9, 6)])
def test_windows_around_every_edge(monkeypatch, tile, window, queries, keys, num_new):
    monkeypatch.setattr(tiled, "TILE", tile)
    problem = Problem(1, 2, 1, queries, keys, num_new, 2, window)
    assert_close(ours(problem), expected(problem))


@pytest.mark.parametrize("tile", [1, 3, 7])
@pytest.mark.parametrize("window, sinks", [(1, 1), (1, 3), (2, 2), (2, 5), (3, 1), (4, 4), (8, 2), (3, 6), (2, 50)])
@pytest.mark.parametrize("queries, keys, num_new", [(9, 9, 9), (4, 12, 4), (4, 12, 11), (3, 12, 7)])
def test_sinks_around_every_edge(monkeypatch, tile, window, sinks, queries, keys, num_new):
    """Before the windows, touching them, inside them; constants, with directions, and some of both."""
    monkeypatch.setattr(tiled, "TILE", tile)
    problem = Problem(1, 2, 1, queries, keys, num_new, 2, window, sinks)
    assert_close(ours(problem), expected(problem))


@settings(max_examples=40)
@given(problem_and_tile=problems())
def test_sinks_of_which_a_window_hides_none_change_no_bit(problem_and_tile):
    problem, tile = problem_and_tile
    problem.window, problem.sinks = problem.k.shape[2], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILE", tile)
        plain = ours(problem)
        problem.sinks = 3
        for name, x in ours(problem).items():
            assert torch.equal(x, plain[name]), name


@pytest.mark.parametrize("tile", [3, 64])
def test_the_layout_of_operands_cotangents_and_directions_is_free(monkeypatch, tile):
    monkeypatch.setattr(tiled, "TILE", tile)
    problem = Problem(2, 4, 2, 5, 8, 5, 3, 4, dense=False)
    assert not problem.q.is_contiguous()
    assert_close(ours(problem), expected(problem))
    problem.do = problem.dto = torch.ones((), dtype=torch.float64).expand(problem.q.shape)
    assert_close(ours(problem), expected(problem))
    assert all(x.is_contiguous() for x in ours(problem).values())


@settings(max_examples=150)
@given(
    *(st.integers(1, 40), st.integers(0, 40), st.one_of(st.none(), st.integers(1, 50))),
    *(st.sampled_from([0, 1, 4, 20, 99]), st.integers(1, 20)),
)
def test_tiles_hide_what_is_not_visible_and_hold_window_plus_tile_keys_and_sinks_at_most(
    queries, before, window, sinks, tile
):
    q, k = torch.zeros(1, 2, queries, 1), torch.arange(before + queries).view(1, 1, -1, 1)
    seen = visible(queries, before + queries, window, sink_tokens=sinks)
    next_query = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILE", tile)
        for t, keys, values in tiled._tiles(q, k, -k, window, sinks):
            assert t.start == next_query
            assert torch.equal(keys, -values)
            keys, of_tile = keys.flatten(), seen[t.start : t.stop]
            assert torch.equal(keys, t.since(0, k).flatten())
            assert window is None or len(keys) <= window + tile - 1 + sinks
            scores = t.hide(torch.ones(1, 1, 2 * (t.stop - t.start), len(keys)), 0.0)
            for head in scores.unflatten(2, (2, -1))[0, 0]:
                assert torch.equal(head.bool(), of_tile[:, keys])
            assert of_tile.sum() == of_tile[:, keys.unique()].sum()
            assert len(keys.unique()) == len(keys)
            next_query = t.stop
    assert next_query == queries


# What dual_backward holds at once: six results and two statistics of a quarter of the width, and seven matrices of a tile with its rows.
NUM_ROWS, NUM_TILES = 7, 8


def peaks(length, window, sinks=0):
    """Peak bytes that each function makes, by name; float32, one head."""
    p = Problem(1, 1, 1, length, length, length, 4, window).to(torch.float32)
    qkv, direction, settings = (p.q, p.k, p.v), (p.tq, p.tk, p.tv), (SCALE, window, sinks)
    o, lse = tiled.forward(*qkv, *settings)
    to, mu = tiled.jvp(*qkv, o, lse, *direction, *settings)
    calls = {
        "forward": lambda: tiled.forward(*qkv, *settings),
        "backward": lambda: tiled.backward(p.do, *qkv, o, lse, *settings, length),
        "jvp": lambda: tiled.jvp(*qkv, o, lse, *direction, *settings),
        "dual_backward": lambda: tiled.dual_backward(p.do, p.dto, *qkv, o, lse, to, mu, *direction, *settings),
    }
    found = {}
    for name, call in calls.items():
        with LiveBytes(*qkv, *direction, p.do, p.dto, o, lse, to, mu) as live:
            call()
        found[name] = live.peak
    return found


@pytest.mark.parametrize("length, window, sinks", [(512, 16, 0), (1024, 16, 0), (1024, 100, 0), (1024, 100, 9)])
def test_memory_is_that_of_a_few_tiles_and_of_the_results(length, window, sinks):
    tile = 4 * tiled.TILE * (sinks + window + tiled.TILE - 1)
    rows = 4 * length * 4
    for name, peak in peaks(length, window, sinks).items():
        assert peak < NUM_ROWS * rows + NUM_TILES * tile, name
        assert peak < 4 * length * length / 4, name


def test_memory_grows_with_the_text_only_by_the_results():
    short, long = peaks(512, 16), peaks(1024, 16)
    for name, peak in long.items():
        assert peak - short[name] <= NUM_ROWS * 4 * 512 * 4, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_their_operands_and_statistics_are_float32(dtype):
    problem = Problem(1, 4, 2, 70, 90, 70, 8, 20).to(dtype)
    got = ours(problem)
    for name, x in got.items():
        assert x.dtype == (torch.float32 if name in ("lse", "mu") else dtype), name
    assert_close_in_norm(got, expected(problem.to(torch.float64)), HALF_NORM.get(dtype, FLOAT32_NORM))


def test_gradients_of_a_key_add_up_in_float32(monkeypatch):
    """As many tiles as queries add to each key: in bfloat16 the last ones would be rounded away."""
    monkeypatch.setattr(tiled, "TILE", 1)
    problem = Problem(1, 1, 1, 300, 300, 300, 4, None).to(torch.bfloat16)
    # Towards one side, so that sums grow.
    problem.do, problem.dto = problem.do.abs(), problem.dto.abs()
    got = ours(problem)
    assert_close_in_norm(got, expected(problem.to(torch.float64)), HALF_NORM[torch.bfloat16])


def test_scores_of_hundreds_do_not_overflow():
    problem = Problem(1, 2, 1, 9, 12, 9, 4, 5).to(torch.float32)
    problem.q = problem.q * 300
    got = ours(problem)
    assert all(x.isfinite().all() for x in got.values())
    assert got["lse"].max() > 200
    torch.testing.assert_close(got["o"], problem.naive(problem.q, problem.k, problem.v))
