"""TTT-E2E written from its equations: one sequence at a time, plain tensors, every key kept, nothing recomputed or skipped.

This is the specification of ``scan.py``. It shares no code with the modules: it reads a flat mapping of weights by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ttt_lit.model.spec import LayerSpec, ModelSpec

Weights = Mapping[str, Tensor]


def sequence_nll_naive(
    weights: Weights,
    spec: ModelSpec,
    tokens: Tensor,
    *,
    mode: str,
    chunk: int,
    inner_lr: float,
    clip: float,
    rule: str = "sgd",
) -> Tensor:
    """Token losses (T,) in nats of one sequence of tokens (T+1,), differentiable in ``weights`` through every inner update."""
    updates = mode in ("meta", "first_order")
    inputs, targets = tokens[:-1], tokens[1:]
    cache: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in range(spec.num_layers)}
    names = [name for i in spec.ttt_layers for name in _fast_names(i, spec.layers[i])] if updates else []
    # Views, so that the inner gradient reaches the fast weights and nothing else that shares them.
    fast = {name: weights[name].view_as(weights[name]) for name in names}
    losses = []
    for low in range(0, len(inputs), chunk):
        x, y = inputs[low : low + chunk], targets[low : low + chunk]
        nll = _chunk_nll(weights, fast, spec, x, y, low, cache, use_prime=mode != "none")
        losses.append(nll)
        if updates:
            gradient = torch.autograd.grad(nll.mean(), list(fast.values()), create_graph=True)
            if mode == "first_order":
                gradient = tuple(g.detach() for g in gradient)
            norm = torch.sqrt(sum((g * g).sum() for g in gradient))  # type: ignore[arg-type]
            factor = _factor(norm, clip, rule)
            fast = {name: w - inner_lr * factor * g for (name, w), g in zip(fast.items(), gradient, strict=True)}
    return torch.cat(losses)


def _factor(norm: Tensor, clip: float, rule: str) -> Tensor | float:
    if rule == "normalised":
        return 1 / (norm + 1e-3)
    return clip / norm if clip > 0 and norm > clip else 1.0


def _fast_names(index: int, layer: LayerSpec) -> list[str]:
    mlp = "prime_mlp" if layer.fast == "prime" else "mlp"
    return [f"layers.{index}.{mlp}.{name}_proj.weight" for name in ("gate", "up", "down")]


def _chunk_nll(
    weights: Weights,
    fast: Weights,
    spec: ModelSpec,
    inputs: Tensor,
    targets: Tensor,
    position: int,
    cache: dict[int, list[tuple[Tensor, Tensor]]],
    *,
    use_prime: bool,
) -> Tensor:
    x = weights["embed_tokens.weight"][inputs] * spec.embedding_scale
    for index, layer in enumerate(spec.layers):
        w = {
            name.removeprefix(f"layers.{index}."): fast.get(name, weights[name])
            for name in weights
            if name.startswith(f"layers.{index}.")
        }
        attended = _attention(w, spec, layer, _norm(x, w.get("input_layernorm.weight"), spec), position, cache[index])
        x = x + _norm(attended, w.get("post_attention_layernorm.weight"), spec)
        if layer.prime is not None and use_prime:
            out = _mlp(w, "prime_mlp", _norm(x, w.get("pre_prime_layernorm.weight"), spec), spec)
            x = x + _norm(out, w.get("post_prime_layernorm.weight"), spec)
        out = _mlp(w, "mlp", _norm(x, w.get("pre_feedforward_layernorm.weight"), spec), spec)
        x = x + _norm(out, w.get("post_feedforward_layernorm.weight"), spec)
    x = _norm(x, weights["norm.weight"], spec)
    head = weights["embed_tokens.weight"] if spec.tied_head else weights["lm_head.weight"]
    return -torch.log_softmax(x @ head.T, dim=-1)[torch.arange(len(targets)), targets]


def _norm(x: Tensor, weight: Tensor | None, spec: ModelSpec) -> Tensor:
    if weight is None:
        return x
    scale = 1 + weight if spec.norm_unit_offset else weight
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + spec.norm_eps) * scale


def _mlp(w: Weights, name: str, x: Tensor, spec: ModelSpec) -> Tensor:
    gate = x @ w[f"{name}.gate_proj.weight"].T
    if spec.activation == "silu":
        gate = gate * torch.sigmoid(gate)
    else:
        gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gate * (x @ w[f"{name}.up_proj.weight"].T)) @ w[f"{name}.down_proj.weight"].T


def _attention(
    w: Weights, spec: ModelSpec, layer: LayerSpec, x: Tensor, position: int, cache: list[tuple[Tensor, Tensor]]
) -> Tensor:
    def heads(name: str) -> Tensor:
        y = x @ w[f"self_attn.{name}_proj.weight"].T
        if spec.qkv_bias:
            y = y + w[f"self_attn.{name}_proj.bias"]
        y = y.view(len(x), -1, spec.head_dim)
        return _norm(y, w.get(f"self_attn.{name}_norm.weight"), spec)

    q, k = _rotate(heads("q"), position, layer.rope_base), _rotate(heads("k"), position, layer.rope_base)
    cache.append((k, heads("v")))
    keys, values = (torch.cat(parts) for parts in zip(*cache, strict=True))
    out = []
    for i in range(len(x)):
        last = position + i
        seen = [j for j in range(last + 1) if layer.window is None or j > last - layer.window or j < layer.sink_tokens]
        for head in range(spec.num_heads):
            kv = head // (spec.num_heads // spec.num_kv_heads)
            scores = keys[seen, kv] @ q[i, head] * spec.attention_scale
            mixed = torch.softmax(scores, dim=0) @ values[seen, kv]
            if layer.sink_logit:
                b = w["self_attn.sink_logit"][head]
                mass = torch.expm1(b if b >= 0 else -b)
                mixed = mixed / (1 + mass * torch.exp(-torch.logsumexp(scores, dim=0)))
            out.append(mixed)
    return torch.stack(out).view(len(x), -1) @ w["self_attn.o_proj.weight"].T


def _rotate(x: Tensor, position: int, base: float) -> Tensor:
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (position + torch.arange(len(x), dtype=torch.float64))[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
