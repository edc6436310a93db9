"""The meta-gradient engine: losses of the suffix over all chunks, and their exact gradient with one chunk's graph alive at a time.

Forward, a sweep: each chunk is scored, its inner gradient taken and its fast weights moved; no graph is kept. Backward, from the last
chunk to the first, the adjoint of "score, then update". Let λ be the cotangent of the updated weights and u that of the inner gradient g
(``step_adjoint``). What makes the outer gradient exact is the derivative of ⟨u, g⟩ in everything that g depends on. But ⟨u, g⟩ is the
derivative of the chunk's loss along u. So the chunk is read once with tangents along u (``dual.py``), and one ordinary reverse pass over
its losses and their tangents gives every term. No gradient is ever differentiated by autograd: fused and compiled operators serve
throughout, and nothing can turn silently first order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ttt_lit.model.decoder import Decoder
from ttt_lit.model.mlp import MLPWeights
from ttt_lit.ttt.compiled import layer_runner
from ttt_lit.ttt.inner import FastWeights, InnerRule, Step, step_adjoint
from ttt_lit.ttt.reading import Reading, Slow
from ttt_lit.ttt.settings import EngineConfig
from ttt_lit.ttt.storage import FastWeightStore, make_store
from ttt_lit.ttt.sums import HEAD, GradientSums, Key


def read_suffix(
    decoder: Decoder,
    x: Tensor,
    targets: Tensor,
    tables: list[tuple[Tensor, Tensor]],
    *,
    exact: bool,
    chunk: int,
    inner_lr: float,
    clip: float,
    rule: InnerRule,
    engine: EngineConfig,
) -> tuple[Tensor, Tensor]:
    """Token losses (B, T) and inner steps' lengths (chunks − 1, B), from the stream x (B, T, D) above the lowest TTT layer's attention.

    ``exact``: the outer gradient differentiates through the updates; else they are constants to it.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "the inner loop takes gradients, which torch.inference_mode forbids: use torch.no_grad() instead"
        )
    reading = Reading(
        decoder,
        targets,
        tables,
        chunk=chunk,
        lr=inner_lr,
        clip=clip,
        rule=rule,
        residual_bytes=engine.residual_bytes,
        run=layer_runner(engine.compile, x.device),
    )
    parameters = Parameters(decoder)
    if torch.is_grad_enabled() and (x.requires_grad or parameters.learning):
        nll, lengths = _MetaLoss.apply(reading, parameters, engine, exact, x, *parameters.tensors)
        return nll, lengths
    nll, lengths, _ = _sweep(reading, parameters, x.detach(), None)
    return nll, lengths


class Parameters:
    """What the suffix reads of the model, in one order: its layers above the lowest TTT layer's attention, the final norm, the head."""

    def __init__(self, decoder: Decoder) -> None:
        spec = decoder.spec
        self.tensors: list[Tensor] = []
        self.keys: list[Key] = []
        self.fast = {i: "prime_mlp" if spec.layers[i].fast == "prime" else "mlp" for i in spec.ttt_layers}
        """TTT layer → the MLP whose weights are the start of its fast weights."""
        for index in range(spec.suffix_start, spec.num_layers):
            for name, tensor in decoder.block(index).named_parameters():
                below = name.startswith(("input_layernorm.", "self_attn.", "post_attention_layernorm."))
                if index > spec.suffix_start or not below:
                    self._append((index, name), tensor)
        self._append((None, "norm.weight"), decoder.norm.weight)
        self._append(HEAD, decoder.head_weight)

    def _append(self, key: Key, tensor: Tensor) -> None:
        self.keys.append(key)
        self.tensors.append(tensor)

    @property
    def learning(self) -> bool:
        return any(t.requires_grad for t in self.tensors)

    def slow(self, *, with_gradient: bool) -> Slow:
        """The same weights cut from the outer graph; with gradients of their own where they learn and are not fast."""
        layers: dict[int, dict[str, Tensor]] = {}
        ends: dict[str, Tensor] = {}
        for (index, name), tensor in zip(self.keys, self.tensors, strict=True):
            fast = index in self.fast and name.startswith(self.fast[index] + ".")
            leaf = tensor.detach().requires_grad_(with_gradient and tensor.requires_grad and not fast)
            (ends if index is None else layers.setdefault(index, {}))[name] = leaf
        return Slow(layers, ends["norm.weight"], ends["head"])

    def start(self, batch: int) -> FastWeights:
        """W_0, seen once per sequence: views, not copies."""
        named = dict(zip(self.keys, self.tensors, strict=True))
        return {
            i: MLPWeights(*(named[i, name].detach().expand(batch, -1, -1) for name in _fast_names(mlp)))
            for i, mlp in self.fast.items()
        }

    def gradients(self, sums: GradientSums) -> Iterator[Tensor | None]:
        """One for each of ``tensors``."""
        for key, tensor in zip(self.keys, self.tensors, strict=True):
            gradient = sums.get(key) if tensor.requires_grad else None
            yield None if gradient is None else gradient.to(tensor.dtype)


def _fast_names(mlp: str) -> list[str]:
    return [f"{mlp}.{part}_proj.weight" for part in ("gate", "up", "down")]


class _Kept:
    """What a sweep leaves for its adjoint, beside what the reading itself remembers."""

    def __init__(self, reading: Reading, parameters: Parameters, engine: EngineConfig, x: Tensor) -> None:
        slow = parameters.slow(with_gradient=False)

        def again(index: int, fast: FastWeights) -> FastWeights:
            return reading.inner_step(reading.chunk(index), x, slow, fast, keep=False)[1]

        self.store: FastWeightStore = make_store(engine.fast_weights, reading.num_chunks, again)
        self.steps: list[Step] = []


def _sweep(
    reading: Reading, parameters: Parameters, x: Tensor, kept: _Kept | None
) -> tuple[Tensor, Tensor, FastWeights]:
    """Token losses, lengths of the inner steps, and the last fast weights; fills ``kept``."""
    slow, fast = parameters.slow(with_gradient=False), parameters.start(x.shape[0])
    keep = kept is not None
    if kept is not None:
        kept.store.save(0, fast, None)
    losses, lengths = [], []
    for chunk in reading.chunks():
        if chunk.is_last:
            losses.append(reading.score(chunk, x, slow, fast, keep=keep))
            break
        nll, fast, step, factors = reading.inner_step(chunk, x, slow, fast, keep=keep)
        losses.append(nll)
        lengths.append(step.length)
        if kept is not None:
            kept.steps.append(step)
            kept.store.save(chunk.number + 1, fast, (factors, step.rate))
        del factors  # not to be alive beside the next chunk's
    nll = torch.cat(losses, dim=1)
    return nll, torch.stack(lengths) if lengths else nll.new_zeros(0, nll.shape[0]), fast


class _MetaLoss(torch.autograd.Function):
    """Thin and eager: used once per micro-batch, never compiled, and its own backward is never differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        reading: Reading,
        parameters: Parameters,
        engine: EngineConfig,
        exact: bool,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        kept = _Kept(reading, parameters, engine, x)
        nll, lengths, _ = _sweep(reading, parameters, x, kept)
        ctx.reading, ctx.parameters, ctx.kept, ctx.exact = reading, parameters, kept, exact
        ctx.save_for_backward(x, *tensors)
        ctx.mark_non_differentiable(lengths)
        return nll, lengths

    @staticmethod
    def backward(ctx: Any, d_nll: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the meta-gradient cannot be differentiated again: call backward without create_graph")
        if ctx.kept is None:
            raise RuntimeError(
                "the meta-gradient frees what it kept as it goes: read the sequence again for a second backward"
            )
        x, *_ = ctx.saved_tensors  # raises if a parameter was changed in place since the forward
        # Nothing of the suffix may outlive its adjoint: the blocks below need the memory for theirs.
        reading, kept, ctx.reading, ctx.kept = ctx.reading, ctx.kept, None, None
        sums = GradientSums()
        d_x = _adjoint(reading, ctx.parameters, kept, x, d_nll, ctx.exact, sums)
        return None, None, None, None, d_x, *ctx.parameters.gradients(sums)


def _adjoint(
    reading: Reading,
    parameters: Parameters,
    kept: _Kept,
    x: Tensor,
    d_nll: Tensor,
    exact: bool,
    sums: GradientSums,
) -> Tensor:
    """Gradient of Σ d_nll · nll in x (B, T, D); those of the parameters are added to ``sums``."""
    slow, carried = parameters.slow(with_gradient=True), reading.carried_cotangents()
    d_x = torch.empty_like(x)
    adjoint: FastWeights = {}
    after: FastWeights = {}
    for chunk in reversed(list(reading.chunks())):
        fast = kept.store.load(chunk.number)
        direction = None
        if exact and not chunk.is_last:
            direction = step_adjoint(adjoint, fast, after, kept.steps[chunk.number])
        after = {}
        d_x[:, chunk.span], d_fast = reading.chunk_adjoint(
            chunk, x, slow, fast, direction, d_nll[:, chunk.span], carried, sums
        )
        adjoint = _summed(adjoint, d_fast) if adjoint else d_fast
        after = fast
        del fast, direction, d_fast  # a copy of the fast weights each
    for i, mlp in parameters.fast.items():  # every sequence starts from the same W_0
        for name, cotangent in zip(_fast_names(mlp), adjoint[i], strict=True):
            sums.add((i, name), cotangent.sum(0))
    return d_x


def _summed(total: FastWeights, more: FastWeights) -> FastWeights:
    return {i: MLPWeights(*(t.add_(m) for t, m in zip(total[i], more[i], strict=True))) for i in total}
