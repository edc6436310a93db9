"""Meta-gradients as a port writes them first: one autograd graph over all chunks, and gradients of gradients by autograd.

It reads the modules of a Decoder and is exact, so it is what ``meta_step.py`` measures the engine against.
Whole sequences go through PyTorch's fused attention, with a mask of T × T where there is a window. The layers from the lowest TTT layer up
read one chunk after the other, with explicit softmax, because the fused kernels have no second derivative. B, T, C, D as in
docs/method.md.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ttt_lit.model.attention import Attention
from ttt_lit.model.block import Block
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.mlp import MLPWeights, activate
from ttt_lit.model.rope import rotate
from ttt_lit.model.spec import LayerSpec, ModelSpec
from ttt_lit.ttt.flops import forward_flops, key_count

Fast = dict[int, MLPWeights]
"""TTT layer → one copy of its fast weights for every sequence, (B, F, D) and (B, D, F)."""
Past = dict[int, tuple[Tensor, Tensor]]
"""Suffix layer → carried keys and values, (B, Hkv, ≤ sinks + window − 1, head_dim)."""


def naive_loss(
    decoder: Decoder, tokens: Tensor, *, chunk: int, inner_lr: float, clip: float, recompute: bool = False
) -> Tensor:
    """Mean loss in nats of tokens (B, T + 1), differentiable through every inner update.

    ``recompute``: torch's checkpoint around every block below the suffix and around every chunk's inner step. Prime MLPs must be fast.
    """
    spec, run = decoder.spec, _checkpointed if recompute else _direct
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = decoder.embed(inputs)
    tables = decoder.rope(inputs.shape[1], x)
    masks = {reach: window_mask(inputs.shape[1], *reach, x.device) for reach in _reaches(spec, inputs.shape[1])}
    for index in range(spec.suffix_start):
        x = run(_whole_block, decoder, index, x, tables[index], masks.get(_reach(spec.layers[index])))
    fast = {i: _copies(decoder.block(i), tokens.shape[0]) for i in spec.ttt_layers}
    past: Past = {}
    losses = []
    for low in range(0, inputs.shape[1], chunk):
        span = slice(low, low + chunk)
        rope = [(cos[span], sin[span]) for cos, sin in tables]
        chunk_of = (decoder, x[:, span], targets[:, span], rope, past, fast)
        if span.stop == inputs.shape[1]:
            nll, past = run(_score, *chunk_of)
        else:
            nll, past, fast = run(_inner_step, *chunk_of, inner_lr, clip)
        losses.append(nll)
    return torch.cat(losses, dim=1).mean()


def naive_flops(spec: ModelSpec, *, context: int, chunk: int, recompute: bool) -> float:
    """Operations per token in matrix products, by the counting rules of ``ttt_lit/ttt/flops.py``.

    In units of a part's forward: 3 where no inner gradient passes, 6 for a map with slow weights and 9 for fast weights and for products
    of queries with keys. Gate and up of the lowest fast MLP have an input that learns nothing: 6. Running again adds the forward and the
    inner gradient once. (Torch's checkpoint runs a chunk twice in the forward already, which is not counted.)
    """
    plain, slow, fast = (4, 8, 12) if recompute else (3, 6, 9)
    start, last = spec.suffix_start, chunk / context
    forward = forward_flops(spec, context=context, mode="static")

    def mixed(times: float, share: float = last) -> float:
        """The last chunk makes no update."""
        return times * (1 - share) + plain * share

    total = forward.head * mixed(slow)
    for index, (layer, part) in enumerate(zip(spec.layers, forward.layers, strict=True)):
        if index < start:
            total += part.total * plain
            continue
        total += part.mlp * mixed(slow)
        if index == start:
            total += (part.attention_projections + part.attention_scores) * plain
            total += part.prime * mixed((2 * slow + fast) / 3)
            continue
        reach = _reach(layer)
        share = key_count(context - chunk, context, *reach) / key_count(0, context, *reach)
        total += part.attention_projections * mixed(slow) + part.attention_scores * mixed(fast, share)
        total += part.prime * mixed(fast if layer.fast == "prime" else slow)
    return total


def window_mask(length: int, window: int | None, sinks: int, device: torch.device) -> Tensor:
    """(T, T) bool: which keys a query sees."""
    return _visible(torch.arange(length, device=device), torch.arange(length, device=device), window, sinks)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, sinks: int) -> Tensor:
    """Explicit softmax: q (B, Hq, C, d) on the last of the keys k, v (B, Hkv, P + C, d)."""
    k, v = _for_every_query_head(k, v, q.shape[1])
    scores = (q @ k.mT * scale).to(torch.promote_types(q.dtype, torch.float32))
    keys = torch.arange(k.shape[2], device=q.device)
    seen = _visible(keys[-q.shape[2] :], keys, window, sinks)
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).to(v.dtype) @ v


def _visible(queries: Tensor, keys: Tensor, window: int | None, sinks: int) -> Tensor:
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & ((distance < window) | (keys < sinks))


def _reach(layer: LayerSpec) -> tuple[int | None, int]:
    return layer.window, layer.sink_tokens


def _reaches(spec: ModelSpec, length: int) -> set[tuple[int | None, int]]:
    """Windows and sinks of the blocks that read whole sequences, where they cut something."""
    reaches = {_reach(layer) for layer in spec.layers[: spec.suffix_start]}
    return {(window, sinks) for window, sinks in reaches if window is not None and window < length}


def _whole_block(decoder: Decoder, index: int, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    block = decoder.block(index)
    q, k, v = _queries_keys_values(block.self_attn, block.input_layernorm(x), rope)
    k, v = _for_every_query_head(k, v, q.shape[1])
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=block.self_attn.scale)
    return _rest_of_block(block, x, mixed, None)


def _chunk_block(
    decoder: Decoder, index: int, x: Tensor, rope: tuple[Tensor, Tensor], past: Past, fast: MLPWeights | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x (B, C, D) → (B, C, D), and the keys and values to carry."""
    block, (window, sinks) = decoder.block(index), _reach(decoder.spec.layers[index])
    q, k, v = _queries_keys_values(block.self_attn, block.input_layernorm(x), rope)
    if index in past:
        k, v = (torch.cat([old, new], dim=2) for old, new in zip(past[index], (k, v), strict=True))
    mixed = attention(q, k, v, scale=block.self_attn.scale, window=window, sinks=sinks)
    near = 0 if window is None else max(0, k.shape[2] - (window - 1))
    k, v = (
        torch.cat([t[:, :, : min(sinks, near)], t[:, :, near:]], dim=2) if sinks else t[:, :, near:] for t in (k, v)
    )
    return _rest_of_block(block, x, mixed, fast), (k, v)


def _queries_keys_values(layer: Attention, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (layer.heads(projection(x)) for projection in (layer.q_proj, layer.k_proj, layer.v_proj))
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    return rotate(q, *rope), rotate(k, *rope), v


def _for_every_query_head(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    groups = heads // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))


def _rest_of_block(block: Block, x: Tensor, mixed: Tensor, fast: MLPWeights | None) -> Tensor:
    """From the attention's heads (B, Hq, C, d) on."""
    x = x + block.post_attention_layernorm(block.self_attn.o_proj(mixed.transpose(1, 2).flatten(2)))
    if block.prime_mlp is not None:
        z = block.pre_prime_layernorm(x)
        out = block.prime_mlp(z) if fast is None else _fast_mlp(z, fast, block.prime_mlp.activation)
        x = x + block.post_prime_layernorm(out)
    return x + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))


def _fast_mlp(z: Tensor, fast: MLPWeights, activation: Any) -> Tensor:
    return torch.bmm(activate(torch.bmm(z, fast.gate.mT), activation) * torch.bmm(z, fast.up.mT), fast.down.mT)


def _copies(block: Block, batch: int) -> MLPWeights:
    assert block.prime_mlp is not None
    return MLPWeights(*(w.expand(batch, -1, -1) for w in block.prime_mlp.weights()))


def _score(
    decoder: Decoder, x: Tensor, targets: Tensor, rope: Sequence[tuple[Tensor, Tensor]], past: Past, fast: Fast
) -> tuple[Tensor, Past]:
    """Token losses (B, C) of a chunk, and what the next one carries."""
    carried = {}
    for index in range(decoder.spec.suffix_start, decoder.spec.num_layers):
        x, carried[index] = _chunk_block(decoder, index, x, rope[index], past, fast.get(index))
    logits = F.linear(decoder.norm(x), decoder.head_weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape), carried


def _inner_step(
    decoder: Decoder,
    x: Tensor,
    targets: Tensor,
    rope: Sequence[tuple[Tensor, Tensor]],
    past: Past,
    fast: Fast,
    lr: float,
    clip: float,
) -> tuple[Tensor, Past, Fast]:
    """Token losses of a chunk, what the next one carries, and its fast weights: one clipped SGD step for every sequence."""
    nll, carried = _score(decoder, x, targets, rope, past, fast)
    flat = [w for weights in fast.values() for w in weights]
    gradients = torch.autograd.grad(nll.mean(dim=1).sum(), flat, create_graph=True)
    rate: Any = lr
    if clip > 0:
        squared = torch.stack([g.square().sum(dim=(1, 2)) for g in gradients]).sum(dim=0)
        # At most 1, and a constant where it is 1.
        rate = (lr * clip * squared.clamp(min=clip**2).rsqrt()).view(-1, 1, 1)
    moved = iter([w - rate * g for w, g in zip(flat, gradients, strict=True)])
    return nll, carried, {i: MLPWeights(*(next(moved) for _ in weights)) for i, weights in fast.items()}


def _checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _direct(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
