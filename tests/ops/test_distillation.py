"""Loss and divergence from a teacher in tiles are those of the whole, in value and gradient, and never hold all logits."""

import pytest
import torch
from helpers.memory import LiveBytes
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.ops import distillation as ops
from ttt_lit.ops import logit_tiles
from ttt_lit.ops.cross_entropy import token_nll
from ttt_lit.ops.distillation import nll_and_kl, token_kl

# float64: sums in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# bfloat16 against float64, by norm: 8 bits in operands and in differences of probabilities.
HALF_NORM = 0.03
# Student's and teacher's logits, and those of the tile before, held while the next are made.
MAX_MATRICES = 3


def problem(batch, length, vocab=7, width=4, teacher_width=6, seed=0, dtype=torch.float64):
    """(hidden, head, targets, teacher's hidden, teacher's head); leaves, but for the targets."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(vocab, (batch, length), generator=generator)
    student = leaf(batch, length, width), leaf(vocab, width)
    return *student, targets, leaf(batch, length, teacher_width), leaf(vocab, teacher_width)


def twins(hidden, head, targets, teacher_hidden, teacher_head):
    return token_nll(hidden, head, targets), token_kl(hidden, head, teacher_hidden, teacher_head)


def results(call, hidden, head, targets, *teacher):
    """Both outputs, and the gradients of a sum of both with weights of which none is like another."""
    nll, kl = call(hidden, head, targets, *teacher)
    weights = torch.linspace(-1, 2, nll.numel(), dtype=nll.dtype).view(nll.shape)
    total = (weights * nll).sum() + ((3 * weights).cos() * kl).sum()
    return [nll.detach(), kl.detach(), *torch.autograd.grad(total, [hidden, head])]


def assert_all_close(got, expected):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def set_tile(patch, tokens, columns):
    patch.setattr(logit_tiles, "tile_shape", lambda vocab_size, device: (tokens, columns))


@pytest.fixture(params=[(1, 1), (4, 3), (1000, 3), (1000, 1000)], ids=lambda shape: "{} x {}".format(*shape))
def tile(request, monkeypatch):
    set_tile(monkeypatch, *request.param)


def test_the_twin_is_the_mean_of_the_log_ratio_under_the_teacher():
    hidden, head, _, teacher_hidden, teacher_head = (t.detach() for t in problem(1, 1))
    p, q = (
        torch.softmax((h @ w.mT).flatten(), 0).tolist() for h, w in ((hidden, head), (teacher_hidden, teacher_head))
    )
    expected = sum(b * torch.tensor(b / a).log().item() for a, b in zip(p, q, strict=True))
    assert token_kl(hidden, head, teacher_hidden, teacher_head).item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=60)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 11, 9, 5, 6))),
    seed=st.integers(0, 10**6),
    tile=st.tuples(st.integers(1, 34), st.integers(1, 10)),
)
def test_losses_divergences_and_gradients_equal_the_whole_in_tiles_of_any_size(shape, seed, tile):
    inputs = problem(*shape, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        set_tile(patch, *tile)
        got = results(nll_and_kl, *inputs)
    assert_all_close(got, results(twins, *inputs))
    assert got[1].min() > -1e-12


@pytest.mark.parametrize("which", [0, 1], ids=["loss alone", "divergence alone"])
def test_each_output_alone_passes_gradcheck(tile, which):
    hidden, head, targets, *teacher = problem(2, 3, vocab=5, width=2)
    teacher = [t.detach() for t in teacher]
    assert torch.autograd.gradcheck(lambda h, w: nll_and_kl(h, w, targets, *teacher)[which], (hidden, head))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient_of_it(tile, dtype):
    hidden, head, targets, *_ = problem(2, 5, dtype=dtype)
    kl = nll_and_kl(hidden, head, targets, hidden.detach(), head.detach())[1]
    assert torch.equal(kl, torch.zeros_like(kl))
    for gradient in torch.autograd.grad(kl.sum(), [hidden, head]):
        assert not gradient.any()


def test_the_teacher_is_a_constant(tile):
    inputs = problem(2, 3)
    assert torch.autograd.grad(nll_and_kl(*inputs)[1].sum(), inputs[3:], allow_unused=True) == (None, None)


def test_bfloat16_has_statistics_in_float32_and_gradients_in_its_own_dtype(tile):
    hidden, head, targets, *teacher = problem(2, 9, dtype=torch.bfloat16)
    got = results(nll_and_kl, hidden, head, targets, *teacher)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    wide, wide_teacher = ([x.detach().double().requires_grad_() for x in pair] for pair in ((hidden, head), teacher))
    for x, y in zip(got, results(twins, *wide, targets, *wide_teacher), strict=True):
        assert torch.linalg.vector_norm(x.double() - y) < HALF_NORM * torch.linalg.vector_norm(y)


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_half_precision_operands_and_gradients_of_the_given_dtype(teacher_dtype):
    hidden, head, targets, *teacher = problem(2, 6, dtype=torch.float32)
    teacher = [t.detach().to(teacher_dtype) for t in teacher]
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, head)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(nll_and_kl, hidden, head, targets, *teacher)
    expected = results(nll_and_kl, *half, targets, *(t.bfloat16() for t in teacher))
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float())


def test_a_teacher_in_half_precision_is_that_teacher_to_a_student_in_float32():
    hidden, head, targets, *teacher = problem(2, 6, dtype=torch.float32)
    half = [t.detach().bfloat16() for t in teacher]
    got = results(nll_and_kl, hidden, head, targets, *half)
    for x, y in zip(got, results(twins, hidden, head, targets, *(t.float() for t in half)), strict=True):
        torch.testing.assert_close(x, y)


def test_a_second_derivative_raises():
    hidden, head, targets, *teacher = problem(1, 2)
    loss = sum(x.sum() for x in nll_and_kl(hidden, head, targets, *teacher))
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.square().sum(), hidden)


def test_another_vocabulary_is_refused():
    hidden, head, targets, teacher_hidden, teacher_head = problem(1, 2)
    with pytest.raises(ValueError, match=r"the teacher's head has 6 rows and the student's 7; .* one vocabulary"):
        nll_and_kl(hidden, head, targets, teacher_hidden, teacher_head[:6])


def test_operators_are_what_they_say_to_the_compiler():
    inputs = problem(2, 3)
    constants = [t.detach() for t in inputs]
    *_, lse, teacher_lse = ops._nll_and_kl(*constants)
    torch.library.opcheck(ops._nll_and_kl, (*inputs[:3], *constants[3:]))
    saved = (torch.ones_like(lse), torch.ones_like(lse).cos(), *constants, lse, teacher_lse)
    torch.library.opcheck(ops._nll_and_kl_backward, saved)


def test_compiled_it_is_one_graph_and_the_same():
    inputs = problem(2, 5)
    compiled = torch.compile(nll_and_kl, backend="aot_eager", fullgraph=True)
    assert_all_close(results(compiled, *inputs), results(nll_and_kl, *inputs))


def test_memory_is_that_of_a_tile_and_no_logits_outlive_the_forward(monkeypatch):
    set_tile(monkeypatch, 8, 50)
    hidden, head, targets, *teacher = (t.detach() for t in problem(2, 128, vocab=500, dtype=torch.float32))
    tile_bytes, all_bytes = 8 * 50 * 4, 2 * 128 * 500 * 4
    gradients = 4 * (hidden.numel() + head.numel())
    assert MAX_MATRICES * tile_bytes < all_bytes / 50
    outputs, statistics_of_a_piece = 4 * targets.numel() * 4, 20 * 8 * 4
    with LiveBytes(hidden, head, targets, *teacher) as live:
        *_, lse, teacher_lse = ops._nll_and_kl._init_fn(hidden, head, targets, *teacher)
        assert live.now() == outputs
    assert live.peak < MAX_MATRICES * tile_bytes + outputs + statistics_of_a_piece
    cotangents = torch.ones_like(lse), torch.ones_like(lse)
    with LiveBytes(hidden, head, targets, *teacher, lse, teacher_lse, *cotangents) as live:
        ops._nll_and_kl_backward._init_fn(*cotangents, hidden, head, targets, *teacher, lse, teacher_lse)
    assert live.peak < MAX_MATRICES * tile_bytes + gradients + outputs
