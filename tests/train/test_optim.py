"""The outer optimiser is AdamW with decay on everything that has a gradient, in fixed groups, with state from the start."""

import copy

import pytest
import torch
from helpers.compare import assert_same_tensors, scan
from helpers.tiny import random_decoder, random_tokens, tiny_spec

from ttt_lit.train.optim import (
    OptimConfig,
    build_optimizer,
    clip_gradients,
    group_of,
    is_prime,
    load_moments,
    set_lr,
    zero_state,
)

CONFIG = OptimConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, clip_norm=0.5)
RATES = [{"base": 0.0, "prime": 0.0}, {"base": 0.1, "prime": 0.3}, {"base": 0.05, "prime": 0.01}]


class HandWritten:
    """AdamW from its equations, on a plain mapping; a parameter without gradient is left alone in every respect."""

    def __init__(self, weights, config):
        self.weights, self.config = {n: w.clone() for n, w in weights.items()}, config
        self.first = {n: torch.zeros_like(w) for n, w in weights.items()}
        self.second = {n: torch.zeros_like(w) for n, w in weights.items()}
        self.steps = dict.fromkeys(weights, 0)

    def step(self, gradients, rates):
        (a, b), limit = self.config.betas, self.config.clip_norm
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        for name, gradient in gradients.items():
            g = gradient * min(1.0, (limit / (norm + 1e-6)).item()) if limit else gradient
            self.steps[name] += 1
            t, lr = self.steps[name], rates["prime" if "prime" in name else "base"]
            self.first[name] = a * self.first[name] + (1 - a) * g
            self.second[name] = b * self.second[name] + (1 - b) * g * g
            direction = (self.first[name] / (1 - a**t)) / ((self.second[name] / (1 - b**t)).sqrt() + self.config.eps)
            self.weights[name] = self.weights[name] * (1 - lr * self.config.weight_decay) - lr * direction


@pytest.fixture
def decoder():
    return random_decoder(tiny_spec(tied_head=False, qkv_bias=True))


def weights_of(decoder):
    return {name: p.detach().clone() for name, p in decoder.named_parameters()}


def train_step(decoder, optimizer, rates, *, seed, mode="meta", limit=CONFIG.clip_norm):
    optimizer.zero_grad()
    scan(decoder, random_tokens(2, 9, seed=seed), mode=mode).loss.backward()
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    clip_gradients(decoder.parameters(), limit)
    set_lr(optimizer, rates)
    optimizer.step()
    return gradients


@pytest.mark.parametrize("limit", [0.0, 0.05, 1e3])
def test_several_steps_equal_adamw_by_hand(decoder, limit):
    config = OptimConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, clip_norm=limit)
    optimizer, hand = build_optimizer(decoder.named_parameters(), config), HandWritten(weights_of(decoder), config)
    for step, rates in enumerate(RATES):
        hand.step(train_step(decoder, optimizer, rates, seed=step, limit=limit), rates)
        assert_same_tensors(weights_of(decoder), hand.weights, relative=1e-12)


def test_the_defaults_are_those_of_the_paper():
    config = OptimConfig()
    assert (config.betas, config.eps, config.weight_decay, config.clip_norm) == ((0.9, 0.95), 1e-8, 0.1, 1.0)


def test_prime_mlps_and_their_norms_are_one_group_and_all_else_the_other(decoder):
    optimizer = build_optimizer(decoder.named_parameters(), CONFIG)
    names = {p: name for name, p in decoder.named_parameters()}
    groups = {g["name"]: {names[p] for p in g["params"]} for g in optimizer.param_groups}
    prime = {n for n in names.values() if "prime" in n}
    assert {n.split(".", 2)[2] for n in prime} == {
        "pre_prime_layernorm.weight", "prime_mlp.gate_proj.weight", "prime_mlp.up_proj.weight",
        "prime_mlp.down_proj.weight",
    }  # fmt: skip
    assert groups == {"base": set(names.values()) - prime, "prime": prime}


@pytest.mark.parametrize(
    "name, group",
    [
        ("decoder.layers.3.post_prime_layernorm.weight", "prime"),
        ("layers.3.prime_mlp.down_proj.weight", "prime"),
        ("layers.3.self_attn.sink_logits", "sink"),
        ("layers.3.self_attn.q_proj.weight", "base"),
        ("layers.3.mlp.gate_proj.weight", "base"),
    ],
)
def test_a_parameters_group_follows_from_its_name(name, group):
    assert (group_of(name), is_prime(name)) == (group, group == "prime")


def test_learned_sinks_are_a_group_of_their_own(decoder):
    sink = torch.nn.Parameter(torch.zeros(2))
    named = [*decoder.named_parameters(), ("layers.0.self_attn.sink_logits", sink)]
    groups = {g["name"]: g["params"] for g in build_optimizer(named, CONFIG).param_groups}
    assert list(groups) == ["base", "prime", "sink"]
    assert groups["sink"] == [sink]


def test_a_model_without_prime_mlps_has_one_group():
    decoder = random_decoder(tiny_spec(*tiny_spec().layers[:1]))
    assert [g["name"] for g in build_optimizer(decoder.named_parameters(), CONFIG).param_groups] == ["base"]


def test_parameters_without_gradient_neither_move_nor_decay_nor_count(decoder):
    """A stage without prime MLPs leaves them bit-equal to their start, and their first real step is Adam's first."""
    optimizer, hand = build_optimizer(decoder.named_parameters(), CONFIG), HandWritten(weights_of(decoder), CONFIG)
    before = weights_of(decoder)
    for step, rates in enumerate(RATES):
        hand.step(train_step(decoder, optimizer, rates, seed=step, mode="none"), rates)
    after = weights_of(decoder)
    prime = [name for name in before if is_prime(name)]
    assert prime
    for name, parameter in decoder.named_parameters():
        assert torch.equal(before[name], after[name]) is (name in prime), name
        assert (optimizer.state[parameter]["step"] == 0) == (name in prime), name
    hand.step(train_step(decoder, optimizer, RATES[1], seed=7), RATES[1])
    assert_same_tensors(weights_of(decoder), hand.weights, relative=1e-12)


def test_all_state_exists_before_the_first_step(decoder):
    optimizer = build_optimizer(decoder.named_parameters(), CONFIG)
    for p in decoder.parameters():
        assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(not value.any() for value in optimizer.state[p].values())


def test_zeroed_state_is_a_fresh_optimiser_in_the_same_tensors(decoder):
    optimizer = build_optimizer(decoder.named_parameters(), CONFIG)
    for step in range(2):
        train_step(decoder, optimizer, RATES[1], seed=step)
    addresses = [value.data_ptr() for p in decoder.parameters() for value in optimizer.state[p].values()]
    twin = copy.deepcopy(decoder)
    fresh = build_optimizer(twin.named_parameters(), CONFIG)
    zero_state(optimizer)
    assert addresses == [value.data_ptr() for p in decoder.parameters() for value in optimizer.state[p].values()]
    for step, rates in enumerate(RATES):
        for model, opt in ((decoder, optimizer), (twin, fresh)):
            train_step(model, opt, rates, seed=10 + step)
        assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), twin.parameters(), strict=True))


def test_loaded_moments_continue_as_if_never_interrupted(decoder):
    optimizer = build_optimizer(decoder.named_parameters(), CONFIG)
    train_step(decoder, optimizer, RATES[1], seed=0)
    saved = {f"{n}.{part}": v.clone() for n, p in decoder.named_parameters() for part, v in optimizer.state[p].items()}
    twin = copy.deepcopy(decoder)
    resumed = build_optimizer(twin.named_parameters(), CONFIG)
    load_moments(resumed, twin.named_parameters(), saved)
    for model, opt in ((decoder, optimizer), (twin, resumed)):
        train_step(model, opt, RATES[2], seed=1)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("limit, scale", [(0.0, 1.0), (100.0, 1.0), (13.0, 1.0), (6.5, 0.5), (1.3, 0.1)])
def test_clipping_returns_the_norm_before_and_scales_to_the_limit(limit, scale):
    parameters = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    assert clip_gradients(parameters, limit).item() == pytest.approx(13.0)
    assert parameters[0].grad.tolist() == pytest.approx([3 * scale, 4 * scale], rel=1e-5)
    assert parameters[1].grad.item() == pytest.approx(12 * scale, rel=1e-5)
    assert parameters[2].grad is None


def test_a_gradient_that_is_not_finite_is_reported_as_such():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1.0, float("nan")])
    assert clip_gradients([p], 1.0).isnan()


@pytest.mark.parametrize(
    "wrong", [{"eps": 0.0}, {"weight_decay": -0.1}, {"clip_norm": -1.0}, {"clip_norm": float("nan")}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="optim: got .* expected eps > 0"):
        OptimConfig(**wrong)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (-0.1, 0.9), (0.9, 1.0)])
def test_impossible_betas_are_refused_before_training(decoder, betas):
    with pytest.raises(ValueError, match="(?i)beta"):
        build_optimizer(decoder.named_parameters(), OptimConfig(betas=betas))
