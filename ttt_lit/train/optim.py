"""The outer optimiser: AdamW over fixed groups, its state made up front, and gradient clipping that sees every shard.

All groups and all state exist from the first step of a run. Adding a group at a stage transition breaks resume, and a sharded save of
missing state advances Adam's step count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ttt_lit.model.spec import Mode
from ttt_lit.train.parallel import copy_full

Group = Literal["base", "prime", "sink"]
"""``base``: what was imported. The others are what a conversion adds: ``prime``, the prime MLPs and their norms; ``sink``, attention sinks'
logits."""

_ADDED: dict[Group, tuple[str, ...]] = {
    "prime": ("prime_mlp.", "pre_prime_layernorm.", "post_prime_layernorm."),
    "sink": ("self_attn.sink",),
}
"""Group → parts of its parameters' names."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW as in the paper: decay on every parameter, embeddings and norms included."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, times the learning rate."""
    clip_norm: float = 1.0
    """Limit on the global norm of the outer gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        if not (self.eps > 0 and self.weight_decay >= 0 and self.clip_norm >= 0):
            raise ValueError(f"optim: got {self}, expected eps > 0, weight_decay >= 0 and clip_norm >= 0 (0 = none)")


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with a group for each ``Group`` that has parameters, learning rate 0 until a schedule sets it, zero state."""
    groups: dict[Group, list[nn.Parameter]] = {group: [] for group in get_args(Group)}
    for name, parameter in parameters:
        groups[group_of(name)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"name": name, "params": params} for name, params in groups.items() if params],
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    zero_state(optimizer)
    return optimizer


def group_of(name: str) -> Group:
    """The group that a parameter belongs to."""
    return next((group for group, parts in _ADDED.items() if any(part in name for part in parts)), "base")


def is_prime(name: str) -> bool:
    """Whether a parameter belongs to a prime MLP or its norms."""
    return group_of(name) == "prime"


@torch.no_grad()
def zero_state(optimizer: torch.optim.Optimizer) -> None:
    """Fresh AdamW state, in place: moments and step counts zero for every parameter, whether it has had a gradient or not."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            for value in state.values():
                value.zero_()


@torch.no_grad()
def load_moments(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], saved: Mapping[str, Tensor]
) -> None:
    """Copy ``NAME.exp_avg``, ``NAME.exp_avg_sq`` and ``NAME.step`` (full tensors) into the state, sharded or not."""
    for name, parameter in named:
        for part, value in optimizer.state[parameter].items():
            copy_full(value, saved[f"{name}.{part}"])


def learns(name: str, mode: Mode) -> bool:
    """Whether a parameter gets a gradient in this mode."""
    return mode != "none" or not is_prime(name)


def group_names(optimizer: torch.optim.Optimizer) -> list[Group]:
    """The groups that an optimiser has."""
    return [group["name"] for group in optimizer.param_groups]


def set_lr(optimizer: torch.optim.Optimizer, rates: Mapping[Group, float]) -> None:
    """Learning rate per group."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients to global norm ``limit`` if they exceed it (0: never). Returns the norm before, over all shards."""
    with_grad = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None])
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(with_grad, limit, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
