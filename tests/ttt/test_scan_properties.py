"""What reading under TTT-E2E promises beside being equal to its twin: who influences whom, and what each mode means."""

import dataclasses

import pytest
import torch
from helpers.compare import ENGINES, RELATIVE, assert_same_tensors, gradients_of, scan
from helpers.tiny import VOCAB, random_decoder, random_state, random_tokens, specs, tiny_spec, ttt_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.model.spec import LayerSpec
from ttt_lit.ttt.model import TTTModel
from ttt_lit.ttt.naive import sequence_nll_naive

MODES = ["none", "static", "first_order", "meta"]
# Sums over another number of rows may be taken in another order; nothing else may differ.
ROUNDING = 1e-12


def read(decoder, tokens, **arguments):
    decoder.zero_grad()
    out = scan(decoder, tokens, **arguments)
    out.loss.backward()
    return out.token_nll.detach(), {name: g.clone() for name, g in gradients_of(decoder).items()}


@settings(max_examples=25)
@given(specs(), st.sampled_from(["meta", "first_order"]), st.sampled_from(sorted(ENGINES)), st.integers(0, 10**6))
def test_inner_rate_zero_is_static_in_losses_and_gradients(spec, mode, engine, seed):
    decoder, tokens = random_decoder(spec, seed=seed), random_tokens(2, 13, seed=seed)
    losses, gradients = read(decoder, tokens, mode=mode, inner_lr=0.0, engine=ENGINES[engine])
    static, static_gradients = read(decoder, tokens, mode="static")
    torch.testing.assert_close(losses, static, rtol=RELATIVE, atol=RELATIVE)
    assert_same_tensors(gradients, static_gradients)


@settings(max_examples=25)
@given(specs(), st.sampled_from(MODES), st.sampled_from([0.0, 0.1]), st.integers(0, 10**6))
def test_sequences_of_a_batch_do_not_influence_one_another(spec, mode, clip, seed):
    decoder, tokens = random_decoder(spec, seed=seed), random_tokens(3, 9, seed=seed)
    together = scan(decoder, tokens, mode=mode, clip=clip)
    for row in range(3):
        alone = scan(decoder, tokens[row : row + 1], mode=mode, clip=clip)
        torch.testing.assert_close(together.token_nll[row], alone.token_nll[0], rtol=0, atol=ROUNDING)
        torch.testing.assert_close(together.update_norms[:, row], alone.update_norms[:, 0], rtol=0, atol=ROUNDING)


@settings(max_examples=40)
@given(specs(), st.sampled_from(MODES), st.integers(0, 12), st.integers(1, VOCAB - 1), st.integers(0, 10**6))
def test_changing_a_token_moves_no_loss_before_it(spec, mode, changed, shift, seed):
    """Token t is the target of position t - 1, whose loss may move; nothing before that may, not through fast weights either."""
    decoder, tokens = random_decoder(spec, seed=seed), random_tokens(1, 13, seed=seed)
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + shift) % VOCAB
    with torch.no_grad():
        before, after = (scan(decoder, t, mode=mode, chunk=3).token_nll[0] for t in (tokens, other))
    untouched = max(0, changed - 1)
    assert torch.equal(before[:untouched], after[:untouched])


def test_a_token_moves_losses_of_later_chunks_only_through_fast_weights():
    """With a window of one nothing else connects positions, so the claim of causality above is about something."""
    decoder = random_decoder(tiny_spec(LayerSpec(window=1), ttt_layer(window=1)))
    tokens = random_tokens(1, 13)
    other = tokens.clone()
    other[0, 1] = (other[0, 1] + 1) % VOCAB
    for mode, reaches in {"static": False, "meta": True}.items():
        before, after = (scan(decoder, t, mode=mode).token_nll[0].detach() for t in (tokens, other))
        assert torch.equal(before[2:4], after[2:4])  # within the chunk: scored before its own update
        assert (not torch.equal(before[4:], after[4:])) is reaches


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sinks, reaches", [(0, False), (1, False), (2, True), (5, True)])
def test_a_sink_is_seen_from_every_later_chunk(mode, sinks, reaches):
    """Windows of one, nothing updated: the second token moves the losses of a chunk far behind it exactly if it is a sink."""
    layers = (ttt_layer(window=1), ttt_layer(window=1, sink_tokens=sinks))
    decoder, tokens = random_decoder(tiny_spec(*layers)), random_tokens(1, 17)
    other = tokens.clone()
    other[0, 1] = (other[0, 1] + 1) % VOCAB
    with torch.no_grad():
        before, after = (scan(decoder, t, mode=mode, inner_lr=0.0).token_nll[0, 8:] for t in (tokens, other))
    assert (before != after).all() if reaches else torch.equal(before, after)


@settings(max_examples=20)
@given(specs(), st.sampled_from(MODES), st.integers(1, 9), st.sampled_from(sorted(ENGINES)), st.integers(0, 10**6))
def test_sinks_of_which_a_window_hides_none_change_nothing(spec, mode, sinks, engine, seed):
    wide, with_sinks = (
        spec.with_layers(tuple(dataclasses.replace(x, window=w, sink_tokens=s) for x in spec.layers))
        for w, s in ((12, 0), (12 - sinks, sinks))
    )
    tokens = random_tokens(2, 13, seed=seed)
    losses, gradients = read(random_decoder(wide, seed=seed), tokens, mode=mode, engine=ENGINES[engine])
    same_losses, same_gradients = read(random_decoder(with_sinks, seed=seed), tokens, mode=mode, engine=ENGINES[engine])
    torch.testing.assert_close(same_losses, losses, rtol=RELATIVE, atol=RELATIVE)
    assert_same_tensors(same_gradients, gradients)


def test_each_chunk_is_scored_before_its_own_update():
    decoder, tokens = random_decoder(tiny_spec()), random_tokens(2, 13)
    learning, static = (scan(decoder, tokens, mode=mode).token_nll for mode in ("meta", "static"))
    torch.testing.assert_close(learning[:, :4], static[:, :4], rtol=0, atol=ROUNDING)
    assert (learning[:, 4:] - static[:, 4:]).abs().max() > 1e-3


def test_meta_gradient_is_not_the_first_order_gradient():
    """A detached update would leave every loss as it is and change every gradient."""
    decoder, tokens = random_decoder(tiny_spec()), random_tokens(2, 13)
    losses, exact = read(decoder, tokens, mode="meta")
    same_losses, first_order = read(decoder, tokens, mode="first_order")
    torch.testing.assert_close(losses, same_losses, rtol=0, atol=ROUNDING)
    for name in ("layers.1.prime_mlp.down_proj.weight", "layers.0.mlp.gate_proj.weight", "embed_tokens.weight"):
        difference = torch.linalg.vector_norm(exact[name] - first_order[name])
        assert difference > 0.05 * torch.linalg.vector_norm(exact[name]), name


def test_meta_gradient_equals_finite_differences():
    """Independent of any twin: the derivative of the loss along a random direction of all weights."""
    decoder, tokens = random_decoder(tiny_spec()), random_tokens(1, 13)
    _, gradients = read(decoder, tokens)
    direction = random_state(decoder.spec, seed=9)
    step, losses = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            moved = random_decoder(decoder.spec)
            for name, p in moved.named_parameters():
                p += sign * step * direction[name]
            losses.append(scan(moved, tokens).loss)
    slope = (losses[0] - losses[1]) / (2 * step)
    expected = sum((gradients[name] * direction[name]).sum() for name in direction)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)


@settings(max_examples=20)
@given(specs(), st.sampled_from(MODES), st.integers(0, 10**6))
def test_evaluation_gives_the_same_losses_and_leaves_no_graph(spec, mode, seed):
    decoder, tokens = random_decoder(spec, seed=seed), random_tokens(2, 9, seed=seed)
    trained = scan(decoder, tokens, mode=mode)
    with torch.no_grad():
        read_only = scan(decoder, tokens, mode=mode)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(read_only.token_nll, trained.token_nll.detach(), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(read_only.update_norms, trained.update_norms.detach(), rtol=0, atol=ROUNDING)
    assert trained.token_nll.requires_grad
    assert not read_only.token_nll.requires_grad
    assert not read_only.update_norms.requires_grad
    assert all(p.grad is None for p in decoder.parameters())


@pytest.mark.parametrize("mode", ["meta", "first_order"])
def test_evaluation_works_under_inference_of_frozen_weights(mode):
    """Nothing asks for gradients of the parameters: the inner loop makes its own leaves."""
    decoder, tokens = random_decoder(tiny_spec()), random_tokens(1, 9)
    expected = scan(decoder, tokens, mode=mode).token_nll.detach()
    decoder.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(scan(decoder, tokens, mode=mode).token_nll, expected, rtol=0, atol=ROUNDING)


def test_inference_mode_is_refused_with_what_to_use_instead():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad\(\) instead"):
        scan(random_decoder(tiny_spec()), random_tokens(1, 9))


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_kept_and_what_is_computed_again_changes_nothing(name):
    """Up to the rounding of sums that are taken in another order, and of fast weights that are rebuilt."""
    layers = (
        LayerSpec(window=3),
        LayerSpec(),
        ttt_layer(window=5),
        ttt_layer(window=7),
        LayerSpec(window=4, sink_tokens=2),
    )
    decoder, tokens = random_decoder(tiny_spec(*layers)), random_tokens(2, 29)
    for mode in MODES:
        kept_losses, kept = read(decoder, tokens, mode=mode)
        losses, gradients = read(decoder, tokens, mode=mode, engine=ENGINES[name])
        torch.testing.assert_close(losses, kept_losses, rtol=1e-13, atol=1e-13)
        assert_same_tensors(gradients, kept, relative=1e-11, noise=1e-14)


def test_silent_prime_mlps_read_as_if_they_were_not_there():
    spec = tiny_spec()
    decoder, tokens = random_decoder(spec), random_tokens(2, 9)
    with torch.no_grad():
        decoder.layers[1].prime_mlp.down_proj.weight.zero_()
        none, static = (scan(decoder, tokens, mode=mode).token_nll for mode in ("none", "static"))
    assert torch.equal(none, static)


def test_mode_none_gives_prime_mlps_no_gradient_at_all():
    decoder = random_decoder(tiny_spec())
    scan(decoder, random_tokens(1, 9), mode="none").loss.backward()
    without = {name for name, p in decoder.named_parameters() if p.grad is None}
    assert without == {name for name in decoder.spec.parameter_shapes() if "prime" in name}


@pytest.mark.parametrize("fast", ["prime", "mlp"])
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_a_zero_inner_gradient_has_a_finite_outer_gradient(fast, engine):
    """The square root in a norm has an infinite slope at zero, and 0 · ∞ is NaN."""
    spec = tiny_spec(LayerSpec(), ttt_layer(window=5, fast=fast))
    decoder, tokens = random_decoder(spec), random_tokens(2, 9)
    with torch.no_grad():
        for w in decoder.layers[1].fast_mlp(spec.layers[1]).parameters():
            w.zero_()
    out = scan(decoder, tokens, clip=1.0, engine=engine)
    assert torch.equal(out.update_norms, torch.zeros(1, 2, dtype=torch.float64))
    out.loss.backward()
    for name, gradient in gradients_of(decoder).items():
        assert gradient.isfinite().all(), name
    assert gradients_of(decoder)["embed_tokens.weight"].abs().max() > 0


def test_update_norms_are_lengths_of_the_steps_that_later_chunks_see():
    spec = tiny_spec()
    state, tokens = random_state(spec), random_tokens(2, 13)
    names = [f"layers.1.prime_mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    fast = {name: state[name].clone().requires_grad_() for name in names}
    for row in range(2):
        # The first chunk alone: its gradient at W0 is the first step.
        loss = sequence_nll_naive(
            state | fast, spec, tokens[row, :5], mode="static", chunk=4, inner_lr=0, clip=0
        ).mean()
        length = sum(g.square().sum() for g in torch.autograd.grad(loss, list(fast.values()))).sqrt()
        for clip in (0.0, float(length) / 2):
            out = scan(random_decoder(spec), tokens, inner_lr=0.5, clip=clip)
            assert out.update_norms.shape == (2, 2)
            expected = 0.5 * length if clip == 0 else torch.tensor(0.5 * clip, dtype=torch.float64)
            torch.testing.assert_close(out.update_norms[0, row], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", ["none", "static"])
def test_modes_without_updates_report_none(mode):
    assert scan(random_decoder(tiny_spec()), random_tokens(2, 9), mode=mode).update_norms.shape == (0, 2)


def test_modes_without_updates_read_any_length():
    """Validation of a dense stage may be longer than whole chunks; the chunk is then only the size of a piece of the loss."""
    decoder, tokens = random_decoder(tiny_spec()), random_tokens(2, 12)
    whole, pieces = (scan(decoder, tokens, mode="static", chunk=chunk).token_nll for chunk in (11, 4))
    torch.testing.assert_close(whole, pieces, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("mode", ["meta", "first_order"])
def test_a_length_that_the_chunk_does_not_divide_is_an_error_that_says_so(mode):
    with pytest.raises(ValueError, match="sequence length 9 is not a multiple of the chunk of 4 tokens"):
        scan(random_decoder(tiny_spec()), random_tokens(1, 10), mode=mode)
    with pytest.raises(ValueError, match="chunk of 0 tokens"):
        scan(random_decoder(tiny_spec()), random_tokens(1, 10), mode=mode, chunk=0)


@pytest.mark.parametrize("mode", ["meta", "first_order"])
def test_a_model_without_ttt_layers_cannot_update(mode):
    with pytest.raises(ValueError, match=r"no TTT layers.*set ttt\.layers"):
        scan(random_decoder(tiny_spec(LayerSpec())), random_tokens(1, 9), mode=mode)


def test_an_unknown_mode_is_an_error_that_lists_the_modes():
    with pytest.raises(ValueError, match=r"got 'off', expected one of none, static, meta, first_order"):
        scan(random_decoder(tiny_spec()), random_tokens(1, 9), mode="off")


def test_losses_are_averaged_in_float64_also_for_half_precision():
    decoder, tokens = random_decoder(tiny_spec(), dtype=torch.bfloat16), random_tokens(2, 9)
    out = scan(decoder, tokens)
    assert out.token_nll.dtype == torch.float32
    assert out.loss.dtype == torch.float64
    assert out.loss == out.token_nll.double().mean()


def test_the_module_that_the_trainer_calls_is_the_scan():
    decoder, tokens = random_decoder(tiny_spec()), random_tokens(2, 9)
    out = TTTModel(decoder)(tokens, mode="meta", chunk=4, inner_lr=0.5, clip=1.0)
    assert torch.equal(out.token_nll, scan(decoder, tokens).token_nll)
