"""One chunk through the suffix: from the lowest TTT layer's MLPs to the final norm, on values or on values with tangents.

What lies below does not depend on the fast weights, the lowest TTT layer's attention included: it runs once over the whole sequence.
Functions take weights as tensors, not modules: the sweep reads constants, the adjoint reads leaves of its own, and every layer of one
kind shares a compiled function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_lit.model.attention import sink_mass
from ttt_lit.model.mlp import MLPWeights
from ttt_lit.model.rope import rotate
from ttt_lit.model.spec import SINK_LOGIT, Activation, FastWeights, ModelSpec
from ttt_lit.ops.attention import choose_carried_kernel
from ttt_lit.ops.carried_attention import Attended, CarriedKernel, attend, attend_dual
from ttt_lit.ttt.dual import Dual, FastMLP, Products, add, fast_mlp, gated_mlp, norm

Weights = Mapping[str, Tensor]
"""A layer's parameters by their name inside the block, e.g. ``self_attn.q_proj.weight``; what the spec switches off is absent."""


class KeyValues(NamedTuple):
    """Keys (after normalisation and rotation) and values, each (B, Hkv, T, D)."""

    keys: Tensor
    values: Tensor


class AttentionState(NamedTuple):
    """What a layer's attention leaves behind for later chunks and for its own adjoint."""

    new: KeyValues
    attended: Attended


class LayerKind(NamedTuple):
    """What a layer of the suffix computes. Layers of one kind share a compiled function."""

    with_attention: bool
    """False in the lowest TTT layer: its attention has run over the whole sequence."""
    kernel: CarriedKernel
    window: int | None
    sink_tokens: int
    fast: FastWeights | None
    head_dim: int
    scale: float
    activation: Activation
    eps: float
    unit_offset: bool


class LayerInput(NamedTuple):
    """Everything that a layer reads beside x, its kind and its weights."""

    rope: tuple[Tensor, Tensor]
    """cos and sin (C, head_dim) of the chunk's positions."""
    past: KeyValues | None = None
    attended: Attended | None = None
    """The attention's result, where an earlier reading has computed it."""
    fast: FastMLP | None = None
    products: Sequence[Tensor] | None = None
    """The results of the layer's matrix products, likewise."""


class LayerResult(NamedTuple):
    x: Dual
    attention: AttentionState | None
    inputs: tuple[Tensor, Tensor] | None
    """Inputs of the fast weights' products; None where the layer has none."""
    products: list[Tensor]


RunLayer = Callable[[LayerKind, Weights, Dual, LayerInput], LayerResult]


def layer_kind(spec: ModelSpec, index: int, *, device: torch.device, dtype: torch.dtype) -> LayerKind:
    """The kind of a suffix layer that computes in ``dtype``."""
    layer = spec.layers[index]
    return LayerKind(
        with_attention=index > spec.suffix_start,
        kernel=choose_carried_kernel(device=device, dtype=dtype, head_dim=spec.head_dim, window=layer.window),
        window=layer.window,
        sink_tokens=layer.sink_tokens,
        fast=layer.fast,
        head_dim=spec.head_dim,
        scale=spec.attention_scale,
        activation=spec.activation,
        eps=spec.norm_eps,
        unit_offset=spec.norm_unit_offset,
    )


def run_layer(kind: LayerKind, weights: Weights, x: Dual, given: LayerInput) -> LayerResult:
    """One layer of the suffix, or of the lowest TTT layer the part above its attention. x (B, C, D)."""
    products, state, inputs = Products(given.products), None, None
    if kind.with_attention:
        out, state = _attention(kind, weights, _norm(kind, weights, x, "input"), given, products)
        x = add(x, _norm(kind, weights, out, "post_attention"))
    for mlp, before, after in (
        ("prime_mlp", "pre_prime", "post_prime"),
        ("mlp", "pre_feedforward", "post_feedforward"),
    ):
        if f"{mlp}.gate_proj.weight" not in weights:
            continue
        z = _norm(kind, weights, x, before)
        if mlp == ("prime_mlp" if kind.fast == "prime" else kind.fast):
            assert given.fast is not None
            out, inputs = fast_mlp(z, given.fast, kind.activation, products)
        else:
            out = gated_mlp(z, mlp_weights(weights, mlp), kind.activation, products)
        x = add(x, _norm(kind, weights, out, after))
    return LayerResult(x, state, inputs, products.made)


def mlp_weights(weights: Weights, mlp: str) -> MLPWeights:
    """The three matrices of the MLP of that name."""
    return MLPWeights(*(weights[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down")))


def _norm(kind: LayerKind, weights: Weights, x: Dual, name: str) -> Dual:
    return norm(x, weights.get(f"{name}_layernorm.weight"), eps=kind.eps, unit_offset=kind.unit_offset)


def _attention(
    kind: LayerKind, weights: Weights, x: Dual, given: LayerInput, products: Products
) -> tuple[Dual, AttentionState]:
    maps = [(weights[f"self_attn.{n}_proj.weight"], weights.get(f"self_attn.{n}_proj.bias")) for n in "qkv"]
    heads = [y.each(lambda t: _heads(t, kind.head_dim)) for y in products.linears(x, maps)]
    q, k = (
        norm(y, weights.get(f"self_attn.{n}_norm.weight"), eps=kind.eps, unit_offset=kind.unit_offset).each(
            lambda t: rotate(t, *given.rope)
        )
        for n, y in zip("qk", heads[:2], strict=True)
    )
    sink = weights.get(SINK_LOGIT)
    mixed, attended = _mix(kind, q, k, heads[2], None if sink is None else sink_mass(sink), given)
    out = products.linears(mixed.each(_merged), [(weights["self_attn.o_proj.weight"], None)])[0]
    return out, AttentionState(KeyValues(k.value, heads[2].value), attended)


def _mix(kind: LayerKind, q: Dual, k: Dual, v: Dual, mass: Tensor | None, given: LayerInput) -> tuple[Dual, Attended]:
    """Attention of q over the carried and the new keys; the result along the direction needs the result itself from before."""
    if q.tangent is None or k.tangent is None or v.tangent is None:
        attended = attend(
            q.value,
            k.value,
            v.value,
            given.past,
            known=given.attended,
            scale=kind.scale,
            window=kind.window,
            sink_tokens=kind.sink_tokens,
            sink_mass=mass,
            kernel=kind.kernel,
        )
        return Dual(attended.output), attended
    assert given.attended is not None
    output, tangent = attend_dual(
        q.value,
        k.value,
        v.value,
        given.past,
        given.attended,
        (q.tangent, k.tangent, v.tangent),
        scale=kind.scale,
        window=kind.window,
        sink_tokens=kind.sink_tokens,
        sink_mass=mass,
        kernel=kind.kernel,
    )
    return Dual(output, tangent), given.attended


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, C, H · head_dim) → (B, H, C, head_dim)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)
