"""Sizes of the network that is measured, and its layers."""

import dataclasses
from collections.abc import Mapping

from ttt_lit.model.spec import LayerSpec, ModelSpec, PrimeSpec, last_quarter

_SIZE_NAMES = ("hidden", "mlp", "layers", "heads", "kv_heads", "vocab", "window", "sinks", "chunk")
_SMALL = dict(zip(_SIZE_NAMES, (256, 768, 8, 4, 4, 2048, 512, 4, 256), strict=True))
SIZES = {
    "small": _SMALL,
    "small-152k": _SMALL | {"vocab": 151936},
    "small-262k": _SMALL | {"vocab": 262144},
    "qwen2.5-1.5b": dict(zip(_SIZE_NAMES, (1536, 8960, 28, 12, 2, 151936, 8192, 4, 1024), strict=True)),
}
ROPE_BASE = dict.fromkeys(SIZES, 10_000.0) | {"qwen2.5-1.5b": 1e6}
QKV_BIAS = {"qwen2.5-1.5b"}


def make_specs(shape: str, sizes: Mapping[str, int]) -> dict[str, ModelSpec]:
    """The network with its windows (``ttt``), with attention sinks before them (``sinks``), and with full attention and without prime
    MLPs (``dense``)."""
    chosen = last_quarter(sizes["layers"])
    plain = LayerSpec(window=sizes["window"], rope_base=ROPE_BASE[shape])
    learning = dataclasses.replace(plain, prime=PrimeSpec(intermediate_size=sizes["mlp"]), fast="prime")
    spec = ModelSpec(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["mlp"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["hidden"] // sizes["heads"],
        layers=tuple(learning if i in chosen else plain for i in range(sizes["layers"])),
        qkv_bias=shape in QKV_BIAS,
    )
    dense = dataclasses.replace(plain, window=None)
    return {
        "ttt": spec,
        "sinks": changed(spec, sink_tokens=sizes["sinks"]),
        "dense": spec.with_layers((dense,) * sizes["layers"]),
    }


def changed(spec: ModelSpec, **changes: int) -> ModelSpec:
    """The same network with other windows or sinks in every layer."""
    return spec.with_layers(tuple(dataclasses.replace(layer, **changes) for layer in spec.layers))
