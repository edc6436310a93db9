"""The loss in tiles is the loss as a whole, in value and in every derivative, and never holds all logits."""

import math

import pytest
import torch
from helpers.memory import LiveBytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ttt_lit.ops import cross_entropy as ops
from ttt_lit.ops import logit_tiles
from ttt_lit.ops.cross_entropy import linear_nll, nll_adjoint, nll_with_gradient, token_nll

# float64: sums in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# Half precision against float64, by norm: 8 or 11 bits in operands and in the differences of probabilities.
HALF_NORM = {torch.bfloat16: 0.02, torch.float16: 0.0025}
# float32 at a vocabulary of 2 ** 18, by norm. The log-sum-exp adds in blocks and is exact to a few roundings. A matrix product adds one by
# one, and 2 ** 18 roundings of random sign are 2 ** 9.
LARGE_VOCAB_LOSS = 2**-24 * 8
LARGE_VOCAB_NORM = 2**-24 * 2**9
GEMMA_VOCAB = 262_144
# Matrices of a tile at once: logits, those of a derivative, a copy on its way, and one of the tile before, held while the next is made.
MAX_MATRICES = 4


def problem(batch, length, vocab=7, width=4, seed=0, dtype=torch.float64, transposed=False):
    """Leaves hidden and head, and targets; ``transposed`` lays hidden out as (T, B, D)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(length, batch, width, generator=generator, dtype=torch.float64).to(dtype).transpose(0, 1)
    hidden = (hidden if transposed else hidden.contiguous()).requires_grad_()
    head = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, head, torch.randint(vocab, (batch, length), generator=generator)


def weights_of(losses):
    """Cotangents of which none is like another; not contiguous."""
    return torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype).view(losses.shape[::-1]).mT


def losses_and_gradients(call, hidden, head, targets):
    losses = call(hidden, head, targets)
    return [losses.detach(), *torch.autograd.grad((losses * weights_of(losses)).sum(), [hidden, head])]


def adjoint_of(hidden, tangent, head, targets, cotangent, seed):
    """``nll_adjoint`` with the gradient of the head as a result: (hidden, tangent unless there is none, head)."""
    d_head = torch.zeros(head.shape, dtype=torch.promote_types(head.dtype, torch.float32))
    d_hidden, d_tangent = nll_adjoint(hidden, tangent, head, targets, cotangent, seed, d_head)
    return d_hidden, d_tangent, d_head


def adjoint_by_autograd(hidden, tangent, head, targets, cotangent, seed):
    """What ``nll_adjoint`` says it computes, from the twin."""
    leaves = [hidden, head] if tangent is None else [hidden, tangent, head]
    along = torch.zeros_like(hidden) if tangent is None else tangent
    losses, tangents = torch.func.jvp(lambda h: token_nll(h, head, targets), (hidden,), (along,))
    return torch.autograd.grad((cotangent * losses).sum() + seed * tangents.sum(), leaves)


def assert_all_close(got, expected, **tolerance):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or CLOSE))


def assert_close_in_norm(got, expected, limit):
    for x, y in zip(got, expected, strict=True):
        assert torch.linalg.vector_norm(x.double() - y.double()) < limit * torch.linalg.vector_norm(y.double())


def set_tile(patch, tokens, columns):
    patch.setattr(logit_tiles, "tile_shape", lambda vocab_size, device: (tokens, columns))


@pytest.fixture(params=[(1, 1), (4, 3), (4, 1000), (1000, 3), (1000, 1000)], ids=lambda shape: "{} x {}".format(*shape))
def tile(request, monkeypatch):
    set_tile(monkeypatch, *request.param)


@st.composite
def problems(draw):
    """(problem, shape of a tile): tiles of one, of some and of all tokens and columns."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 11)), draw(st.integers(1, 9)), draw(st.integers(1, 5)))
    inputs = problem(*shape, seed=draw(st.integers(0, 10**6)), transposed=draw(st.booleans()))
    return inputs, (draw(st.integers(1, 34)), draw(st.integers(1, 10)))


def test_the_twin_is_minus_the_log_of_the_targets_probability():
    hidden, head, targets = (t.detach() for t in problem(2, 3))
    losses = token_nll(hidden, head, targets)
    for b in range(2):
        for t in range(3):
            scores = [math.exp(float(hidden[b, t] @ row)) for row in head]
            assert losses[b, t].item() == pytest.approx(-math.log(scores[targets[b, t]] / sum(scores)), rel=1e-12)


@settings(max_examples=60)
@given(problem_and_tile=problems())
def test_losses_and_gradients_equal_the_whole_in_tiles_of_any_size(problem_and_tile):
    inputs, shape = problem_and_tile
    with pytest.MonkeyPatch.context() as patch:
        set_tile(patch, *shape)
        got = losses_and_gradients(linear_nll, *inputs)
    assert_all_close(got, losses_and_gradients(token_nll, *inputs))


@settings(max_examples=60)
@given(problems(), st.sampled_from([1.0, 0.25, -2.0]), st.booleans())
def test_one_sweep_gives_what_autograd_of_the_twin_gives(problem_and_tile, seed, with_tangent):
    (hidden, head, targets), shape = problem_and_tile
    tangent = (9 * hidden.detach().mT.contiguous()).cos().mT.requires_grad_() if with_tangent else None
    losses = token_nll(hidden, head, targets)
    cotangent = weights_of(losses)
    (gradient,) = torch.autograd.grad(seed * losses.sum(), hidden)
    expected = adjoint_by_autograd(hidden, tangent, head, targets, cotangent, seed)
    with pytest.MonkeyPatch.context() as patch:
        set_tile(patch, *shape)
        got = nll_with_gradient(hidden, head, targets, seed)
        adjoint = adjoint_of(hidden, tangent, head, targets, cotangent, seed)
    assert_all_close(got, [losses.detach(), gradient])
    assert with_tangent or adjoint[1] is None
    adjoint = [x for x in adjoint if x is not None]
    assert_all_close(adjoint, expected)
    assert not any(x.requires_grad for x in (*got, *adjoint))


def test_linear_nll_passes_gradcheck(tile):
    hidden, head, targets = problem(2, 3, vocab=5, width=2, transposed=True)
    assert torch.autograd.gradcheck(lambda h, w: linear_nll(h, w, targets), (hidden, head))


def test_a_second_derivative_raises():
    hidden, head, targets = problem(1, 2)
    (first,) = torch.autograd.grad(linear_nll(hidden, head, targets).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.square().sum(), hidden)


def test_a_target_outside_of_the_vocabulary_has_no_number_for_a_loss(tile):
    hidden, head, targets = (t.detach() for t in problem(1, 3))
    for wrong in (-100, 7):
        targets[0, 1] = wrong
        assert linear_nll(hidden, head, targets).isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("layout", ["rows", "transposed", "columns"])
def test_operators_are_what_they_say_to_the_compiler(layout):
    hidden, head, targets = problem(1 if layout == "columns" else 2, 3, transposed=layout == "transposed")
    if layout == "columns":
        hidden = hidden.detach().mT.contiguous().mT.requires_grad_()
    _, lse = (x.detach() for x in ops._linear_nll(hidden, head, targets))
    looked_at = ["test_schema", "test_faketensor"]
    # Tracing is slow, and the layout is nothing to it.
    looked_at += ["test_autograd_registration", "test_aot_dispatch_dynamic"] if layout == "rows" else []
    torch.library.opcheck(ops._linear_nll, (hidden, head, targets), test_utils=looked_at)
    saved = (weights_of(lse), hidden.detach(), head.detach(), targets, lse)
    torch.library.opcheck(ops._linear_nll_backward, saved, test_utils=looked_at)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_either_operand_may_be_frozen(tile, frozen):
    results = []
    for call in (linear_nll, token_nll):
        operands = dict(zip(("hidden", "head", "targets"), problem(2, 6), strict=True))
        operands[frozen] = operands[frozen].detach()
        leaf = operands["head" if frozen == "hidden" else "hidden"]
        losses = call(*operands.values())
        results.append(torch.autograd.grad((losses * weights_of(losses)).sum(), leaf))
    assert_all_close(*results)


def sweeps(hidden, head, targets):
    """Every function that goes over the tiles, by name, outside of the operators, which hide their insides from a counter."""
    detached = (hidden.detach(), head.detach())
    _, lse = ops._linear_nll(*detached, targets)
    tangent, cotangent = torch.ones_like(hidden), torch.ones_like(lse)
    operands = (*detached, targets, tangent, cotangent, lse)
    return operands, {
        "losses": lambda: ops._linear_nll._init_fn(*detached, targets),
        "backward": lambda: ops._linear_nll_backward._init_fn(cotangent, *detached, targets, lse),
        "with gradient": lambda: nll_with_gradient(*detached, targets, 1.0),
        "adjoint": lambda: adjoint_of(detached[0], tangent, detached[1], targets, cotangent, 1.0),
        "adjoint alone": lambda: adjoint_of(detached[0], None, detached[1], targets, cotangent, 1.0),
    }


def assert_peaks_are_those_of_a_tile(inputs, tile_bytes):
    hidden, head, _ = inputs
    # Gradients of hidden, tangent and head, and the sums of a piece. No second matrix of the head's size.
    results = (5 * hidden.numel() + head.numel()) * 4
    operands, calls = sweeps(*inputs)
    for name, call in calls.items():
        with LiveBytes(*operands) as live:
            call()
        assert live.peak < MAX_MATRICES * tile_bytes + results, name


@pytest.mark.parametrize("columns", [500, 50])
def test_memory_is_that_of_a_tile_whatever_the_number_of_tokens(monkeypatch, columns):
    tokens = 4000 // columns
    set_tile(monkeypatch, tokens, columns)
    inputs = problem(2, 256, vocab=500, dtype=torch.float32)
    tile_bytes, all_bytes = tokens * columns * 4, 2 * 256 * 500 * 4
    assert MAX_MATRICES * tile_bytes < all_bytes / 10
    assert_peaks_are_those_of_a_tile(inputs, tile_bytes)


def test_memory_is_that_of_a_tile_at_a_vocabulary_of_gemma():
    tokens, columns = logit_tiles.tile_shape(GEMMA_VOCAB, "cpu")
    inputs = problem(1, 40, GEMMA_VOCAB, 1, dtype=torch.float32)
    assert tokens > 40
    assert MAX_MATRICES * columns < GEMMA_VOCAB / 20
    assert_peaks_are_those_of_a_tile(inputs, 40 * columns * 4)


@pytest.mark.parametrize("vocab", [1, 40, 2048, 2049, 151_936, GEMMA_VOCAB, 1 << 27])
def test_on_a_cpu_a_tile_has_512_tokens_or_more_and_4_mib_in_float32_at_any_vocabulary(vocab):
    tokens, columns = logit_tiles.tile_shape(vocab, "cpu")
    assert tokens >= 512
    assert tokens * columns * 4 <= 4 << 20
    assert columns in (vocab, 2048)


def test_off_the_cpu_a_tile_has_whole_rows_of_256_mib_in_float32_and_never_less_than_a_token():
    for vocab, tokens in ((152_064, 441), (GEMMA_VOCAB, 256), (1 << 27, 1)):
        assert logit_tiles.tile_shape(vocab, "cuda") == (tokens, vocab)


def products(call):
    """Matrix products, in those of all tokens with the whole head."""
    hidden, head, targets = problem(1, 8, vocab=40, width=4)
    with FlopCounterMode(display=False) as counter:
        call(hidden.detach(), head.detach(), targets)
    return counter.get_total_flops() / (2 * hidden.numel() * head.shape[0])


@pytest.mark.parametrize("columns, again", [(40, 0), (10, 3 / 4), (1, 39 / 40)])
def test_no_product_is_made_twice_except_where_the_adjoint_must_know_all_columns_first(monkeypatch, columns, again):
    set_tile(monkeypatch, 4, columns)
    cotangent = torch.ones(1, 8, dtype=torch.float64)

    def adjoint(hidden, tangent, head, targets, lse=None):
        nll_adjoint(hidden, tangent, head, targets, cotangent, 1.0, torch.zeros_like(head), lse)

    assert products(ops._linear_nll._init_fn) == 1
    assert products(lambda h, w, t: nll_with_gradient(h, w, t, 1.0)) == 2
    assert products(lambda h, w, t: adjoint(h, None, w, t, cotangent)) == 3
    assert products(lambda h, w, t: adjoint(h, None, w, t)) == 3 + again
    assert products(lambda h, w, t: adjoint(h, h, w, t)) == 6 + again


def test_no_logits_outlive_the_forward():
    hidden, head, targets = problem(2, 32, vocab=500, dtype=torch.float32)
    with LiveBytes(hidden, head, targets) as live:
        losses = linear_nll(hidden, head, targets)
        kept = live.now()
    assert losses.requires_grad
    assert kept <= 2 * losses.numel() * losses.element_size()


def test_float32_is_as_good_at_a_vocabulary_of_gemma_as_at_a_small_one():
    hidden, head, targets = problem(1, 3, GEMMA_VOCAB, 16, dtype=torch.float32)
    head = (head.detach() / 4).requires_grad_()  # logits of size one, as in a trained model
    tangent, cotangent = torch.randn_like(hidden), torch.tensor([[-1.0, 0.5, 2.0]])
    wide_hidden, wide_head, wide_tangent = (x.detach().double().requires_grad_() for x in (hidden, head, tangent))
    losses = token_nll(wide_hidden, wide_head, targets)
    expected = adjoint_by_autograd(wide_hidden, wide_tangent, wide_head, targets, cotangent.double(), 0.5)
    gradient, first_order = (
        torch.autograd.grad((c * losses).sum(), [wide_hidden, wide_head], retain_graph=True)
        for c in (0.5, cotangent.double())
    )
    ours = linear_nll(hidden, head, targets)
    swept = nll_with_gradient(hidden, head, targets, 0.5)
    assert_close_in_norm([ours.detach(), swept[0]], 2 * [losses.detach()], LARGE_VOCAB_LOSS)
    got = torch.autograd.grad((cotangent * ours).sum(), [hidden, head])
    assert_close_in_norm([*got, swept[1]], [*first_order, gradient[0]], LARGE_VOCAB_NORM)
    assert_close_in_norm(adjoint_of(hidden, tangent, head, targets, cotangent, 0.5), expected, LARGE_VOCAB_NORM)


@pytest.mark.parametrize("call", [token_nll, linear_nll])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_float32(call, dtype):
    hidden, head, targets = problem(1, 4, dtype=dtype)
    losses = call(hidden, head, targets)
    assert losses.dtype == torch.float32
    # The plain twin rounds the logits to their operands' dtype; the operator does not.
    exact = torch.nn.functional.linear(hidden.float(), head.float())
    logits = torch.nn.functional.linear(hidden, head).float() if call is token_nll else exact
    torch.testing.assert_close(losses, -torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_statistics_in_float32_and_gradients_in_its_own_dtype(tile, dtype):
    hidden, head, targets = problem(2, 9, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]
    tangent = torch.randn_like(hidden)
    got = losses_and_gradients(linear_nll, hidden, head, targets)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    assert_close_in_norm(got, losses_and_gradients(token_nll, *wide, targets), HALF_NORM[dtype])
    nll, gradient = nll_with_gradient(hidden, head, targets, 0.5)
    assert (nll.dtype, gradient.dtype) == (torch.float32, dtype)
    cotangent = weights_of(nll)
    adjoint = adjoint_of(hidden, tangent, head, targets, cotangent, 0.5)
    assert [x.dtype for x in adjoint] == [dtype, dtype, torch.float32]
    wide_tangent = tangent.double().requires_grad_()
    expected = adjoint_by_autograd(wide[0], wide_tangent, wide[1], targets, cotangent.double(), 0.5)
    assert_close_in_norm(adjoint, expected, HALF_NORM[dtype])


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_is_half_precision_operands_and_gradients_of_the_given_dtype(backward_inside):
    hidden, head, targets = problem(2, 6, dtype=torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, head)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_nll(hidden, head, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_inside):
        gradients = torch.autograd.grad((losses * weights_of(losses)).sum(), [hidden, head])
    expected = losses_and_gradients(linear_nll, *half, targets)
    for x, y in zip([losses.detach(), *gradients], expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float())
    torch.testing.assert_close(losses, token_nll(*(x.float() for x in half), targets))


def test_one_sweep_under_autocast_is_that_of_half_precision_operands():
    hidden, head, targets = (x.detach() for x in problem(2, 6, dtype=torch.float32))
    tangent, cotangent = torch.randn_like(hidden), torch.linspace(-1, 2, 12).view(2, 6)
    half_hidden, half_tangent, half_head = (x.bfloat16() for x in (hidden, tangent, head))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [*nll_with_gradient(hidden, head, targets, 0.5)]
        got += adjoint_of(hidden, tangent, head, targets, cotangent, 0.5)
    expected = [*nll_with_gradient(half_hidden, half_head, targets, 0.5)]
    expected += adjoint_of(half_hidden, half_tangent, half_head, targets, cotangent, 0.5)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float())


def test_autocast_leaves_float64_alone():
    inputs = problem(2, 6)
    expected = losses_and_gradients(linear_nll, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = losses_and_gradients(linear_nll, *inputs)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
