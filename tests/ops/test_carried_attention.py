"""Attention over carried and new keys: exact in value and in both orders of derivative, as operators that the compiler may see."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.ops import carried_attention as carried
from ttt_lit.ops import tiled_attention as tiled
from ttt_lit.ops.attention_naive import attention_naive, visible
from ttt_lit.ops.carried_attention import Attended, attend, attend_dual

SCALE = 0.37
# float64: sums in another order, through two derivatives.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# Gradients of second order against float64, by norm: 24, 8 or 11 bits in each of several factors, and in the losses themselves.
ROUNDED_NORM = {torch.float32: 4e-6, torch.bfloat16: 0.06, torch.float16: 0.006}
NO_FORMULA = "no autograd formula"
# (carried keys or None, (window, sinks)): without, with an empty and with a real past; windows that end in the chunk, in the past and
# before it; sinks before the windows, touching them, and more of them than carried keys.
CASES = [
    (None, (None, 0)),
    (None, (2, 0)),
    (None, (1, 1)),
    (0, (2, 0)),
    (3, (None, 0)),
    (3, (1, 0)),
    (3, (2, 0)),
    (3, (5, 0)),
]
CASES += [(3, (50, 0)), (3, (1, 1)), (3, (2, 2)), (3, (1, 4)), (3, (3, 9))]


def random(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def problem(past=3, *, batch=1, heads=2, kv_heads=1, length=3, head_dim=2, seed=0, dtype=torch.float64):
    """Leaves q, k, v, and the carried keys and values where there is a past."""
    shapes = [(batch, heads, length, head_dim)] + 2 * [(batch, kv_heads, length, head_dim)]
    shapes += [] if past is None else 2 * [(batch, kv_heads, past, head_dim)]
    return random(*shapes, seed=seed, dtype=dtype)


def directions(inputs, seed=1):
    return random(*(x.shape for x in inputs[:3]), seed=seed)


def ours(window, sinks=0, known=None):
    """``attend`` as a function of q, k, v and the carried keys, if any."""

    def call(q, k, v, *past):
        return attend(
            q, k, v, past or None, scale=SCALE, window=window, sink_tokens=sinks, kernel="tiled", known=known
        ).output

    return call


def naive(window, sinks=0):
    def call(q, k, v, *past):
        keys, values = (torch.cat([x, y], dim=2) for x, y in zip(past, (k, v), strict=True)) if past else (k, v)
        return attention_naive(q, keys, values, scale=SCALE, window=window, sink_tokens=sinks)

    return call


def dual(window, sinks=0):
    """``attend_dual`` as a function of q, k, v, their directions and the carried keys, if any."""

    def call(q, k, v, tq, tk, tv, *past):
        reach = {"window": window, "sink_tokens": sinks}
        with torch.no_grad():
            known = attend(q, k, v, past or None, scale=SCALE, **reach, kernel="tiled")
        return attend_dual(q, k, v, past or None, known, (tq, tk, tv), scale=SCALE, **reach, kernel="tiled")

    return call


def naive_dual(window, sinks=0):
    def call(q, k, v, tq, tk, tv, *past):
        return torch.func.jvp(lambda *x: naive(window, sinks)(*x, *past), (q, k, v), (tq, tk, tv))

    return call


def a_loss_of(x):
    """A scalar of which every number and its square matters."""
    return (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() + x.sin().square().sum()


def meta_loss(call, inputs):
    """Reads the output and an inner gradient of q, k and v, for which the carried keys are constants."""
    out = call(*inputs)
    inner = torch.autograd.grad(a_loss_of(out), inputs[:3], create_graph=True)
    return a_loss_of(out) + sum(a_loss_of(g) for g in inner)


def assert_all_close(got, expected):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


@st.composite
def problems(draw):
    """(inputs, (window, sinks)): any past, grouped heads, windows and sinks below, at and above the length."""
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2)]))
    inputs = problem(
        draw(st.one_of(st.none(), st.integers(0, 6))),
        batch=draw(st.integers(1, 2)),
        heads=heads,
        kv_heads=kv_heads,
        length=draw(st.integers(1, 6)),
        head_dim=draw(st.sampled_from([1, 3])),
        seed=draw(st.integers(0, 10**6)),
    )
    return inputs, (draw(st.one_of(st.none(), st.integers(1, 13))), draw(st.sampled_from([0, 0, 1, 2, 4, 12])))


@settings(max_examples=60)
@given(problem=problems())
def test_output_and_gradients_equal_the_naive_twin(problem):
    inputs, seen = problem
    out, expected = ours(*seen)(*inputs), naive(*seen)(*inputs)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert_all_close(*(torch.autograd.grad(a_loss_of(x), inputs) for x in (out, expected)))


@settings(max_examples=60)
@given(problem=problems())
def test_gradients_through_an_inner_gradient_equal_the_naive_twin(problem):
    inputs, seen = problem
    losses = [meta_loss(call(*seen), inputs) for call in (ours, naive)]
    assert_all_close([losses[0].detach()], [losses[1].detach()])
    assert_all_close(*(torch.autograd.grad(loss, inputs) for loss in losses))


@settings(max_examples=60)
@given(problem=problems())
def test_the_dual_and_its_gradients_equal_forward_mode_of_the_naive_twin(problem):
    inputs, seen = problem
    leaves = [*inputs[:3], *directions(inputs), *inputs[3:]]
    got, expected = (call(*seen)(*leaves) for call in (dual, naive_dual))
    assert_all_close(got, expected)
    assert_all_close(*(torch.autograd.grad(sum(map(a_loss_of, pair)), leaves) for pair in (got, expected)))


@pytest.mark.parametrize("past, seen", CASES)
def test_the_log_sum_exp_is_that_of_the_scores_and_has_no_gradient(past, seen):
    q, k, v, *carried_keys = problem(past)
    window, sinks = seen
    result = attend(q, k, v, tuple(carried_keys) or None, scale=SCALE, window=window, sink_tokens=sinks, kernel="tiled")
    keys = torch.cat([*carried_keys[:1], k], dim=2)
    scores = torch.einsum("bhqd,bkd->bhqk", q, keys[:, 0]) * SCALE
    scores = scores.masked_fill(~visible(q.shape[2], keys.shape[2], window, sink_tokens=sinks), -math.inf)
    torch.testing.assert_close(result.lse, scores.logsumexp(dim=-1).detach(), **CLOSE)
    assert result.output.requires_grad
    assert not result.lse.requires_grad


@pytest.mark.parametrize("past, seen", CASES)
def test_attend_passes_gradcheck_and_gradgradcheck(past, seen):
    inputs = problem(past)
    assert torch.autograd.gradcheck(ours(*seen), inputs)
    assert torch.autograd.gradgradcheck(ours(*seen), inputs)


@pytest.mark.parametrize("past, seen", CASES)
def test_attend_dual_passes_gradcheck(past, seen):
    inputs = problem(past)
    assert torch.autograd.gradcheck(dual(*seen), [*inputs[:3], *directions(inputs), *inputs[3:]])


def test_heads_of_their_own_and_wider_groups_pass_gradchecks_too():
    for heads, kv_heads in [(2, 2), (3, 1)]:
        inputs = problem(heads=heads, kv_heads=kv_heads, length=2)
        assert torch.autograd.gradgradcheck(ours(3), inputs)
        assert torch.autograd.gradcheck(dual(3), [*inputs[:3], *directions(inputs), *inputs[3:]])


@pytest.mark.parametrize("past, seen", CASES)
def test_the_dual_is_the_derivative_of_attend(past, seen):
    """Along a direction: the gradient of ⟨u, transposed derivative⟩, which is linear in the cotangent u, in u."""
    inputs = problem(past)
    along = directions(inputs)
    out = ours(*seen)(*inputs)
    u = torch.zeros_like(out, requires_grad=True)
    transposed = torch.autograd.grad(out, inputs[:3], u, create_graph=True)
    (expected,) = torch.autograd.grad(sum((g * t).sum() for g, t in zip(transposed, along, strict=True)), u)
    assert_all_close(dual(*seen)(*inputs[:3], *along, *inputs[3:]), (out, expected))


@pytest.mark.parametrize("which", ["output", "tangent"])
def test_one_result_of_the_dual_may_go_unused(which):
    inputs = problem()
    leaves = [*inputs[:3], *directions(inputs), *inputs[3:]]
    got, expected = (
        torch.autograd.grad(
            a_loss_of(call(3)(*leaves)[which == "tangent"]), leaves, allow_unused=True, materialize_grads=True
        )
        for call in (dual, naive_dual)
    )
    assert_all_close(got, expected)


@pytest.fixture
def num_keys_with_gradient(monkeypatch):
    """How many keys each call of the backward computed gradients for."""
    counts, backward = [], tiled.backward
    monkeypatch.setattr(tiled, "backward", lambda *a: counts.append(a[-1]) or backward(*a))
    return counts


def test_gradients_of_carried_keys_are_computed_only_where_they_are_required(num_keys_with_gradient):
    q, k, v, *past = problem(4, length=3)
    ours(5)(q, k, v, *(x.detach() for x in past)).sum().backward()
    assert num_keys_with_gradient == [3]
    ours(5)(q, k, v, *past).sum().backward()
    assert num_keys_with_gradient == [3, 7]


@settings(max_examples=30)
@given(problem=problems())
def test_a_known_result_has_the_same_value_and_derivatives_of_both_orders(problem):
    inputs, seen = problem
    with torch.no_grad():
        reach = {"window": seen[0], "sink_tokens": seen[1]}
        known = attend(*inputs[:3], tuple(inputs[3:]) or None, scale=SCALE, **reach, kernel="tiled")
    out, again = ours(*seen)(*inputs), ours(*seen, known)(*inputs)
    assert torch.equal(out, again)
    losses = [meta_loss(call, inputs) for call in (ours(*seen), ours(*seen, known))]
    for first, second in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        assert torch.equal(first, second)


def test_a_known_result_is_copied_and_not_computed_again(monkeypatch):
    q, k, v, *past = problem()
    known = attend(q, k, v, tuple(past), scale=SCALE, window=2, kernel="tiled")
    monkeypatch.setattr(tiled, "forward", None)
    again = attend(q, k, v, tuple(past), scale=SCALE, window=2, kernel="tiled", known=known)
    for x, y in zip(again, known, strict=True):
        assert torch.equal(x, y)
        assert x.data_ptr() != y.data_ptr()


def test_a_third_derivative_of_attend_raises():
    inputs = problem()
    loss = meta_loss(ours(3), inputs)
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=NO_FORMULA):
        torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)


def test_a_second_derivative_of_the_dual_raises():
    inputs = problem()
    leaves = [*inputs[:3], *directions(inputs), *inputs[3:]]
    out = sum(a_loss_of(x) for x in dual(3)(*leaves))
    gradients = torch.autograd.grad(out, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=NO_FORMULA):
        torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)


def operator_arguments(past, dtype):
    """Operator → arguments, of one problem with leaves that ask for gradients where a gradient is offered."""
    q, k, v, *rest = problem(past, length=4, dtype=dtype)
    past_k, past_v = rest or (None, None)
    tensors, settings = (q, k, v, past_k, past_v), (None, SCALE, 3, 2, "tiled")
    constants = [None if x is None else x.detach() for x in tensors]
    output, lse = (x.detach() for x in carried._attend(*tensors, None, None, *settings))
    tq, tk, tv, do = random(q.shape, k.shape, v.shape, q.shape, dtype=dtype)
    direction = [x.detach() for x in (tq, tk, tv)]
    _, to, mu = carried._attend_dual(*constants, output, lse, *direction, *settings)
    second = (*constants, output, lse, to, mu, *direction, *settings)
    # Laid out as a projection leaves them: what an operator returns may not depend on it.
    known = output.transpose(1, 2).contiguous().transpose(1, 2)
    return [
        (carried._attend, (*tensors, None, None, *settings)),
        (carried._attend, (*tensors, known, lse, *settings)),
        (carried._attend_backward, (do, *tensors, output, lse, *settings, False)),
        (carried._attend_backward, (do, *tensors, output, lse, *settings, True)),
        (carried._attend_dual, (*tensors, output, lse, tq, tk, tv, *settings)),
        (carried._attend_dual, (*tensors, known, lse, tq, tk, tv, *settings)),
        (carried._attend_dual_backward, (do.detach(), do.detach(), *second)),
        (carried._attend_dual_backward, (None, do.detach(), *second)),
    ]


@pytest.mark.parametrize("past", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_are_what_they_say_to_the_compiler(past, dtype):
    for operator, arguments in operator_arguments(past, dtype):
        torch.library.opcheck(operator, arguments, test_utils=["test_schema", "test_faketensor"])


def test_operators_are_traced_as_they_run():
    for operator, arguments in operator_arguments(3, torch.float64):
        torch.library.opcheck(
            operator, arguments, test_utils=["test_autograd_registration", "test_aot_dispatch_dynamic"]
        )


def detached_meta_loss(call, inputs):
    """What second order becomes when the inner gradient is a constant of the outer one."""
    out = call(*inputs)
    inner = torch.autograd.grad(a_loss_of(out), inputs[:3], retain_graph=True)
    # The same value, and none of its gradient.
    return a_loss_of(out) + sum(a_loss_of(g) for g in inner)


@pytest.mark.parametrize("past", [None, 3])
def test_second_order_stays_exact_when_an_inner_gradient_is_compiled(past):
    """A pair of autograd functions would lose the second order here without a word."""
    inputs = problem(past)
    eager = torch.autograd.grad(meta_loss(ours(2), inputs), inputs)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(lambda *x: meta_loss(ours(2), x), backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(compiled(*inputs), inputs)
    assert_all_close(got, eager)
    first_order = torch.autograd.grad(detached_meta_loss(ours(2), inputs), inputs)
    for exact, detached in zip(got, first_order, strict=True):
        assert (exact - detached).abs().max() > 0.01


@pytest.mark.parametrize("past", [None, 3])
def test_a_gradient_of_compiled_attend_can_be_differentiated_or_raises(past):
    inputs = problem(past)
    compiled = torch.compile(ours(2), backend="aot_eager", fullgraph=True)
    out = compiled(*inputs)
    assert_all_close(*(torch.autograd.grad(a_loss_of(x), inputs) for x in (out, ours(2)(*inputs))))
    with pytest.raises(RuntimeError, match="double backward|create_graph=False"):
        torch.autograd.grad(meta_loss(compiled, inputs), inputs)


@pytest.mark.parametrize("past", [None, 3])
def test_the_compiled_dual_has_exact_values_and_gradients(past):
    inputs = problem(past)
    leaves = [*inputs[:3], *directions(inputs), *inputs[3:]]
    got = torch.compile(dual(2), backend="aot_eager", fullgraph=True)(*leaves)
    expected = naive_dual(2)(*leaves)
    assert_all_close(got, expected)
    assert_all_close(*(torch.autograd.grad(sum(map(a_loss_of, pair)), leaves) for pair in (got, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_inputs_and_statistics_are_float32(dtype):
    inputs = problem(5, length=4, head_dim=8, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    result = attend(*inputs[:3], tuple(inputs[3:]), scale=SCALE, window=6, kernel="tiled")
    assert isinstance(result, Attended)
    assert (result.output.dtype, result.lse.dtype) == (dtype, torch.float32)
    along = [x.detach().to(dtype).requires_grad_() for x in directions(inputs)]
    leaves = [*inputs[:3], *along, *inputs[3:]]
    wide_leaves = [x.detach().double().requires_grad_() for x in leaves]
    for got, expected in [
        (torch.autograd.grad(meta_loss(ours(6), inputs), inputs), torch.autograd.grad(meta_loss(naive(6), wide), wide)),
        (
            torch.autograd.grad(sum(x.sum() for x in dual(6)(*leaves)), leaves),
            torch.autograd.grad(sum(x.sum() for x in naive_dual(6)(*wide_leaves)), wide_leaves),
        ),
    ]:
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == dtype
            error = torch.linalg.vector_norm(x.double() - y) / torch.linalg.vector_norm(y)
            assert error < ROUNDED_NORM[dtype]
