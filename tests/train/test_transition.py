"""Which transitions must not change the loss, that they do not, and that one which breaks its promise is caught."""

import math

import pytest
import torch
from helpers.tiny import decoder_of, random_decoder, random_state, random_tokens, tiny_spec, ttt_layer
from hypothesis import given, settings
from hypothesis import strategies as st

import ttt_lit.train.transition as transition
from ttt_lit.convert.fast_mlp import TTTConfig, prime_state, with_prime
from ttt_lit.convert.windowed import windowed
from ttt_lit.model.spec import LayerSpec, PrimeSpec
from ttt_lit.train.transition import TOLERANCE, TransitionProof, prove_transition, still
from ttt_lit.ttt.model import TTTModel

CONTEXT = 12
DENSE = tiny_spec(LayerSpec(rope_base=100.0), LayerSpec(rope_base=100.0))


def run_model(init="copy", *, seed=0):
    """A dense model with the prime MLPs that the run will use later, as at the start of a run, in float32."""
    spec = with_prime(DENSE, TTTConfig(prime_init=init))
    state = random_state(DENSE, seed=seed, dtype=torch.float32)
    return TTTModel(decoder_of(spec, state | prime_state(DENSE, spec, state, init=init, seed=seed)))


def prove(model, before, after, *, context=CONTEXT):
    return prove_transition(model, random_tokens(2, context + 1), before=before, after=after, piece=4)


def test_the_tolerance_is_the_promised_one():
    assert TOLERANCE == 1e-5


@settings(max_examples=15)
@given(st.sampled_from(["copy", "random"]), st.integers(CONTEXT, 40), st.integers(0, 10**6))
def test_dense_to_window_to_ttt_preserves_the_loss(init, window, seed):
    model = run_model(init, seed=seed)
    spec = model.decoder.spec
    narrow = windowed(spec, window)
    for before, after in [((spec, "none"), (narrow, "none")), ((narrow, "none"), (narrow, "meta"))]:
        proof = prove(model, before, after)
        assert proof.preserves
        assert proof.holds
        assert abs(proof.jump) <= 1e-5
    assert model.decoder.spec == narrow


def test_a_window_below_the_context_is_not_claimed_and_its_jump_is_reported():
    model = run_model()
    spec = model.decoder.spec
    proof = prove(model, (spec, "none"), (windowed(spec, 3), "none"))
    assert not proof.preserves
    assert proof.holds
    assert abs(proof.jump) > 1e-3
    assert proof.jump == proof.after - proof.before
    assert proof.changed == ("queries see other keys",)


def test_the_next_stages_context_decides_whether_a_window_preserves():
    model = run_model()
    spec, narrow = model.decoder.spec, windowed(model.decoder.spec, 8)
    assert prove(model, (spec, "none"), (narrow, "none"), context=8).preserves
    assert not prove(model, (spec, "none"), (narrow, "none"), context=12).preserves


def test_the_words_say_what_changes_and_how_far_the_loss_jumps():
    model = run_model("paper")
    spec, narrow = model.decoder.spec, windowed(model.decoder.spec, 3)
    both = prove(model, (spec, "none"), (narrow, "meta"))
    assert both.changed == ("queries see other keys", "prime MLPs add to the stream")
    jump = f"a jump of {both.jump:+.4f} nats per token"
    what = "not function-preserving, queries see other keys and prime MLPs add to the stream"
    losses = f"loss on a fixed batch of {CONTEXT} tokens {both.before:.6f} before, {both.after:.6f} after"
    assert both.describe(CONTEXT) == f"{losses} ({what}: {jump})"
    assert prove(model, (spec, "none"), (spec, "none")).describe(CONTEXT).endswith("after (unchanged, +0.00e+00)")


def test_sinks_that_come_or_go_are_a_jump_that_is_reported():
    model = run_model()
    spec = model.decoder.spec
    narrow, sinks = windowed(spec, 3), windowed(spec, 3, sink_tokens=2)
    for before, after in [((spec, "none"), (sinks, "none")), ((sinks, "none"), (narrow, "meta"))]:
        proof = prove(model, before, after)
        assert not proof.preserves
        assert proof.holds
        assert abs(proof.jump) > 1e-3
    covered = prove(model, (spec, "none"), (windowed(spec, 3, sink_tokens=CONTEXT - 3), "none"))
    assert covered.preserves
    assert covered.holds


def test_layers_that_begin_to_learn_while_reading_are_no_jump():
    """B2 updates some TTT layers, C all of them: until the first update nothing is different."""
    model = TTTModel(random_decoder(tiny_spec(ttt_layer(), LayerSpec(), ttt_layer()), dtype=torch.float32))
    spec = model.decoder.spec
    proof = prove(model, (spec.updating_only([2]), "meta"), (spec, "meta"))
    assert proof.preserves
    assert proof.holds


def test_the_same_stage_again_preserves_also_with_trained_prime_mlps():
    model = TTTModel(random_decoder(tiny_spec(), dtype=torch.float32))
    spec = model.decoder.spec
    proof = prove(model, (spec, "meta"), (spec, "static"))
    assert proof.preserves
    assert proof.holds


@pytest.mark.parametrize("modes", [("none", "meta"), ("static", "none"), ("none", "first_order")])
def test_switching_trained_prime_mlps_on_or_off_is_not_claimed_to_preserve(modes):
    model = TTTModel(random_decoder(tiny_spec(), dtype=torch.float32))
    spec = model.decoder.spec
    proof = prove(model, (spec, modes[0]), (spec, modes[1]))
    assert not proof.preserves
    assert abs(proof.jump) > 1e-3


def test_the_papers_start_is_not_claimed_to_preserve():
    model = run_model("paper")
    proof = prove(model, (model.decoder.spec, "none"), (model.decoder.spec, "meta"))
    assert not proof.preserves
    assert abs(proof.jump) > 1e-3


def test_a_post_norm_behind_a_zero_down_projection_is_not_trusted():
    """It adds exactly zero now, and 1/sqrt(eps) times the first update: no function-preserving start."""
    spec = tiny_spec(LayerSpec(), ttt_layer(prime=PrimeSpec(intermediate_size=6, post_norm=True)))
    model = TTTModel(random_decoder(spec, dtype=torch.float32))
    with torch.no_grad():
        model.decoder.layers[1].prime_mlp.down_proj.weight.zero_()
    proof = prove(model, (spec, "none"), (spec, "meta"))
    assert proof.jump == 0.0
    assert not proof.preserves


def test_one_prime_mlp_that_speaks_is_enough():
    spec = tiny_spec(ttt_layer(), ttt_layer())
    model = TTTModel(random_decoder(spec, dtype=torch.float32))
    with torch.no_grad():
        model.decoder.layers[0].prime_mlp.down_proj.weight.zero_()
    assert not prove(model, (spec, "none"), (spec, "meta")).preserves


def test_a_conversion_that_breaks_its_promise_does_not_hold(monkeypatch):
    """If the conversion were wrongly taken for silent, the measured loss would say otherwise."""
    model = TTTModel(random_decoder(tiny_spec(), dtype=torch.float32))
    spec = model.decoder.spec
    monkeypatch.setattr(transition, "_prime_is_silent", lambda model: True)
    proof = prove(model, (spec, "none"), (spec, "meta"))
    assert proof.preserves
    assert not proof.holds


def test_a_changed_rope_base_that_keeps_the_windows_does_not_hold():
    """The promise is read off the windows; the measurement covers everything else."""
    other = DENSE.with_layers((LayerSpec(rope_base=10.0), LayerSpec(rope_base=100.0)))
    model = TTTModel(random_decoder(DENSE, dtype=torch.float32))
    proof = prove(model, (DENSE, "none"), (other, "none"))
    assert proof.preserves
    assert not proof.holds


@pytest.mark.parametrize(
    "jump, holds", [(0.0, True), (0.9e-5, True), (-0.9e-5, True), (1.2e-5, False), (-1.2e-5, False)]
)
def test_equal_means_to_1e_5(jump, holds):
    assert TransitionProof(before=2.0, after=2.0 + jump, preserves=True).holds is holds
    assert TransitionProof(before=2.0, after=2.0 + jump, preserves=False).holds


@pytest.mark.parametrize("before, after", [(math.nan, 1.0), (1.0, math.nan), (math.inf, math.inf)])
def test_no_number_is_no_proof(before, after):
    assert not TransitionProof(before=before, after=after, preserves=True).holds


def test_a_proof_leaves_no_gradient_and_no_updated_weight():
    model = run_model()
    spec = model.decoder.spec
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prove(model, (spec, "none"), (spec, "meta"))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "mode, compared", [("none", "none"), ("static", "static"), ("meta", "static"), ("first_order", "static")]
)
def test_networks_are_compared_without_inner_updates(mode, compared):
    assert still(mode) == compared
