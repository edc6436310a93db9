"""The paper's own model, as the official JAX implementation names and stores it (``tests/golden`` holds examples).

Layers are stacked on axis 0, the prime MLPs apart from the blocks and over the suffix layers only; linear weights are
(in, out); RoPE rotates adjacent pairs, ours the two halves. Every map is a permutation of the entries, so gradients
travel through it unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ttt_lit.families.config_fields import MAX_LAYERS, read_bool, read_choice, read_float, read_int
from ttt_lit.families.family import Family, Layout, Shapes, Source
from ttt_lit.model.spec import FastWeights, LayerSpec, ModelSpec, PrimeSpec

_MODEL = "language_model.model."
_BLOCKS = _MODEL + "h.blocks."
_PRIME = _MODEL + "h.prime_storage."
_HEAD = "language_model.lm_head.weight"

_WINDOWED = {"SWA": True, "SWAFull": True, "self_attention": False}
_MODES = {"meta": True, "pretrain": False}
_INNER: dict[str, FastWeights] = {"prime": "prime", "ffn": "mlp"}

# Our name inside a layer -> (stored name, layout). The three linears of an MLP: w1 gate, w3 up, w2 down.
_BLOCK_NAMES: dict[str, tuple[str, Layout]] = {
    "input_layernorm.weight": ("seq_norm.weight", "same"),
    "self_attn.q_proj.weight": ("seq_modeling_block.wq.weight", "paired_rows"),
    "self_attn.k_proj.weight": ("seq_modeling_block.wk.weight", "paired_rows"),
    "self_attn.v_proj.weight": ("seq_modeling_block.wv.weight", "transposed"),
    "self_attn.o_proj.weight": ("seq_modeling_block.wo.weight", "transposed"),
    "self_attn.q_norm.weight": ("seq_modeling_block.q_norm.weight", "paired_vector"),
    "self_attn.k_norm.weight": ("seq_modeling_block.k_norm.weight", "paired_vector"),
    "post_attention_layernorm.weight": ("seq_post_norm.weight", "same"),
    "pre_feedforward_layernorm.weight": ("ffn_norm.weight", "same"),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", "transposed"),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", "transposed"),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", "transposed"),
    "post_feedforward_layernorm.weight": ("ffn_post_norm.weight", "same"),
}
_PRIME_NAMES: dict[str, tuple[str, Layout]] = {
    "pre_prime_layernorm.weight": ("ffn_prime_norm.weight", "same"),
    "prime_mlp.gate_proj.weight": ("feed_forward_prime.w1.weight", "transposed"),
    "prime_mlp.up_proj.weight": ("feed_forward_prime.w3.weight", "transposed"),
    "prime_mlp.down_proj.weight": ("feed_forward_prime.w2.weight", "transposed"),
    "post_prime_layernorm.weight": ("ffn_prime_post_norm.weight", "same"),
}
# A reference model always stores these, also when its configuration does not use them.
_SWITCHED_OFF = {
    _BLOCKS + "seq_norm.weight": "pre_norm is off",
    _BLOCKS + "ffn_norm.weight": "pre_norm is off",
    _PRIME + "ffn_prime_norm.weight": "pre_norm is off",
    _BLOCKS + "seq_post_norm.weight": "post_norm is off",
    _BLOCKS + "ffn_post_norm.weight": "post_norm is off",
    _PRIME + "ffn_prime_post_norm.weight": "post_norm is off",
    _BLOCKS + "seq_modeling_block.q_norm.weight": "qk_norm is off",
    _BLOCKS + "seq_modeling_block.k_norm.weight": "qk_norm is off",
}


def spec_from_case(config: Mapping[str, Any]) -> ModelSpec:
    """The model of a golden case.

    Args:
        config: the ``config`` object of the file's metadata.

    Raises:
        ValueError: a field that is missing, of the wrong kind or inconsistent; the message names it.
    """
    layers = read_int(config, "layers", most=MAX_LAYERS)
    suffix = config.get("suffix", 0)
    if isinstance(suffix, bool) or not isinstance(suffix, int) or not 0 <= suffix <= layers:
        raise ValueError(f"config: suffix is {suffix!r}, expected a whole number from 0 to layers ({layers})")
    hidden, heads, inter = (read_int(config, name) for name in ("hidden", "heads", "inter"))
    if hidden % heads:
        raise ValueError(f"config: hidden {hidden} is not a multiple of heads {heads}")
    post_norm = read_bool(config, "post_norm")
    window = read_int(config, "window") if read_choice(config, "block", _WINDOWED) else None
    base = read_float(config, "theta")
    prime = PrimeSpec(intermediate_size=inter, post_norm=post_norm) if read_bool(config, "prime") else None
    fast = read_choice(config, "inner", _INNER) if read_choice(config, "mode", _MODES) else None
    below = LayerSpec(window=window, rope_base=base)
    above = LayerSpec(window=window, rope_base=base, prime=prime, fast=fast)
    return ModelSpec(
        vocab_size=read_int(config, "vocab"),
        hidden_size=hidden,
        intermediate_size=inter,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        layers=(below,) * (layers - suffix) + (above,) * suffix,
        norm_eps=1e-6,
        pre_norms=read_bool(config, "pre_norm"),
        post_norms=post_norm,
        qk_norm=read_bool(config, "qk_norm"),
        tied_head=read_bool(config, "tie"),
    )


def state_from_reference(spec: ModelSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our parameters (or gradients, or optimiser moments of linear kind) from the reference's.

    Args:
        spec: the model.
        tensors: stored names (``language_model.…``) -> tensors, all of them.

    Returns:
        Exactly the names of ``spec.parameter_shapes()``, contiguous, dtype and device kept.

    Raises:
        ValueError: missing, extra or misshapen keys; the message lists them.
    """
    _check_stored({name: tuple(tensor.shape) for name, tensor in tensors.items()}, spec)
    state = {}
    for name, source in _sources(spec).items():
        stored = tensors[source.key] if source.index is None else tensors[source.key][source.index]
        state[name] = source.to_ours(stored).contiguous()
    return state


def state_to_reference(
    spec: ModelSpec, state: Mapping[str, torch.Tensor], like: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Inverse of ``state_from_reference``: the reference's tensors from ours.

    A norm that the case switches off (``switched_off``) has no parameter here and comes back as zeros: its gradient.

    Args:
        spec: the model.
        state: one tensor per name of ``spec.parameter_shapes()``; weights, gradients or differences of weights.
        like: stored names -> shapes to produce.

    Raises:
        ValueError: ``state`` or ``like`` do not fit the spec; the message lists the keys.
    """
    _check_stored({name: tuple(shape) for name, shape in like.items()}, spec)
    expected = spec.parameter_shapes()
    wrong = sorted(set(expected) ^ set(state)) or sorted(n for n, s in expected.items() if tuple(state[n].shape) != s)
    if wrong:
        raise ValueError(f"state_to_reference: missing, extra or misshapen parameters: {', '.join(wrong)}")
    first = next(iter(state.values()))
    result = {name: first.new_zeros(tuple(shape)) for name, shape in like.items()}
    for name, source in _sources(spec).items():
        target = result[source.key] if source.index is None else result[source.key][source.index]
        target.copy_(source.to_theirs(state[name].detach()))
    return result


def switched_off(spec: ModelSpec, stored: Mapping[str, Any]) -> dict[str, str]:
    """The names of ``stored`` that the case switches off, so that the spec has no use for them, with the reason."""
    used = _stored_shapes(spec)
    return {name: reason for name, reason in _SWITCHED_OFF.items() if name in stored and name not in used}


def _check_stored(shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec) -> None:
    expected = _stored_shapes(spec)
    missing = sorted(set(expected) - set(shapes))
    extra = sorted(set(shapes) - set(expected) - set(switched_off(spec, shapes)))
    misshapen = [f"{n} {shapes[n]} instead of {s}" for n, s in expected.items() if n in shapes and shapes[n] != s]
    found = {"missing": missing, "extra": extra, "misshapen": misshapen}
    if any(found.values()):
        text = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in found.items() if keys)
        raise ValueError(f"reference tensors do not fit the case's model: {text}")


def _sources(spec: ModelSpec) -> dict[str, Source]:
    suffix = _prime_layers(spec)
    sources = {}
    for name in spec.parameter_shapes():
        if not name.startswith("layers."):
            sources[name] = _outer_source(name)
            continue
        _, index, inner = name.split(".", 2)
        if inner in _PRIME_NAMES:
            key, layout = _PRIME_NAMES[inner]
            sources[name] = Source(key=_PRIME + key, index=suffix.index(int(index)), layout=layout)
        elif inner in _BLOCK_NAMES:
            key, layout = _BLOCK_NAMES[inner]
            heads = spec.num_heads if layout == "paired_rows" else 1
            sources[name] = Source(key=_BLOCKS + key, index=int(index), layout=layout, heads=heads)
        else:
            raise ValueError(f"the ttt_e2e layout has no place for {name}")
    return sources


def _outer_source(name: str) -> Source:
    known = {
        "embed_tokens.weight": Source(key=_MODEL + "wte.weight"),
        "norm.weight": Source(key=_MODEL + "ln_f.weight"),
        "lm_head.weight": Source(key=_HEAD, layout="transposed"),
    }
    return known[name]


def _prime_layers(spec: ModelSpec) -> list[int]:
    layers = [i for i, layer in enumerate(spec.layers) if layer.prime is not None]
    if layers and layers != list(range(layers[0], spec.num_layers)):
        raise ValueError(f"the ttt_e2e layout stacks prime MLPs over the last layers only, got them in layers {layers}")
    return layers


def _stored_shapes(spec: ModelSpec) -> Shapes:
    """Read off the sources: the stored shape of one layer, times the number of layers that share the tensor."""
    ours = spec.parameter_shapes()
    sizes: Shapes = {}
    counts: dict[str, int] = {}
    for name, source in _sources(spec).items():
        flip = source.layout in ("transposed", "paired_rows")
        sizes[source.key] = ours[name][::-1] if flip else ours[name]
        if source.index is not None:
            counts[source.key] = counts.get(source.key, 0) + 1
    return {key: (counts[key], *shape) if key in counts else shape for key, shape in sizes.items()}


def _dropped(spec: ModelSpec) -> dict[str, str]:
    return {name: reason for name, reason in _SWITCHED_OFF.items() if name not in _stored_shapes(spec)}


FAMILY = Family(
    name="ttt_e2e",
    model_types=("ttt_e2e",),
    spec_from_config=spec_from_case,
    config_from_spec=None,
    stored_shapes=_stored_shapes,
    sources=_sources,
    dropped=_dropped,
    head_key=None,
)
