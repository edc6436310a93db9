"""The imported model against transformers: same weights, same tokens, float32, eager attention.

transformers runs first and is freed before ours is built, so the memory is that of one float32 model plus the logits.
Lengths are chosen to cross every window; a window wider than ``max_tokens`` cannot be crossed and is listed as such.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ttt_lit.checkpoint.announcer import Announcer
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import ModelSpec

LOGIT_LIMIT = 1e-4
"""Largest logit difference that float32 summation order explains, times max(1, largest |logit|)."""
DEPARTURE = 1e-5
"""A layer's output departs when it differs by more than this times its largest value: ten times what rounding does."""


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """What the comparison reads."""

    lengths: tuple[int, ...] = (1, 2, 17, 96)
    """Tokens per sequence; lengths that cross the model's windows are added."""
    max_tokens: int = 4096
    """No sequence is longer: attention scores of both models take memory with its square."""
    seed: int = 0
    """Of the synthetic tokens."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or max(self.lengths) > self.max_tokens:
            raise ValueError(f"ParityConfig.lengths: got {self.lengths}, expected 1 to max_tokens ({self.max_tokens})")


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far two models are apart on the same tokens."""

    lengths: tuple[int, ...]
    max_abs_logit_diff: float
    limit: float
    """``LOGIT_LIMIT`` times max(1, largest |logit|)."""
    largest_logit: float
    top1_agreement: float
    """Share of positions where both prefer the same token."""
    kl_nats: float
    """Mean over positions of KL(transformers || ours)."""
    layer_errors: dict[str, float]
    """Per part of the network: largest difference of its output, relative to the output's largest value."""
    windows_not_crossed: tuple[int, ...]
    """Windows too wide to be crossed within ``max_tokens``: for them this comparison says nothing."""

    @property
    def passed(self) -> bool:
        return self.max_abs_logit_diff <= self.limit

    @property
    def first_departure(self) -> str:
        """The first part of the network whose output differs by more than rounding."""
        beyond = (part for part, error in self.layer_errors.items() if not error <= DEPARTURE)
        return next(beyond, "the final norm or the output head")

    def summary(self) -> str:
        """One line for the console."""
        text = (
            f"parity with transformers: max |logit difference| {self.max_abs_logit_diff:.2e} (limit {self.limit:.2e}), "
            f"top-1 agreement {self.top1_agreement:.2%}, KL {self.kl_nats:.2e} nats, lengths {list(self.lengths)}"
        )
        return text + (f"; windows not crossed: {list(self.windows_not_crossed)}" if self.windows_not_crossed else "")

    def require(self, name: str) -> None:
        """ValueError that names the first departing layer, unless the models agree."""
        if not self.passed:
            raise ValueError(
                f"{name}: the imported model is not the one that transformers runs: {self.summary()}; "
                f"the first output that departs is that of {self.first_departure}"
            )


def check_parity(
    source: Path,
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    *,
    config: ParityConfig | None = None,
    say: Announcer | None = None,
) -> ParityReport:
    """Compare ``Decoder(spec)`` with weights ``state`` to what transformers makes of the folder ``source``.

    Args:
        source: Hugging Face folder; only its safetensors are loaded, none of its code runs.
        spec: the imported network.
        state: its parameters, any float dtype; both models compute in float32.
        config: lengths and seed.
        say: told which model is at which layer; None: nobody is.
    """
    config, say = config or ParityConfig(), say or Announcer(Console(quiet=True))
    lengths, not_crossed = parity_lengths(spec, config)
    generator = torch.Generator().manual_seed(config.seed)
    batches = [torch.randint(spec.vocab_size, (1, length), generator=generator) for length in lengths]
    with torch.inference_mode():
        theirs = _run_transformers(source, batches, say)
        gc.collect()
        ours = _run_ours(spec, state, batches, say)
        return _compare(theirs, ours, lengths, not_crossed, say)


def parity_lengths(spec: ModelSpec, config: ParityConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sequence lengths to compare at, and the windows that they cannot cross."""
    windows = sorted({layer.window for layer in spec.layers if layer.window is not None})
    crossed = [window for window in windows if window < config.max_tokens]
    longer = {min(window + 17, config.max_tokens) for window in crossed} | set(crossed)
    return tuple(sorted({*config.lengths, *longer})), tuple(window for window in windows if window not in crossed)


Run = list[tuple[list[Tensor], Tensor]]
"""Per sequence: embeddings and every layer's output, (1, T, D) each; logits (1, T, V)."""


def _run_transformers(source: Path, batches: list[Tensor], say: Announcer) -> Run:
    say.step("parity: transformers reads the source in float32")
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        ).eval()
    finally:
        if progress:
            logging.enable_progress_bar()
    layers = model.get_decoder().layers
    seen: list[Tensor] = []
    # The model's own list of hidden states holds the last layer only after the final norm.
    layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    runs: Run = []
    for tokens in batches:
        seen.clear()
        with _watched(layers, "transformers", tokens, say):
            logits = model(input_ids=tokens, use_cache=False).logits
        runs.append((list(seen), logits))
    return runs


def _run_ours(spec: ModelSpec, state: Mapping[str, Tensor], batches: list[Tensor], say: Announcer) -> Run:
    with torch.device("meta"):
        model = Decoder(spec)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True, assign=True)
    model.eval()
    runs: Run = []
    for tokens in batches:
        with _watched(model.layers, "ours", tokens, say):
            hidden = model.hidden_states(tokens)
        runs.append((hidden, F.linear(model.norm(hidden[-1]), model.head_weight)))
    return runs


@contextmanager
def _watched(layers: Iterable[Any], whose: str, tokens: Tensor, say: Announcer) -> Iterator[None]:
    """Announce one sequence (1, T), and every layer of it that ends after a while."""
    blocks, handles = list(layers), []
    text = f"parity: {whose}, {tokens.shape[1]:,} tokens"
    say.step(f"{text}, {len(blocks)} layers")
    for number, block in enumerate(blocks, start=1):
        after = f"{text}, layer {number} of {len(blocks)} done"
        handles.append(block.register_forward_hook(lambda *_, after=after: say.progress(after)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compare(
    theirs: Run, ours: Run, lengths: tuple[int, ...], not_crossed: tuple[int, ...], say: Announcer
) -> ParityReport:
    parts = ["the embeddings", *(f"layer {i}" for i in range(len(ours[0][0]) - 1))]
    errors = dict.fromkeys(parts, 0.0)
    difference = largest = 0.0
    agree = positions = 0
    divergence = 0.0
    for (their_hidden, their_logits), (our_hidden, our_logits) in zip(theirs, ours, strict=True):
        say.step(f"parity: comparing the logits of {their_logits.shape[1]:,} tokens")
        for part, a, b in zip(parts, their_hidden, our_hidden, strict=True):
            errors[part] = _worse(errors[part], ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item())
        difference = _worse(difference, (their_logits - our_logits).abs().max().item())
        largest = _worse(largest, their_logits.abs().max().item())
        agree += int((their_logits.argmax(-1) == our_logits.argmax(-1)).sum())
        positions += their_logits.shape[1]
        divergence += _summed_kl(their_logits[0], our_logits[0])
    return ParityReport(
        lengths=lengths,
        max_abs_logit_diff=difference,
        limit=LOGIT_LIMIT * max(1.0, largest),
        largest_logit=largest,
        top1_agreement=agree / positions,
        kl_nats=divergence / positions,
        layer_errors=errors,
        windows_not_crossed=not_crossed,
    )


def _summed_kl(theirs: Tensor, ours: Tensor) -> float:
    """Sum over positions of KL(theirs || ours) in nats, float64, a few positions at a time."""
    total = 0.0
    for a, b in zip(theirs.split(64), ours.split(64), strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        total += F.kl_div(q, p, log_target=True, reduction="sum").item()
    return total


def _worse(a: float, b: float) -> float:
    """The larger one; NaN beats everything, so that a NaN can never pass."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
