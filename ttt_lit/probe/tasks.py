"""What a probe measures, in which order, and what each measurement costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ttt_lit.convert.windowed import windowed
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import LayerSpec, ModelSpec
from ttt_lit.probe import measure
from ttt_lit.probe.blocks import Block, spread
from ttt_lit.probe.config import CLIP, Plan, ProbeConfig, curve_buckets
from ttt_lit.probe.rows import IMPORTED, Key, Rows
from ttt_lit.probe.summary import best_kept, best_sinks
from ttt_lit.train.position import bucket_means

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Measurements on one block that share a computation."""

    title: str
    keys: tuple[Key, ...]
    block: Block
    work: float
    """Multiplications of matrix products with weights, about; for the estimate of the time left."""
    run: Callable[[], Iterator[tuple[Key, Values]]]


class Tasks:
    """Every task of a probe, in phases, each a function of what is measured so far.

    Args:
        decoder: the network with the prime MLPs of the layers that are to learn.
        spec: the same with the windows as imported.
        blocks: held-out blocks, one per document.
        has_bos: whether blocks begin with BOS.
        rows: where results are kept: later phases depend on them.
    """

    def __init__(
        self,
        decoder: Decoder,
        spec: ModelSpec,
        blocks: Sequence[Block],
        config: ProbeConfig,
        plan: Plan,
        *,
        has_bos: bool,
        rows: Rows,
    ) -> None:
        self.decoder, self.spec, self.blocks, self.plan = decoder, spec, blocks, plan
        self.config, self.has_bos, self.rows = config, has_bos, rows
        self.sweep = spread(blocks, plan.sweep_documents)
        self.device = decoder.norm.weight.device
        self._dense: dict[str, Tensor] = {}
        self._per_layer = _numbers(spec, lambda name: "layers." in name and "prime" not in name) / spec.num_layers
        self._prime, self._head = _numbers(spec, lambda name: "prime" in name), spec.vocab_size * spec.hidden_size

    @property
    def phases(self) -> tuple[tuple[str, Callable[[], Iterator[Task]]], ...]:
        """With their names, in this order: what chooses the number of sinks, what the verdict rests on, what uses the choice, what is
        dearest."""
        steps = self.config.keep_layers or 1
        layers = tuple(
            (f"layers to keep (step {count + 1})", partial(self._layers, count))
            for count in range(steps if self.plan.layer_documents else 0)
        )
        first = (("sinks", self._sinks), ("ceilings", self._ceilings), ("other windows", self._windows))
        return (*first, ("inner loop", self._inner), *layers)

    def has(self, task: Task) -> bool:
        return all(self.rows.has(key, task.block.id) for key in task.keys)

    def missing(self) -> list[str]:
        """The phases that are not finished, with how many of their measurements are to come."""
        found = []
        for name, phase in self.phases:
            done = [self.has(task) for task in phase()]
            if not all(done):
                found.append(f"{name} ({done.count(False)} of {len(done)})")
        return found

    def _sinks(self) -> Iterator[Task]:
        for block in self.sweep:
            yield self._imported(block)
            for sinks in self.plan.sinks:
                yield self._damage(block, self.plan.window, sinks)

    def _ceilings(self) -> Iterator[Task]:
        for block in self.blocks:
            yield self._imported(block)
            for window in self.plan.strides:
                yield self._ceiling(block, window)

    def _windows(self) -> Iterator[Task]:
        sinks = best_sinks(self.rows, self.plan)
        for block in self.sweep:
            for window in self.plan.windows:
                if window != self.plan.window:
                    yield self._damage(block, window, sinks)

    def _inner(self) -> Iterator[Task]:
        if self.plan.rates:
            for block in self.sweep:
                yield self._learning(block, None, 0)
                yield self._learning(block, self.plan.window, best_sinks(self.rows, self.plan))

    def _layers(self, count: int) -> Iterator[Task]:
        window, sinks = self.plan.window, best_sinks(self.rows, self.plan)
        narrowed = self._narrowed(window, sinks)
        changed = [i for i, layer in enumerate(self.spec.layers) if layer != narrowed[i]]
        kept = best_kept(self.rows, window, sinks, count)
        # Before those layers are known, any that many stand for them: the estimate of the time left wants to know what is to come.
        others = [i for i in changed if i not in kept][: max(0, len(changed) - count)]
        if others:
            for block in spread(self.sweep, self.plan.layer_documents):
                yield self._keeping(block, window, sinks, kept, others)

    # Single tasks -------------------------------------------------------------------------------------------------------------

    def _imported(self, block: Block) -> Task:
        def run() -> Iterator[tuple[Key, Values]]:
            yield IMPORTED, self._values(self._dense_losses(block))

        return Task(title="as imported", keys=(IMPORTED,), block=block, work=self._pass(self.plan.context), run=run)

    def _damage(self, block: Block, window: int, sinks: int) -> Task:
        key: Key = ("damage", window, sinks)

        def run() -> Iterator[tuple[Key, Values]]:
            # Up to the window every query sees what it saw before: these losses are the imported model's.
            losses = self._dense_losses(block)[:window]
            if window < self.plan.context:
                layers = self._narrowed(window, sinks)
                beyond = measure.token_losses(self.decoder, layers, self._tokens(block), first=window)[0]
                losses = torch.cat([losses, beyond.double().cpu()])
            yield key, self._values(losses)

        title = f"window {window:,}, sinks {sinks}"
        context = self.plan.context
        return Task(title=title, keys=(key,), block=block, work=self._pass(context, context - window), run=run)

    def _ceiling(self, block: Block, window: int) -> Task:
        stride, context = self.plan.strides[window], self.plan.context
        key: Key = ("ceiling", window, stride)

        def run() -> Iterator[tuple[Key, Values]]:
            fresh = measure.fresh_context_losses(
                self.decoder,
                self.spec.layers,
                self._tokens(block),
                window=window,
                stride=stride,
                has_bos=self.has_bos,
            )
            dense = self._dense_losses(block)[window + stride :]
            yield key, {"dense": float(dense.mean()), "fresh": float(fresh.double().mean())}

        scored = context - window - stride
        work = self._pass(scored / stride * (window + stride), scored)
        return Task(title=f"fresh contexts of {window:,}", keys=(key,), block=block, work=work, run=run)

    def _learning(self, block: Block, window: int | None, sinks: int) -> Task:
        spec = self.spec if window is None else self.spec.with_layers(self._narrowed(window, sinks))
        keys: dict[float, Key] = {rate: ("inner", window, sinks, rate) for rate in self.plan.rates}

        chunk = self.plan.chunk
        assert chunk is not None

        def run() -> Iterator[tuple[Key, Values]]:
            read = measure.losses_while_learning(
                self.decoder, spec, self._tokens(block), rates=self.plan.rates, chunk=chunk, clip=CLIP
            )
            for rate, out in read:
                norms = out.update_norms[:, 0].tolist()
                yield keys[rate], self._values(out.token_nll[0].double().cpu()) | {"update_norms": norms}

        context, layers = self.plan.context, self.spec.num_layers
        start = spec.suffix_start
        # A sweep reads the suffix, goes back through it, and makes the gradient's matrices; the head's product is made twice.
        once = 3 * ((layers - start) * self._per_layer + self._prime) + 2 * self._head
        work = context * (start * self._per_layer + len(keys) * once)
        title = "learning as imported" if window is None else f"learning within window {window:,}, sinks {sinks}"
        return Task(title=title, keys=tuple(keys.values()), block=block, work=work, run=run)

    def _keeping(self, block: Block, window: int, sinks: int, kept: tuple[int, ...], others: Sequence[int]) -> Task:
        keys: dict[int, Key] = {i: ("layer", window, sinks, *kept, i) for i in others}
        layers = self._narrowed(window, sinks, kept)

        def run() -> Iterator[tuple[Key, Values]]:
            inside = self._dense_losses(block)[:window]
            wide = {i: self.spec.layers[i] for i in others}
            for i, beyond in measure.losses_with_one_other(
                self.decoder, layers, wide, self._tokens(block), first=window
            ):
                yield keys[i], {"loss": float(torch.cat([inside, beyond[0].double().cpu()]).mean())}

        context, depth = self.plan.context, self.spec.num_layers
        passes = max(others) + sum(depth - i for i in others)
        work = passes * context * self._per_layer + len(others) * (context - window) * self._head
        beside = f" beside {', '.join(map(str, kept))}" if kept else ""
        return Task(title=f"each layer kept{beside}", keys=tuple(keys.values()), block=block, work=work, run=run)

    # Shared -------------------------------------------------------------------------------------------------------------------

    def _narrowed(self, window: int, sinks: int, keep: Sequence[int] = ()) -> tuple[LayerSpec, ...]:
        return windowed(self.spec, window, sink_tokens=sinks, keep=keep).layers

    def _tokens(self, block: Block) -> Tensor:
        return block.tokens.to(self.device)

    def _dense_losses(self, block: Block) -> Tensor:
        """(T,) float64 on CPU, of the model as imported; kept, because everything is compared with them."""
        if block.id not in self._dense:
            losses = measure.token_losses(self.decoder, self.spec.layers, self._tokens(block))
            self._dense[block.id] = losses[0].double().cpu()
        return self._dense[block.id]

    def _values(self, losses: Tensor) -> Values:
        return {"loss": float(losses.mean()), "curve": bucket_means(losses, curve_buckets(self.plan.context))}

    def _pass(self, tokens: float, scored: float | None = None) -> float:
        return tokens * self._per_layer * self.spec.num_layers + (tokens if scored is None else scored) * self._head


def _numbers(spec: ModelSpec, chosen: Callable[[str], bool]) -> int:
    return sum(math.prod(shape) for name, shape in spec.parameter_shapes().items() if chosen(name))
