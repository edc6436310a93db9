"""What a probe is asked for, and what is chosen where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ttt_lit.convert.fast_mlp import LayerPolicy
from ttt_lit.model.spec import ModelSpec
from ttt_lit.ttt.inner import InnerLoop
from ttt_lit.verdict.statistics import MIN_DOCUMENTS

Precision = Literal["32-true", "bf16-mixed"]

CLIP = InnerLoop().clip
"""Limit on the inner gradient's norm in the probe: a run's own default."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A probe of one checkpoint on one data set. Fields as the options of ``python cli.py probe``; see docs/probe.md."""

    checkpoint: str
    data: str
    output: str | None = None
    context: int | None = None
    windows: Sequence[int] | None = None
    sinks: Sequence[int] = (0, 1, 4, 16)
    stride: int | None = None
    max_documents: int = MIN_DOCUMENTS
    sweep_documents: int | None = None
    layer_documents: int | None = None
    keep_layers: int = 2
    inner_rates: Sequence[float] = (1.0, 0.3, 0.1, 0.03)
    chunk: int | None = None
    ttt_layers: Sequence[str] | None = None
    max_minutes: float | None = None
    precision: Precision | None = None
    device: str | None = None

    @property
    def folder(self) -> Path:
        """Where the results go: named after the checkpoint, whose own folder is often called ``checkpoint``."""
        if self.output is not None:
            return Path(self.output)
        path = Path(self.checkpoint).absolute()
        return Path("probes") / (path.parent.name if path.name == "checkpoint" else path.name)


def choose_device(name: str | None) -> torch.device:
    """``--device``, or CUDA where there is one, else the CPU. ValueError for one that is not here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name is None else None
    try:
        device = device or torch.device(str(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device: got {name}, expected cpu, cuda or another device that torch has here ({error})"
        ) from error
    return device


def choose_precision(device: torch.device) -> Precision:
    """bf16-mixed where the hardware multiplies bfloat16 faster: CUDA, and CPUs with matrix tiles. docs/probe.md says how exact that is."""
    fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False))
    return "bf16-mixed" if fast else "32-true"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A probe in numbers."""

    context: int
    windows: tuple[int, ...]
    """Ascending."""
    window: int
    """The middle one of those below the context, at which sinks, layers and the inner loop are tried."""
    strides: dict[int, int]
    """Window → tokens of a piece; windows that cut nothing have none."""
    sinks: tuple[int, ...]
    """Ascending."""
    rates: tuple[float, ...]
    chunk: int | None
    """None where no rate is tried."""
    sweep_documents: int
    layer_documents: int


def curve_buckets(context: int) -> list[tuple[int, int]]:
    """Equal ranges ``(start, stop)`` of positions, at most 32: a window that is a multiple of context/32 ends one."""
    parts = min(32, context)
    return [(context * part // parts, context * (part + 1) // parts) for part in range(parts)]


def make_plan(config: ProbeConfig, context: int) -> Plan:
    """Resolve a configuration for blocks of ``context`` tokens. ValueError, naming the option, for what does not fit."""
    windows = tuple(
        sorted({max(1, context // part) for part in (8, 4, 2)} if config.windows is None else set(config.windows))
    )
    chunk = min(1024, max(1, context // 8)) if config.chunk is None else config.chunk
    sweep = min(4, config.max_documents) if config.sweep_documents is None else config.sweep_documents
    layer = min(2, sweep) if config.layer_documents is None else config.layer_documents
    problems = [
        *([] if windows and windows[0] >= 1 else [f"--windows: got {list(windows)}, expected at least 1 token each"]),
        *(
            []
            if config.sinks and min(config.sinks) >= 0
            else [f"--sinks: got {list(config.sinks)}, expected 0 or more tokens each"]
        ),
        *(
            []
            if min(config.inner_rates, default=0) >= 0
            else [f"--inner-rates: got {list(config.inner_rates)}, expected at least 0"]
        ),
    ]
    least = {"max-documents": (config.max_documents, 1), "keep-layers": (config.keep_layers, 0)}
    problems += [f"--{name}: got {got}, expected at least {low}" for name, (got, low) in least.items() if got < low]
    among = [("sweep", sweep, 1, "max", config.max_documents), ("layer", layer, 0, "sweep", sweep)]
    problems += [
        f"--{name}-documents: got {got}, expected {low} to {high}, the documents of --{of}-documents, of which these are some"
        for name, got, low, of, high in among
        if not low <= got <= max(low, high)
    ]
    problems += [
        f"--{name}: got {' '.join(map(str, value))} without an inner rate, which it is for; leave it out, or give --inner-rates"
        for name, value in (("chunk", [config.chunk]), ("ttt-layers", config.ttt_layers))
        if value not in (None, [None]) and not config.inner_rates
    ]
    if config.inner_rates and (chunk < 1 or context % chunk or context == chunk):
        problems.append(f"--chunk: got {chunk}, expected a proper divisor of the context of {context} tokens")
    if config.stride is not None and any(w < context <= w + config.stride for w in windows) or (config.stride or 1) < 1:
        problems.append(
            f"--stride: got {config.stride} with windows {list(windows)}, expected at least 1, and window + stride below the context of "
            f"{context}: positions before that are not cut"
        )
    cutting = [window for window in windows if window < context - 1]
    if not cutting:
        problems.append(f"--windows: got {list(windows)}, expected one below the context of {context} tokens")
    if problems:
        raise ValueError("; ".join(problems))
    return Plan(
        context=context,
        windows=windows,
        window=cutting[(len(cutting) - 1) // 2],
        strides={w: config.stride or max(1, min(w, (context - w) // 2)) for w in cutting},
        sinks=tuple(sorted(set(config.sinks))),
        rates=tuple(dict.fromkeys(config.inner_rates)),
        chunk=chunk if config.inner_rates else None,
        sweep_documents=sweep,
        layer_documents=layer,
    )


def layer_policy(given: Sequence[str] | None, spec: ModelSpec) -> LayerPolicy | list[int]:
    """``--ttt-layers`` as ``model.ttt.layers`` has it: a policy's name or indices; the arms' own where nothing is given."""
    if given is None:
        return "global" if len({layer.window is None for layer in spec.layers}) > 1 else "last_quarter"
    if all(word.isdigit() for word in given):
        return [int(word) for word in given]
    if len(given) == 1 and given[0] in ("last_quarter", "global", "global_suffix"):
        return given[0]  # type: ignore[return-value]
    raise ValueError(
        f"--ttt-layers: got {' '.join(given)}, expected last_quarter, global, global_suffix, or layer indices"
    )
