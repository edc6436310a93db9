"""A learned sink, a mass in the softmax's denominator, is exact in value and in every gradient that is offered; the rest raises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.model.attention import sink_mass
from ttt_lit.ops import carried_attention as carried
from ttt_lit.ops.attention import attention
from ttt_lit.ops.attention_naive import attention_naive
from ttt_lit.ops.carried_attention import attend, attend_dual

SCALE = 0.37
# float64: sums in another order, through two derivatives.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def leaves_of(shapes, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def problem(past=3, *, batch=2, heads=2, kv_heads=1, length=3, head_dim=2, seed=0, dtype=torch.float64):
    """Leaves: a mass (Hq,), q, k, v, and the carried keys and values where there is a past."""
    shapes = [(heads,), (batch, heads, length, head_dim)] + 2 * [(batch, kv_heads, length, head_dim)]
    shapes += [] if past is None else 2 * [(batch, kv_heads, past, head_dim)]
    mass, *rest = leaves_of(shapes, seed, dtype)
    return [mass.detach().square().requires_grad_(), *rest]


def ours(reach):
    def call(mass, q, k, v, *past):
        return attend(q, k, v, past or None, scale=SCALE, **reach, sink_mass=mass, kernel="tiled").output

    return call


def naive(reach):
    def call(mass, q, k, v, *past):
        keys, values = (torch.cat([x, y], dim=2) for x, y in zip(past, (k, v), strict=True)) if past else (k, v)
        return attention_naive(q, keys, values, scale=SCALE, **reach, sink_mass=mass)

    return call


def dual(reach):
    def call(mass, q, k, v, tq, tk, tv, *past):
        settings = {"scale": SCALE, **reach, "sink_mass": mass, "kernel": "tiled"}
        with torch.no_grad():
            known = attend(q, k, v, past or None, **settings)
        return attend_dual(q, k, v, past or None, known, (tq, tk, tv), **settings)

    return call


def naive_dual(reach):
    def call(mass, q, k, v, tq, tk, tv, *past):
        return torch.func.jvp(lambda *x: naive(reach)(mass, *x, *past), (q, k, v), (tq, tk, tv))

    return call


def a_loss_of(x):
    """A scalar of which every number and its square matters."""
    return (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() + x.sin().square().sum()


def meta_loss(call, inputs):
    """Reads the output and an inner gradient of q, k and v, for which mass and carried keys are constants."""
    out = call(*inputs)
    inner = torch.autograd.grad(a_loss_of(out), inputs[1:4], create_graph=True)
    return a_loss_of(out) + sum(a_loss_of(g) for g in inner)


def assert_all_close(got, expected):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


@st.composite
def problems(draw):
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
    if draw(st.booleans()):
        inputs[0] = torch.zeros_like(inputs[0], requires_grad=True)
    window = draw(st.one_of(st.none(), st.integers(1, 13)))
    return inputs, {"window": window, "sink_tokens": draw(st.sampled_from([0, 0, 1, 4]))}


@settings(max_examples=60)
@given(problem=problems())
def test_output_and_gradients_equal_the_naive_twin(problem):
    inputs, reach = problem
    out, expected = ours(reach)(*inputs), naive(reach)(*inputs)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert_all_close(*(torch.autograd.grad(a_loss_of(x), inputs) for x in (out, expected)))


@settings(max_examples=60)
@given(problem=problems())
def test_gradients_through_an_inner_gradient_equal_the_naive_twin(problem):
    inputs, reach = problem
    losses = [meta_loss(call(reach), inputs) for call in (ours, naive)]
    assert_all_close([losses[0].detach()], [losses[1].detach()])
    assert_all_close(*(torch.autograd.grad(loss, inputs) for loss in losses))


@settings(max_examples=60)
@given(problem=problems())
def test_the_dual_and_its_gradients_equal_forward_mode_of_the_naive_twin(problem):
    inputs, reach = problem
    leaves = [*inputs[:4], *leaves_of([x.shape for x in inputs[1:4]], 1), *inputs[4:]]
    got, expected = (call(reach)(*leaves) for call in (dual, naive_dual))
    assert_all_close(got, expected)
    assert_all_close(*(torch.autograd.grad(sum(map(a_loss_of, pair)), leaves) for pair in (got, expected)))


@settings(max_examples=30)
@given(problem=problems())
def test_a_mass_of_zero_changes_no_bit_and_has_a_gradient(problem):
    (mass, *inputs), reach = problem
    zero = torch.zeros_like(mass, requires_grad=True)
    without = attend(*inputs[:3], tuple(inputs[3:]) or None, scale=SCALE, **reach, kernel="tiled").output
    with_zero = ours(reach)(zero, *inputs)
    assert torch.equal(with_zero, without)
    gradients, (of_mass, *same) = (
        torch.autograd.grad(a_loss_of(out), leaves) for out, leaves in ((without, inputs), (with_zero, (zero, *inputs)))
    )
    assert all(torch.equal(x, y) for x, y in zip(gradients, same, strict=True))
    assert (of_mass != 0).all()


def test_whole_sequences_have_it_too_with_a_window_and_without():
    mass, *inputs = problem(None, length=70)
    for reach in ({"window": 5, "sink_tokens": 2}, {"window": None}, {"window": 70}):
        assert_all_close([attention(*inputs, scale=SCALE, **reach, sink_mass=mass)], [naive(reach)(mass, *inputs)])


def test_the_parameter_is_a_mass_that_begins_at_zero_with_a_slope():
    parameter = torch.tensor([0.0, 0.5, -0.5, -2.0], dtype=torch.float64, requires_grad=True)
    mass = sink_mass(parameter)
    torch.testing.assert_close(mass, torch.tensor([0.0, 0.5, 0.5, 2.0], dtype=torch.float64).exp() - 1)
    (slope,) = torch.autograd.grad(mass.sum(), parameter)
    expected = torch.tensor([0.0, 0.5, 0.5, 2.0], dtype=torch.float64).exp() * torch.tensor([1, 1, -1, -1])
    torch.testing.assert_close(slope, expected)


def test_an_outer_gradient_through_the_gradient_of_a_sink_raises():
    inputs = problem()
    (inner,) = torch.autograd.grad(a_loss_of(ours({"window": 2})(*inputs)), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of a learned sink is a constant"):
        torch.autograd.grad(inner.sum(), inputs[1])


def test_a_large_mass_and_scores_that_overflow_an_exponential_stay_finite():
    mass, q, k, v = (x.detach() for x in problem(None, dtype=torch.float32))
    for m, factor in ((1e30, 1.0), (0.0, 3000.0), (1e30, 3000.0)):
        inputs = [x.requires_grad_() for x in (torch.full_like(mass, m), q * factor, k, v)]
        out = ours({"window": 2})(*inputs)
        assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), inputs[1:])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mass_keeps_its_dtype_beside_rounded_operands(dtype):
    mass, *rest = problem(5, heads=4, kv_heads=2, length=4, head_dim=8, dtype=dtype)
    mass = mass.detach().float().requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (mass, *rest)]
    reach = {"window": 3, "sink_tokens": 1}
    got, expected = (
        torch.autograd.grad(a_loss_of(call(reach)(*inputs)), inputs)
        for call, inputs in ((ours, [mass, *rest]), (naive, wide))
    )
    assert [x.dtype for x in got] == [torch.float32, *5 * [dtype]]
    for x, y in zip(got, expected, strict=True):
        assert (x.double() - y).norm() < (4e-6 if dtype == torch.float32 else 0.05) * y.norm()


def operator_arguments(past):
    mass, q, k, v, *rest = problem(past, length=4)
    past_k, past_v = rest or (None, None)
    tensors, settings = (q, k, v, past_k, past_v), (SCALE, 3, 2, "tiled")
    constants = [None if x is None else x.detach() for x in tensors]
    output, lse = (x.detach() for x in carried._attend(*tensors, None, None, mass, *settings))
    tq, tk, tv, do = leaves_of([q.shape, k.shape, v.shape, q.shape], 1)
    direction = [x.detach() for x in (tq, tk, tv)]
    _, to, mu = carried._attend_dual(*constants, output, lse, *direction, mass.detach(), *settings)
    second = (*constants, output, lse, to, mu, *direction, mass.detach(), *settings)
    return [
        (carried._attend, (*tensors, None, None, mass, *settings)),
        (carried._attend, (*tensors, output, lse, mass, *settings)),
        (carried._attend_backward, (do, *constants, output, lse, mass.detach(), *settings, True)),
        (carried._attend_dual, (*tensors, output, lse, tq, tk, tv, mass, *settings)),
        (carried._attend_dual_backward, (do.detach(), do.detach(), *second)),
        (carried._attend_dual_backward, (None, do.detach(), *second)),
    ]


@pytest.mark.parametrize("past", [None, 3])
def test_operators_are_what_they_say_to_the_compiler(past):
    tests = ["test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"]
    for operator, arguments in operator_arguments(past):
        # Of the backward, the last asks for a gradient through every result, which is refused.
        most = tests[:-1] if operator is carried._attend_backward else tests
        torch.library.opcheck(operator, arguments, test_utils=most)
