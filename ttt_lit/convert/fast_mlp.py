"""Windowed model → TTT model: prime MLPs for the layers that a policy chooses, so that nothing changes at step 0.

The prime MLP's down-projection starts at zero and has no post-norm, so it adds exactly zero until it is trained. A post-norm there
would multiply the first update by 1/sqrt(eps). The paper's own start (random, with post-norm) is an ablation that does not preserve
the function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ttt_lit.model.spec import ModelSpec, PrimeSpec, last_quarter

PrimeInit = Literal["copy", "random", "paper"]
LayerPolicy = Literal["last_quarter", "global", "global_suffix"]


@dataclass(frozen=True, kw_only=True)
class TTTConfig:
    """Which layers learn while reading, and how their prime MLPs start."""

    layers: LayerPolicy | list[int] = "last_quarter"
    """``last_quarter``: the highest round-half-up(L/4) layers. ``global``: every layer that the checkpoint gives dense attention, in a
    model that also has windowed ones (Gemma-3: 5, 11, 17 and 23 of 26). ``global_suffix``: those of them in the upper half (17 and 23). Or
    a list of layer indices."""
    prime_width: int | None = None
    """Inner width of the prime MLPs; null: the width of the layer's own MLP."""
    prime_init: PrimeInit = "copy"
    """``copy``: gate, up and pre-norm of the layer's own MLP, zero down-projection. ``random``: normal gate and up, zero
    down-projection. ``paper``: all three random and a post-norm, which changes the function at step 0."""


def ttt_layers(spec: ModelSpec, policy: LayerPolicy | list[int]) -> tuple[int, ...]:
    """The layer indices that a policy means for this model, as the checkpoint describes it; ValueError where it means none."""
    if policy == "last_quarter":
        return last_quarter(spec.num_layers)
    if policy == "global" or policy == "global_suffix":  # noqa: PLR1714 (one by one, for the type)
        return _global_layers(spec, policy)
    chosen = tuple(sorted(set(policy)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= spec.num_layers:
        raise ValueError(f"ttt.layers: got {list(policy)}, expected layer indices from 0 to {spec.num_layers - 1}")
    return chosen


def _global_layers(spec: ModelSpec, policy: LayerPolicy) -> tuple[int, ...]:
    dense = tuple(i for i, layer in enumerate(spec.layers) if layer.window is None)
    if not dense or len(dense) == spec.num_layers:
        raise ValueError(
            f"ttt.layers: {policy!r} needs a checkpoint with both dense and windowed layers, got {len(dense)} dense of "
            f"{spec.num_layers}; use last_quarter or a list of indices"
        )
    chosen = dense if policy == "global" else tuple(i for i in dense if 2 * i >= spec.num_layers)
    if not chosen:
        raise ValueError(
            f"ttt.layers: 'global_suffix' needs a dense layer in the upper half, got dense layers {list(dense)} of "
            f"{spec.num_layers}; use global or a list of indices"
        )
    return chosen


def with_prime(spec: ModelSpec, config: TTTConfig) -> ModelSpec:
    """The description with a prime MLP, whose matrices are the fast weights, in every chosen layer."""
    chosen = ttt_layers(spec, config.layers)
    already = [i for i in chosen if spec.layers[i].prime is not None]
    if already:
        raise ValueError(
            f"layers {already} have a prime MLP already: start from a checkpoint without, or keep its TTT layers"
        )
    prime = PrimeSpec(
        intermediate_size=config.prime_width or spec.intermediate_size, post_norm=config.prime_init == "paper"
    )
    return spec.with_layers(
        tuple(
            dataclasses.replace(layer, prime=prime, fast="prime") if i in chosen else layer
            for i, layer in enumerate(spec.layers)
        )
    )


def new_tensors(before: ModelSpec, after: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that ``after`` has and ``before`` has not; everything else must agree."""
    old, new = before.parameter_shapes(), after.parameter_shapes()
    changed = sorted(name for name in old if new.get(name) != old[name])
    if changed:
        raise ValueError(f"conversion would drop or resize {changed}: a conversion only adds tensors")
    return {name: shape for name, shape in new.items() if name not in old}


def prime_state(
    before: ModelSpec, after: ModelSpec, state: Mapping[str, Tensor], *, init: PrimeInit, seed: int, std: float = 0.02
) -> dict[str, Tensor]:
    """The tensors that ``after`` adds to ``state``, initialised as ``init`` says. Deterministic in ``seed`` and independent of order."""
    added = {}
    for number, (name, shape) in enumerate(sorted(new_tensors(before, after).items())):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        like = state["norm.weight"]
        added[name] = _initial(name, shape, state, init, std, generator, before.norm_unit_offset).to(like.dtype)
    return added


def _initial(
    name: str,
    shape: tuple[int, ...],
    state: Mapping[str, Tensor],
    init: PrimeInit,
    std: float,
    generator: torch.Generator,
    unit_offset: bool,
) -> Tensor:
    if name.endswith("layernorm.weight"):
        source = name.replace("pre_prime_layernorm", "pre_feedforward_layernorm")
        if init == "copy" and source in state:
            return state[source].clone()
        return torch.zeros(shape) if unit_offset else torch.ones(shape)
    if name.endswith("down_proj.weight") and init != "paper":
        return torch.zeros(shape)
    if init == "copy":
        source = name.replace("prime_mlp", "mlp")
        if tuple(state[source].shape) != shape:
            raise ValueError(
                f"{name}: prime_init copy needs the width of the layer's own MLP, got {shape} against {tuple(state[source].shape)}; "
                "set ttt.prime_width to null or ttt.prime_init to random"
            )
        return state[source].clone()
    return torch.empty(shape).normal_(0.0, std, generator=generator)
