"""A micro-batch on tensors that have shapes and no memory: the real code, counted byte by byte."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ttt_lit.convert.windowed import windowed, with_windows
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import Mode, ModelSpec
from ttt_lit.ops import carried_attention, cross_entropy, distillation, logit_tiles, wide
from ttt_lit.plan.live_bytes import LiveBytes
from ttt_lit.train.optim import learns
from ttt_lit.train.teacher import Teacher
from ttt_lit.ttt import inner
from ttt_lit.ttt.scan import sequence_loss
from ttt_lit.ttt.settings import EngineConfig

_LOSS = (
    cross_entropy._linear_nll,
    cross_entropy._linear_nll_backward,
    distillation._nll_and_kl,
    distillation._nll_and_kl_backward,
)
_ATTENTION = (
    carried_attention._attend,
    carried_attention._attend_backward,
    carried_attention._attend_dual,
    carried_attention._attend_dual_backward,
)


class Peaks(NamedTuple):
    """Bytes beside parameters and optimiser, at most, in the three parts of a micro-batch. Gradients are among them."""

    forward: float
    suffix: float
    """While the backward is in what is read chunk by chunk; 0 where nothing is."""
    rest: float
    """While it is in what is read whole."""

    @property
    def peak(self) -> float:
        return max(self)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What decides about a micro-batch's memory, beside the network."""

    sequences: int
    context: int
    chunk: int
    mode: Mode
    engine: EngineConfig
    half: bool
    """Whether products run in bfloat16 under autocast."""
    on_cpu: bool
    """Which kernels run. On a GPU attention is fused; on a CPU its tiles are memory too."""
    gradients_exist: bool
    """Whether an earlier micro-batch of the step has left gradients."""
    sharded: bool
    """Whether gradients of blocks below the suffix leave as soon as they are complete."""
    teacher: ModelSpec | None = None
    """A frozen network that reads the same tokens first."""

    @property
    def updates(self) -> bool:
        return self.mode in ("meta", "first_order")


def rehearse(spec: ModelSpec, batch: MicroBatch) -> Peaks:
    """Peaks of one micro-batch, forward and backward, from the real code on tensors without memory."""
    with FakeTensorMode(), _kernels_of_the_device(batch):
        with torch.device("cpu"):
            decoder = Decoder(with_fused_windows(spec, batch))
            tokens = torch.zeros(batch.sequences, batch.context + 1, dtype=torch.long)
            teacher = _teacher(batch)
        _prepare_gradients(decoder, batch)
        opened = _LOSS + (_ATTENTION if batch.on_cpu else ())
        gradients = [p.grad for p in decoder.parameters() if p.grad is not None]
        existing = sum(g.nbytes for g in gradients)
        known = [*decoder.parameters(), *(teacher.parameters() if teacher is not None else ()), *gradients, tokens]
        with _Opened(opened, known) as live:
            peaks = _forward_and_backward(decoder, teacher, tokens, batch, live)
    return Peaks(*(peak + existing if peak else 0 for peak in peaks))


def _teacher(batch: MicroBatch) -> Teacher | None:
    """The stage's, in compute precision; without gradients, as a run makes it."""
    if batch.teacher is None:
        return None
    usual = torch.get_default_dtype()
    torch.set_default_dtype(
        torch.bfloat16 if batch.half else usual
    )  # tensors without memory cannot be cast in a module
    try:
        return Teacher(Decoder(with_fused_windows(batch.teacher, batch))).requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)


def _forward_and_backward(
    decoder: Decoder, teacher: Teacher | None, tokens: Tensor, batch: MicroBatch, live: LiveBytes
) -> Peaks:
    suffix: list[int] = []

    def watch(_: nn.Module, __: Any, attended: Tensor) -> None:
        if attended.requires_grad:
            attended.register_hook(lambda _: suffix.append(live.take_peak()))

    if batch.updates:
        decoder.block(decoder.spec.suffix_start).self_attn.register_forward_hook(watch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=batch.half):
        out = sequence_loss(
            decoder,
            tokens,
            mode=batch.mode,
            chunk=batch.chunk,
            inner_lr=1.0,
            clip=1.0,
            engine=batch.engine,
            teacher=None if teacher is None else teacher(tokens),
        )
        loss = out.loss if out.token_kl is None else out.loss + out.token_kl.mean(dtype=torch.float64)
    forward = live.take_peak()
    loss.backward()
    return Peaks(forward, max(suffix, default=0), live.take_peak())


def with_fused_windows(spec: ModelSpec, batch: MicroBatch) -> ModelSpec:
    """On a GPU every attention holds its operands, its output and a number a row, whatever kernel runs and whatever sinks it has: that
    of our operator."""
    if batch.on_cpu:
        return spec
    return windowed(with_windows(spec, [layer.window for layer in spec.layers]), max(1, batch.context - 1))


@contextlib.contextmanager
def _kernels_of_the_device(batch: MicroBatch) -> Iterator[None]:
    """Tensors without memory are on the CPU. Where a GPU is planned, what asks for the device must hear of a GPU."""
    if batch.on_cpu:
        yield
        return
    tiles = functools.partial(_tile_shape, logit_tiles.tile_shape)
    replaced: list[tuple[Any, str, Any]] = [
        (logit_tiles, "tile_shape", tiles),
        *((module, "wide_matmul", _wide_matmul) for module in (logit_tiles, wide, inner)),
    ]
    real = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in real:
            setattr(module, name, value)


def _tile_shape(real: Callable[[int, str], tuple[int, int]], vocab_size: int, _: str) -> tuple[int, int]:
    return real(vocab_size, "cuda")


def _wide_matmul(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The product's size; a GPU makes it without wider copies of the operands."""
    return x.new_empty(*x.shape[:-1], y.shape[-1], dtype=dtype)


def _prepare_gradients(decoder: Decoder, batch: MicroBatch) -> None:
    for name, parameter in decoder.named_parameters():
        if batch.gradients_exist and not batch.sharded and learns(name, batch.mode):
            parameter.grad = torch.empty_like(parameter)
    if batch.sharded:
        for index in range(decoder.spec.suffix_start):
            for parameter in decoder.block(index).parameters():
                parameter.register_post_accumulate_grad_hook(_drop_gradient)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Opened(LiveBytes):
    """Sees inside some of our operators, which are otherwise one step."""

    def __init__(self, operators: Iterable[Any], existing: Iterable[Tensor]) -> None:
        super().__init__(*existing)
        self._inside = {operator._opoverload: operator._init_fn for operator in operators}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inside = self._inside.get(func)
        if inside is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return inside(*args, **(kwargs or {}))
