"""The paper's own model, as the official JAX implementation names and stores it (``tests/golden`` holds examples).

Layers are stacked on axis 0, the prime MLPs apart from the blocks and over the suffix layers only; linear weights are
(in, out); RoPE rotates adjacent pairs, ours the two halves. Every map is a permutation of the entries, so gradients
travel through it unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ttt_lit.checkpoint.tensors import Shapes, check_shapes, shapes_of
from ttt_lit.model.spec import FastWeights, LayerSpec, ModelSpec, PrimeSpec

Layout = Literal["same", "transposed", "paired_rows", "paired_vector"]

_MODEL = "language_model.model."
_BLOCKS = _MODEL + "h.blocks."
_PRIME = _MODEL + "h.prime_storage."

_WINDOWED = {"SWA": True, "SWAFull": True, "self_attention": False}
_INNER: dict[str, FastWeights] = {"prime": "prime", "ffn": "mlp"}
_CHOICES = {"block": tuple(_WINDOWED), "mode": ("meta", "pretrain"), "inner": tuple(_INNER)}
_SIZES = ("layers", "hidden", "heads", "inter", "vocab", "window")
_SWITCHES = ("prime", "pre_norm", "post_norm", "qk_norm", "tie")

# Our name, without the layer -> (stored name, layout). The three linears of an MLP: w1 gate, w3 up, w2 down.
_NAMES: dict[str, tuple[str, Layout]] = {
    "embed_tokens.weight": (_MODEL + "wte.weight", "same"),
    "input_layernorm.weight": (_BLOCKS + "seq_norm.weight", "same"),
    "self_attn.q_proj.weight": (_BLOCKS + "seq_modeling_block.wq.weight", "paired_rows"),
    "self_attn.k_proj.weight": (_BLOCKS + "seq_modeling_block.wk.weight", "paired_rows"),
    "self_attn.v_proj.weight": (_BLOCKS + "seq_modeling_block.wv.weight", "transposed"),
    "self_attn.o_proj.weight": (_BLOCKS + "seq_modeling_block.wo.weight", "transposed"),
    "self_attn.q_norm.weight": (_BLOCKS + "seq_modeling_block.q_norm.weight", "paired_vector"),
    "self_attn.k_norm.weight": (_BLOCKS + "seq_modeling_block.k_norm.weight", "paired_vector"),
    "post_attention_layernorm.weight": (_BLOCKS + "seq_post_norm.weight", "same"),
    "pre_prime_layernorm.weight": (_PRIME + "ffn_prime_norm.weight", "same"),
    "prime_mlp.gate_proj.weight": (_PRIME + "feed_forward_prime.w1.weight", "transposed"),
    "prime_mlp.up_proj.weight": (_PRIME + "feed_forward_prime.w3.weight", "transposed"),
    "prime_mlp.down_proj.weight": (_PRIME + "feed_forward_prime.w2.weight", "transposed"),
    "post_prime_layernorm.weight": (_PRIME + "ffn_prime_post_norm.weight", "same"),
    "pre_feedforward_layernorm.weight": (_BLOCKS + "ffn_norm.weight", "same"),
    "mlp.gate_proj.weight": (_BLOCKS + "feed_forward.w1.weight", "transposed"),
    "mlp.up_proj.weight": (_BLOCKS + "feed_forward.w3.weight", "transposed"),
    "mlp.down_proj.weight": (_BLOCKS + "feed_forward.w2.weight", "transposed"),
    "post_feedforward_layernorm.weight": (_BLOCKS + "ffn_post_norm.weight", "same"),
    "norm.weight": (_MODEL + "ln_f.weight", "same"),
    "lm_head.weight": ("language_model.lm_head.weight", "transposed"),
}
# A reference model always stores the norms of its layers, also those that its configuration does not use.
_LAYER_NORMS = {key for key, _ in _NAMES.values() if "norm" in key}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one of our parameters lives in the reference's checkpoint and how to read it from there."""

    key: str
    """Stored name."""
    index: int | None
    """Position on axis 0 where several layers share one stored tensor. None: the whole tensor."""
    layout: Layout
    """How the stored values are arranged: ``transposed`` is (in, out); the ``paired`` ones are rotated by RoPE in
    adjacent pairs, as transposed projection (``paired_rows``) or as a vector over the head (``paired_vector``)."""
    heads: int
    """Heads along the rotated axis, for the ``paired`` layouts."""

    def to_ours(self, stored: Tensor) -> Tensor:
        """Our parameter from the stored tensor (the layer's own slice, without axis 0)."""
        stored = stored.t() if self.is_transposed else stored
        return _swap_pairs(stored, self.heads, -1, 2) if self.layout.startswith("paired") else stored

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Inverse of ``to_ours``."""
        ours = _swap_pairs(ours, self.heads, 2, -1) if self.layout.startswith("paired") else ours
        return ours.t() if self.is_transposed else ours

    @property
    def is_transposed(self) -> bool:
        return self.layout in ("transposed", "paired_rows")


def _swap_pairs(tensor: Tensor, heads: int, *split: int) -> Tensor:
    """Axis 0, head by head: (-1, 2) turns adjacent RoPE pairs (0, 1), (2, 3), ... into halves (i, i + d/2), (2, -1) goes back."""
    return tensor.reshape(heads, *split, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def spec_from_case(config: Mapping[str, Any]) -> ModelSpec:
    """The model of a golden case.

    Args:
        config: the ``config`` object of the file's metadata.

    Raises:
        ValueError: a field that is missing, of the wrong kind or inconsistent; the message names it.
    """
    problems = [n for n in _SIZES if type(config.get(n)) is not int or config[n] < 1]
    problems += [n for n in _SWITCHES if type(config.get(n)) is not bool]
    problems += [n for n, known in _CHOICES.items() if config.get(n) not in known]
    problems += [n for n in ("theta",) if type(config.get(n)) not in (int, float) or not config[n] > 0]
    if problems:
        raise ValueError("config: " + "; ".join(f"{name} is {config.get(name)!r}" for name in problems))
    layers, suffix, hidden, heads = config["layers"], config.get("suffix", 0), config["hidden"], config["heads"]
    if type(suffix) is not int or not 0 <= suffix <= layers:
        raise ValueError(f"config: suffix is {suffix!r}, expected a whole number from 0 to layers ({layers})")
    if hidden % heads:
        raise ValueError(f"config: hidden {hidden} is not a multiple of heads {heads}")
    prime = PrimeSpec(intermediate_size=config["inter"], post_norm=config["post_norm"]) if config["prime"] else None
    fast = _INNER[config["inner"]] if config["mode"] == "meta" else None
    window, base = config["window"] if _WINDOWED[config["block"]] else None, float(config["theta"])
    below = LayerSpec(window=window, rope_base=base)
    above = LayerSpec(window=window, rope_base=base, prime=prime, fast=fast)
    return ModelSpec(
        vocab_size=config["vocab"],
        hidden_size=hidden,
        intermediate_size=config["inter"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        layers=(below,) * (layers - suffix) + (above,) * suffix,
        norm_eps=1e-6,
        pre_norms=config["pre_norm"],
        post_norms=config["post_norm"],
        qk_norm=config["qk_norm"],
        tied_head=config["tie"],
    )


def state_from_reference(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters (or gradients, or optimiser moments of linear kind) from the reference's.

    Args:
        spec: the model.
        tensors: stored names (``language_model.…``) -> tensors, all of them.

    Returns:
        Exactly the names of ``spec.parameter_shapes()``, contiguous, dtype and device kept.

    Raises:
        ValueError: missing, extra or misshapen keys; the message lists them.
    """
    _check_stored(shapes_of(tensors), spec)
    state = {}
    for name, source in sources(spec).items():
        stored = tensors[source.key] if source.index is None else tensors[source.key][source.index]
        state[name] = source.to_ours(stored).contiguous()
    return state


def state_to_reference(spec: ModelSpec, state: Mapping[str, Tensor], like: Shapes) -> dict[str, Tensor]:
    """The way back. Stored tensors that the case switches off are zero.

    Args:
        spec: the model.
        state: exactly the names of ``spec.parameter_shapes()``: gradients or weights.
        like: stored names -> shapes to produce.

    Raises:
        ValueError: ``state`` or ``like`` do not fit the spec; the message lists the keys.
    """
    _check_stored(like, spec)
    check_shapes(shapes_of(state), spec.parameter_shapes(), where="state_to_reference")
    first = next(iter(state.values()))
    result = {name: first.new_zeros(shape) for name, shape in like.items()}
    for name, source in sources(spec).items():
        target = result[source.key] if source.index is None else result[source.key][source.index]
        target.copy_(source.to_theirs(state[name].detach()))
    return result


def switched_off(spec: ModelSpec, stored: Mapping[str, Any]) -> set[str]:
    """The norms among the names of ``stored`` that the case switches off, so that the spec has no use for them."""
    return _LAYER_NORMS & set(stored) - set(_stored_shapes(spec))


def sources(spec: ModelSpec) -> dict[str, Source]:
    """Our parameter -> where the reference stores it, for every name in ``spec.parameter_shapes()``."""
    first_prime = next((i for i, layer in enumerate(spec.layers) if layer.prime is not None), 0)
    found = {}
    for name in spec.parameter_shapes():
        layer, inner = name.split(".", 2)[1:] if name.startswith("layers.") else (None, name)
        key, layout = _NAMES[inner]
        index = None if layer is None else int(layer) - (first_prime if key.startswith(_PRIME) else 0)
        heads = spec.num_heads if layout == "paired_rows" else 1
        found[name] = Source(key=key, index=index, layout=layout, heads=heads)
    return found


def _check_stored(shapes: Shapes, spec: ModelSpec) -> None:
    off = switched_off(spec, shapes)
    check_shapes({n: s for n, s in shapes.items() if n not in off}, _stored_shapes(spec), where="reference tensors")


def _stored_shapes(spec: ModelSpec) -> Shapes:
    """Read off the sources: the stored shape of one layer, times the number of layers that share the tensor."""
    ours = spec.parameter_shapes()
    sizes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    for name, source in sources(spec).items():
        sizes[source.key] = ours[name][::-1] if source.is_transposed else ours[name]
        if source.index is not None:
            counts[source.key] = counts.get(source.key, 0) + 1
    return {key: (counts[key], *shape) if key in counts else shape for key, shape in sizes.items()}
