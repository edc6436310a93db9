"""What a network is, as data: one ``ModelSpec`` with one ``LayerSpec`` per layer.

Everything that differs between checkpoint families is a named property here, so no code asks for a model's name. This file imports
only the standard library: an audit, a plan or a report can reason about a 1.5B model without loading torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

Activation = Literal["silu", "gelu_tanh"]
FastWeights = Literal["prime", "mlp"]
SINK_LOGIT = "self_attn.sink_logit"
"""The parameter of a layer's learned sinks."""
Mode = Literal["none", "static", "meta", "first_order"]
"""``none``: prime MLPs are not computed. ``static``: computed, never updated inside. ``meta``: updated, and the outer gradient
differentiates through every update. ``first_order``: updated, but the updates' gradients are constants to the outer gradient."""


@dataclass(frozen=True, kw_only=True)
class PrimeSpec:
    """The extra gated MLP of a TTT layer, between attention and the ordinary MLP."""

    intermediate_size: int
    """Inner width. The paper shrinks it; a conversion keeps the layer's own MLP width by default."""
    post_norm: bool = False
    """Normalise the output. Off by default: with a zero down-projection the norm would amplify the first update by 1/sqrt(eps)."""

    def __post_init__(self) -> None:
        if self.intermediate_size < 1:
            raise ValueError(f"PrimeSpec.intermediate_size: got {self.intermediate_size}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What one layer does with its context."""

    window: int | None = None
    """Tokens that a query sees, itself included. None: the whole past (dense causal attention)."""
    sink_tokens: int = 0
    """Tokens from the first on that every later query sees as well, although they lie outside of its window (attention sinks)."""
    sink_logit: bool = False
    """Whether each query head has a learned sink: a mass in its softmax's denominator that no value goes with."""
    rope_base: float = 10_000.0
    """Base of the rotary position embedding. Comes from the checkpoint and survives every conversion."""
    prime: PrimeSpec | None = None
    """The layer's prime MLP, or None."""
    fast: FastWeights | None = None
    """Which MLP's three matrices the inner loop updates. None: the layer is not a TTT layer."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"LayerSpec.window: got {self.window}, expected at least 1 token, or null for dense attention"
            )
        if self.sink_tokens < 0 or (self.sink_tokens and self.window is None):
            raise ValueError(
                f"LayerSpec.sink_tokens: got {self.sink_tokens} with window {self.window}, expected 0, or more tokens beside a window"
            )
        if not self.rope_base > 0:
            raise ValueError(f"LayerSpec.rope_base: got {self.rope_base}, expected a positive number")
        if self.fast is not None and self.fast not in get_args(FastWeights):
            raise ValueError(f"LayerSpec.fast: got {self.fast!r}, expected one of {get_args(FastWeights)} or null")
        if self.fast == "prime" and self.prime is None:
            raise ValueError("LayerSpec.fast is 'prime' but the layer has no prime MLP: set LayerSpec.prime")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float = 1e-6
    norm_unit_offset: bool = False
    """RMSNorm multiplies by (1 + weight) and its weights start at zero."""
    pre_norms: bool = True
    """Normalise the input of attention and MLPs."""
    post_norms: bool = False
    """Normalise the output of attention and of the ordinary MLP before the residual addition."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head, before the rotary embedding."""
    qkv_bias: bool = False
    activation: Activation = "silu"
    tied_head: bool = True
    """The output head is the embedding matrix."""
    embedding_scale: float = 1.0
    """Factor on the embeddings as they enter the first layer."""
    score_scale: float | None = None
    """Factor on attention scores. None: 1 / sqrt(head_dim)."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                problems.append(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not self.layers:
            problems.append("layers: got none, expected at least one")
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            problems.append(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim: got {self.head_dim}, expected an even number (rotary embedding rotates pairs)")
        if self.activation not in get_args(Activation):
            problems.append(f"activation: got {self.activation!r}, expected one of {get_args(Activation)}")
        if problems:
            raise ValueError("ModelSpec: " + "; ".join(problems))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def ttt_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose MLP the inner loop updates."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.fast is not None)

    @property
    def suffix_start(self) -> int:
        """Index of the lowest TTT layer: below it the prefix runs once per sequence. Without TTT layers, the number of layers."""
        return min(self.ttt_layers, default=self.num_layers)

    @property
    def attention_scale(self) -> float:
        return self.score_scale if self.score_scale is not None else 1.0 / math.sqrt(self.head_dim)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape, in the order of the network. A tied head has no entry of its own."""
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for index, layer in enumerate(self.layers):
            shapes.update({f"layers.{index}.{name}": shape for name, shape in self._layer_shapes(layer).items()})
        shapes["norm.weight"] = (self.hidden_size,)
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        width, queries, keys = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if self.pre_norms:
            shapes["input_layernorm.weight"] = (width,)
        if layer.sink_logit:
            shapes[SINK_LOGIT] = (self.num_heads,)
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"self_attn.{name}_proj.weight"] = (size, width)
            if self.qkv_bias:
                shapes[f"self_attn.{name}_proj.bias"] = (size,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["self_attn.o_proj.weight"] = (width, queries)
        if self.post_norms:
            shapes["post_attention_layernorm.weight"] = (width,)
        if layer.prime is not None:
            if self.pre_norms:
                shapes["pre_prime_layernorm.weight"] = (width,)
            shapes.update(_mlp_shapes("prime_mlp", width, layer.prime.intermediate_size))
            if layer.prime.post_norm:
                shapes["post_prime_layernorm.weight"] = (width,)
        if self.pre_norms:
            shapes["pre_feedforward_layernorm.weight"] = (width,)
        shapes.update(_mlp_shapes("mlp", width, self.intermediate_size))
        if self.post_norms:
            shapes["post_feedforward_layernorm.weight"] = (width,)
        return shapes

    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def with_layers(self, layers: tuple[LayerSpec, ...]) -> ModelSpec:
        """The same model with other layer descriptions; the number of layers must not change."""
        if len(layers) != self.num_layers:
            raise ValueError(f"with_layers: got {len(layers)} layers, expected {self.num_layers}")
        return dataclasses.replace(self, layers=layers)

    def updating_only(self, layers: Collection[int]) -> ModelSpec:
        """The same model, in which only these of its TTT layers learn while reading; the others keep their prime MLPs as they stand."""
        return self.with_layers(
            tuple(
                layer if layer.fast is None or i in layers else dataclasses.replace(layer, fast=None)
                for i, layer in enumerate(self.layers)
            )
        )

    def with_fast_layers_of(self, other: ModelSpec) -> ModelSpec:
        """The same model with the fast weights of another description of the same layers."""
        pairs = zip(self.layers, other.layers, strict=True)
        return self.with_layers(tuple(dataclasses.replace(layer, fast=theirs.fast) for layer, theirs in pairs))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Inverse of ``to_json``. Unknown or missing fields are an error that names them."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelSpec:
        data = dict(data)
        layers = []
        for layer in data.pop("layers", ()):
            layer = dict(layer)
            prime = layer.pop("prime", None)
            layers.append(_build(LayerSpec, layer | {"prime": _build(PrimeSpec, prime) if prime is not None else None}))
        return _build(cls, data | {"layers": tuple(layers)})


def last_quarter(num_layers: int) -> tuple[int, ...]:
    """The highest round-half-up(L/4) layers, at least one: 28 → 7, 26 → 7, 6 → 2."""
    count = max(1, (num_layers + 2) // 4)
    return tuple(range(num_layers - count, num_layers))


def _mlp_shapes(name: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (inner, width),
        f"{name}.up_proj.weight": (inner, width),
        f"{name}.down_proj.weight": (width, inner),
    }


def _build(kind: Any, data: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(
            f"{kind.__name__}: unknown fields {unknown}; known are {sorted(known)}. Was it written by a newer version?"
        )
    return kind(**data)
