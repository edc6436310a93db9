"""One training step of TTT beside a dense one: time, operations and memory of every way to compute it, interleaved in one run.

    python benchmarks/meta_step.py [--context 1024 2048] [--json FILE] [--markdown FILE]
    python benchmarks/meta_step.py --device cuda --markdown FILE

A step is forward and backward of one micro-batch of random tokens and weights, plus AdamW with ``--optimizer adamw`` (the default on
CUDA). The arms, ``KIND`` or ``KIND:POLICY``, are

- dense, swa: no prime MLPs, full attention or a window; ``dense:recompute`` runs every block again in the backward;
- naive, naive_recompute: one autograd graph over all chunks (``naive_step.py``), without and with torch's checkpoint;
- engine: exact meta-gradients as training computes them, once for every policy;
- first_order: the same, with the updates' gradients constant.

The policies of the engine are recompute, keep, factors, two_level, offload, and two that are found by measuring: equal_memory (the least
work whose peak is not above that of naive_recompute) and fill (not above --memory-gib, by default what the GPU has).

Before anything is timed, naive and engine must agree in loss and in every gradient, and on CUDA the Triton kernels with their plain twin;
else the exit status is 1 and there is no table. Every exact arm that is timed is compared too, at the context it is timed at.

On one core of an EPYC the default takes about 40 minutes, contexts of 1,024 and 2,048 alone take 6. On a GPU the longest context takes most
of the time, and compilation some minutes: start with ``--context 8192 --rounds 3``.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from naive_step import naive_flops, naive_loss
from torch import Tensor

from ttt_lit.model.decoder import Decoder
from ttt_lit.model.flops import chunks_kept, product_numbers, training_flops
from ttt_lit.model.spec import LayerSpec, ModelSpec, PrimeSpec, last_quarter
from ttt_lit.ops import tiled_attention
from ttt_lit.ops.attention import choose_kernel, kernels_that_ran
from ttt_lit.train.live_bytes import LiveBytes
from ttt_lit.ttt.compiled import wants_compilation
from ttt_lit.ttt.model import TTTModel
from ttt_lit.ttt.settings import KEEP_ALL, EngineConfig

INNER = {"inner_lr": 1.0, "clip": 1.0}
STD = 0.02
POLICIES = {
    "recompute": EngineConfig(),
    "keep": KEEP_ALL,
    "factors": EngineConfig(fast_weights="factors"),
    "two_level": EngineConfig(fast_weights="two_level"),
    "offload": EngineConfig(fast_weights="offload"),
}
SEARCHED = ("equal_memory", "fill")
KINDS = {
    "dense": "none",
    "swa": "none",
    "naive": "meta",
    "naive_recompute": "meta",
    "engine": "meta",
    "first_order": "first_order",
}
"""Arm → mode."""
_SIZE_NAMES = ("hidden", "mlp", "layers", "heads", "kv_heads", "vocab", "window", "chunk")
SIZES = {
    "small": dict(zip(_SIZE_NAMES, (256, 768, 8, 4, 4, 2048, 512, 256), strict=True)),
    "qwen2.5-1.5b": dict(zip(_SIZE_NAMES, (1536, 8960, 28, 12, 2, 151936, 8192, 1024), strict=True)),
}
ROPE_BASE = {"small": 10_000.0, "qwen2.5-1.5b": 1e6}
QKV_BIAS = {"qwen2.5-1.5b"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "shape": "small",
        "context": [1024, 2048, 4096, 8192],
        "precision": "32",
        "optimizer": "none",
        "compile": False,
        "arms": ["dense", "swa", "naive", "naive_recompute", "engine", "first_order:keep"],
        "policy": ["recompute", "equal_memory", "keep"],
    },
    "cuda": {
        "shape": "qwen2.5-1.5b",
        "context": [8192, 32768, 131072],
        "precision": "bf16",
        "optimizer": "adamw",
        "compile": True,
        "arms": [
            "dense",
            "dense:recompute",
            "swa:recompute",
            "naive",
            "naive_recompute",
            "engine",
            "first_order:recompute",
        ],
        "policy": ["recompute", "factors", "two_level", "fill"],
    },
}
# Per tensor, as a share of its norm. bfloat16 rounds every intermediate result to 8 bits, in another order on either side: 0.05 has been
# seen, and 0.4 where the second order is missing. That the method is the same is shown in float32.
TOLERANCE = {"32": 1e-3, "bf16": 0.2}
# A tensor whose gradient almost cancels carries rounding noise of the whole gradient's size.
NOISE = {"32": 1e-5, "bf16": 1e-3}
KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Disagreement(Exception):
    """Two computations of one thing differ, or could not be compared: a timing of either would say nothing."""


# Devices --------------------------------------------------------------------------------------------------------------------------


class Cpu:
    name, unit, unit_bytes = "cpu", "MiB", 2**20
    memory = 0
    """Bytes that arms may fill unless told otherwise."""

    def timed(self, step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def peak(self, step: Callable[[], object], existing: Iterable[Tensor]) -> int:
        """Bytes of tensors alive at once beyond the existing ones. Counting sees what is executed eagerly."""
        with torch.compiler.set_stance("force_eager"), _LiveBytesInside(*existing) as live:
            step()
        return live.peak

    def clear(self) -> None:
        gc.collect()

    def describe(self) -> dict[str, Any]:
        return {}


class Cuda:
    name, unit, unit_bytes = "cuda", "GiB", 2**30

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch finds no CUDA device; use --device cpu")
        # Arms of different shapes take turns: blocks that fit one of them must not be lost to the next.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        self.memory = torch.cuda.get_device_properties(0).total_memory

    def timed(self, step: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def peak(self, step: Callable[[], object], existing: Iterable[Tensor]) -> int:
        """Bytes allocated at once beyond what was allocated before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        return {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory_gib": round(self.memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }


class _LiveBytesInside(LiveBytes):
    """Also what this package's own operators make inside: the other side's operators are all plain ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace != "ttt_lit":
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return torch._library.custom_ops.OPDEFS[f"ttt_lit::{func._opname}"]._init_fn(*args, **(kwargs or {}))


# Arms -----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Arm:
    kind: str
    policy: str | None
    engine: EngineConfig | None = None
    """None: naive, or not chosen yet."""
    flops: float | None = None
    """Per token, as the arm's policy asks for."""
    first_seconds: float | None = None
    seconds: list[float | None] = field(default_factory=list)
    """One entry for every round."""
    peak: int | None = None
    error: float | None = None
    """Of the gradient, against the context's first exact arm."""
    note: str | None = None
    failure: str | None = None

    @property
    def name(self) -> str:
        return self.kind if self.policy is None else f"{self.kind}:{self.policy}"

    @property
    def mode(self) -> Any:
        return KINDS[self.kind]

    @property
    def median(self) -> float | None:
        times = [t for t in self.seconds if t is not None]
        return statistics.median(times) if times and self.failure is None else None


def make_arms(names: Iterable[str], policies: Sequence[str]) -> list[Arm]:
    """An arm of the engine that names no policy stands for one arm per policy."""
    arms = []
    for name in names:
        kind, _, policy = name.partition(":")
        chosen: Sequence[str | None] = [policy or None]
        if kind in ("engine", "first_order"):
            chosen = [policy] if policy else policies
        known = {"dense": ("recompute",), "swa": ("recompute",), "naive": (), "naive_recompute": ()}
        allowed = known.get(kind, (*POLICIES, *SEARCHED))
        if kind not in KINDS or any(p is not None and p not in allowed for p in chosen):
            raise SystemExit(
                f"--arms: got {name!r}, expected KIND or KIND:POLICY of {', '.join(KINDS)} and {', '.join(allowed)}"
            )
        arms += [Arm(kind, p) for p in chosen]
    return arms


def make_specs(shape: str, sizes: Mapping[str, int]) -> dict[str, ModelSpec]:
    """The network with its windows (``ttt``), and the same parameters with full attention (``dense``)."""
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
    return {"ttt": spec, "dense": with_window(spec, None)}


def with_window(spec: ModelSpec, window: int | None) -> ModelSpec:
    return spec.with_layers(tuple(dataclasses.replace(layer, window=window) for layer in spec.layers))


# Steps ----------------------------------------------------------------------------------------------------------------------------


class Bench:
    """One model on one device, read by every arm; gradients are absent before and after every measurement."""

    def __init__(self, arguments: argparse.Namespace, sizes: Mapping[str, int], device: Cpu | Cuda) -> None:
        self.arguments, self.sizes, self.device = arguments, sizes, device
        self.specs = make_specs(arguments.shape, sizes)
        self.compiled = wants_compilation(arguments.compile, torch.device(device.name))
        self.precision = arguments.precision
        with torch.device(device.name):
            decoder = Decoder(self.specs["ttt"])
        decoder.initialise(STD, torch.Generator(device.name).manual_seed(0))
        self.decoder, self.model = decoder, TTTModel(decoder)
        self.optimizer = _adamw(decoder, device) if arguments.optimizer == "adamw" else None
        self.tokens = torch.empty(0)

    @property
    def context(self) -> int:
        return self.tokens.shape[1] - 1

    def draw(self, context: int) -> None:
        shape = (self.arguments.batch, context + 1)
        tokens = torch.randint(self.sizes["vocab"], shape, generator=torch.Generator().manual_seed(0))
        self.tokens = tokens.to(self.device.name)

    def prepare(self, arm: Arm) -> None:
        """Everything of a step that is not timed."""
        self.decoder.set_spec(self.specs["dense" if arm.kind == "dense" else "ttt"])
        if arm.engine is not None:
            self.model.engine = arm.engine
        self.decoder.zero_grad(set_to_none=True)
        gc.collect()

    def forward_backward(self, arm: Arm) -> Tensor:
        chunk, half = self.sizes["chunk"], self.precision == "bf16"
        with torch.autocast(self.device.name, dtype=torch.bfloat16, enabled=half):
            if arm.kind.startswith("naive"):
                recompute = arm.kind == "naive_recompute"
                loss = naive_loss(self.decoder, self.tokens, chunk=chunk, recompute=recompute, **INNER)
            else:
                loss = self.model(self.tokens, mode=arm.mode, chunk=chunk, **INNER).loss
        loss.backward()
        return loss.detach()

    def step(self, arm: Arm) -> Tensor:
        loss = self.forward_backward(arm)
        if self.optimizer is not None:
            self.optimizer.step()
        return loss

    def peak(self, arm: Arm) -> int:
        """Bytes beyond parameters and the optimiser's state."""
        self.prepare(arm)
        found = self.device.peak(lambda: self.forward_backward(arm), [*self.decoder.parameters(), self.tokens])
        self.decoder.zero_grad(set_to_none=True)
        return found

    def peak_or_infinity(self, arm: Arm) -> float:
        found = math.inf
        with contextlib.suppress(torch.OutOfMemoryError):
            found = self.peak(arm)
        if found == math.inf:
            self.clear()
        return found

    def clear(self) -> None:
        self.decoder.zero_grad(set_to_none=True)
        self.device.clear()

    def take_gradients(self) -> dict[str, Tensor]:
        """Gradients by name; absent ones are left out."""
        found = {n: p.grad for n, p in self.decoder.named_parameters() if p.grad is not None}
        self.decoder.zero_grad(set_to_none=True)
        return found


def _adamw(decoder: Decoder, device: Cpu | Cuda) -> torch.optim.AdamW:
    # The rate is 0: every arm and round sees the same weights, and the work is the same.
    return torch.optim.AdamW(decoder.parameters(), lr=0.0, weight_decay=0.1, fused=device.name == "cuda")


# Checks ---------------------------------------------------------------------------------------------------------------------------


def _worst(errors: Mapping[str, float]) -> tuple[float, str]:
    """What is not a number is worst of all."""
    return max((math.inf if math.isnan(error) else error, name) for name, error in errors.items())


class Reference:
    """Loss and gradients that every other exact arm must have too; kept on the host, whose memory is not measured there."""

    def __init__(self, name: str, loss: float, gradients: Mapping[str, Tensor], precision: str) -> None:
        self.name, self._loss, self._precision = name, loss, precision
        self._norms = {name: torch.linalg.vector_norm(g).item() for name, g in gradients.items()}
        self._gradients = {name: g.cpu() for name, g in gradients.items()}

    def error(self, gradients: Mapping[str, Tensor]) -> tuple[float, str]:
        """Largest ‖difference‖ / ‖gradient‖ of a tensor, and its name."""
        if gradients.keys() != self._gradients.keys():
            return math.inf, sorted(gradients.keys() ^ self._gradients.keys())[0]
        noise = NOISE[self._precision] * math.hypot(*self._norms.values())
        differences = {
            n: torch.linalg.vector_norm(g - self._gradients[n].to(g.device)).item() for n, g in gradients.items()
        }
        return _worst({name: d / (self._norms[name] + noise) for name, d in differences.items()})

    def require(self, name: str, loss: float, gradients: Mapping[str, Tensor]) -> float:
        """The largest error of a gradient; Disagreement if it is above the tolerance."""
        error, where = self.error(gradients)
        limit = TOLERANCE[self._precision]
        off = abs(loss - self._loss) / abs(self._loss)
        if not (error <= limit and off <= limit / 10):
            raise Disagreement(
                f"{name} and {self.name} disagree: gradient of {where} off by {error:.1e} of its norm (limit {limit:g}), loss "
                f"{loss:.6f} and {self._loss:.6f}; nothing is timed"
            )
        return error


def check_short(bench: Bench) -> list[dict[str, Any]]:
    """Naive against engine on three chunks and a window that cuts: in float32 as it comes, and as it is timed."""
    window, chunk = bench.sizes["window"], bench.sizes["chunk"]
    bench.draw(3 * chunk)
    kept = bench.specs
    bench.specs = {"ttt": with_window(kept["ttt"], min(window, 3 * chunk // 2))}
    # What is compiled stays compiled, so that comes last.
    variants = [("32", False), (bench.arguments.precision, bench.compiled)]
    try:
        return [_check_variant(bench, *variant) for variant in dict.fromkeys(variants)]
    except torch.OutOfMemoryError as problem:
        raise Disagreement("the check of naive against engine does not fit in memory, so nothing is timed") from problem
    finally:
        bench.specs, bench.precision = kept, bench.arguments.precision


def _check_variant(bench: Bench, precision: str, compiled: bool) -> dict[str, Any]:
    bench.precision = precision
    engine = dataclasses.replace(POLICIES["recompute"], compile=compiled)

    def results(kind: str) -> tuple[float, dict[str, Tensor]]:
        arm = Arm(kind, None, None if kind == "naive_recompute" else engine)
        bench.prepare(arm)
        return bench.forward_backward(arm).item(), bench.take_gradients()

    reference = Reference("naive", *results("naive_recompute"), precision)
    error = reference.require("engine", *results("engine"))
    distance, _ = reference.error(results("first_order")[1])
    return {
        "context": bench.context,
        "precision": precision,
        "compiled": compiled,
        "largest_gradient_error": error,
        "limit": TOLERANCE[precision],
        "first_order_error": distance,
    }


def check_kernels(
    ours: ModuleType, shapes: Iterable[tuple[int, int]], sizes: Mapping[str, int], batch: int, device: str
) -> list[dict[str, Any]]:
    """The attention functions of ``ours`` against the plain twin in float32, for (queries, keys) of the step."""
    found = []
    for queries, keys in shapes:
        for dtype, limit in KERNEL_TOLERANCE.items():
            errors = _kernel_errors(ours, queries, keys, sizes, batch, device, dtype)
            error, name = _worst(errors)
            kind = str(dtype).removeprefix("torch.")
            if error > limit:
                raise Disagreement(
                    f"{ours.__name__} and tiled_attention disagree on {queries} queries of {keys} keys in {kind}: {name} is "
                    f"off by {error:.1e} of its norm (limit {limit:g}); nothing is timed"
                )
            found.append({"queries": queries, "keys": keys, "dtype": kind, "largest_error": error, "limit": limit})
    return found


def _kernel_errors(
    ours: ModuleType, queries: int, keys: int, sizes: Mapping[str, int], batch: int, device: str, dtype: torch.dtype
) -> dict[str, float]:
    width, scale, window = (
        sizes["hidden"] // sizes["heads"],
        (sizes["hidden"] / sizes["heads"]) ** -0.5,
        sizes["window"],
    )
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: str, length: int) -> Tensor:
        shape = (batch, sizes[heads], length, width)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, do, dto, tq = (random("heads", queries) for _ in range(4))
    k, v = (random("kv_heads", keys) for _ in range(2))
    tk, tv = (random("kv_heads", queries) for _ in range(2))

    def results(functions: ModuleType, *given: Tensor) -> Iterator[tuple[str, Tensor]]:
        q, k, v, do, dto, tq, tk, tv = given
        o, lse = functions.forward(q, k, v, scale, window)
        yield from zip(("o", "lse"), (o, lse), strict=True)
        gradients = functions.backward(do, q, k, v, o, lse, scale, window, queries)
        yield from zip(("dq", "dk", "dv"), gradients, strict=True)
        to, mu = functions.jvp(q, k, v, o, lse, tq, tk, tv, scale, window)
        yield from zip(("to", "mu"), (to, mu), strict=True)
        second = functions.dual_backward(do, dto, q, k, v, o, lse, to, mu, tq, tk, tv, scale, window)
        yield from zip(("second dq", "second dk", "second dv", "dtq", "dtk", "dtv"), second, strict=True)

    given = (q, k, v, do, dto, tq, tk, tv)
    wanted = results(tiled_attention, *(t.float() for t in given))
    return {
        name: (torch.linalg.vector_norm(x.float() - y) / torch.linalg.vector_norm(y)).item()
        for (name, x), (_, y) in zip(results(ours, *given), wanted, strict=True)
    }


def check_triton(bench: Bench, contexts: Sequence[int]) -> list[dict[str, Any]]:
    """Nothing where the Triton kernels do not serve."""
    sizes, dtype = bench.sizes, torch.bfloat16 if bench.arguments.precision == "bf16" else torch.float32
    head_dim, device = sizes["hidden"] // sizes["heads"], torch.device(bench.device.name)
    window, batch = sizes["window"], bench.arguments.batch
    if choose_kernel(device=device, dtype=dtype, head_dim=head_dim, window=window, second_order=True) != "triton":
        return []
    from ttt_lit.ops import triton_attention

    chunk = sizes["chunk"]
    # The first chunk, one that carries a full window, and whole sequences as the blocks below read them.
    shapes = {(chunk, chunk), *((chunk, min(context, chunk + window - 1)) for context in contexts)}
    shapes |= {(context, context) for context in contexts if context > window}
    return check_kernels(triton_attention, sorted(shapes), sizes, batch, bench.device.name)


# Policies -------------------------------------------------------------------------------------------------------------------------


def settle(bench: Bench, arm: Arm, arms: Sequence[Arm]) -> None:
    """Choose what the arm keeps, and count its operations."""
    if arm.policy in SEARCHED:
        _search(bench, arm, arms)
    elif arm.kind in ("dense", "swa"):
        arm.engine = EngineConfig(recompute_blocks=arm.policy == "recompute", compile=bench.compiled)
    elif not arm.kind.startswith("naive"):
        arm.engine = dataclasses.replace(POLICIES[arm.policy or "recompute"], compile=bench.compiled)
    if arm.failure is None:
        arm.flops = count_flops(bench, arm)


def count_flops(bench: Bench, arm: Arm) -> float:
    context, chunk = bench.context, bench.sizes["chunk"]
    spec = bench.specs["dense" if arm.kind == "dense" else "ttt"]
    if arm.kind.startswith("naive"):
        return naive_flops(spec, context=context, chunk=chunk, recompute=arm.kind == "naive_recompute")
    assert arm.engine is not None
    blocks = arm.engine.recompute_blocks
    if arm.mode == "none":
        return training_flops(spec, context=context, mode="none", recompute_blocks=blocks).total
    return training_flops(
        spec,
        context=context,
        mode=arm.mode,
        chunk=chunk,
        recompute_blocks=blocks,
        kept_chunks=_kept(bench, arm.engine),
        fast_weights=arm.engine.fast_weights,
    ).total


def _chunk_numbers(bench: Bench) -> dict[str, Any]:
    tokens = bench.arguments.batch * bench.sizes["chunk"]
    return {"tokens": tokens, "number_bytes": 2 if bench.arguments.precision == "bf16" else 4}


def _kept(bench: Bench, engine: EngineConfig) -> int:
    """Chunks whose matrix products are kept."""
    chunks = bench.context // bench.sizes["chunk"]
    return chunks_kept(bench.specs["ttt"], chunks=chunks, budget_bytes=engine.residual_bytes, **_chunk_numbers(bench))


def _search(bench: Bench, arm: Arm, arms: Sequence[Arm]) -> None:
    """The least work among the settings whose measured peak is within the target."""
    target = _target(bench, arm, arms)
    if target is None:
        return
    numbers = _chunk_numbers(bench)
    chunk_bytes = product_numbers(bench.specs["ttt"]) * numbers["tokens"] * numbers["number_bytes"]
    chunks, fitting = bench.context // bench.sizes["chunk"], []
    for blocks in (False, True):

        def engine(kept: int, blocks: bool = blocks) -> EngineConfig:
            budget = (kept + 0.5) * chunk_bytes / 2**30 if kept else 0.0
            return EngineConfig(recompute_blocks=blocks, residual_gib=budget, compile=bench.compiled)

        def peak(kept: int, engine: Callable[[int], EngineConfig] = engine) -> float:
            return bench.peak_or_infinity(Arm(arm.kind, arm.policy, engine(kept)))

        most = most_kept(peak, target, chunks, chunk_bytes)
        if most is not None:
            fitting.append(engine(most))
        if most == chunks:
            break
    if not fitting:
        arm.failure = "does not fit"
        arm.note = f"every setting is above {target / bench.device.unit_bytes:,.1f} {bench.device.unit}"
        return
    arm.engine = min(fitting, key=lambda e: count_flops(bench, Arm(arm.kind, arm.policy, e)))
    below = "run again" if arm.engine.recompute_blocks else "keep their graphs"
    arm.note = f"products of {_kept(bench, arm.engine)} of {chunks} chunks kept, blocks {below}"


def _target(bench: Bench, arm: Arm, arms: Sequence[Arm]) -> float | None:
    """Bytes beyond parameters and optimiser; None where there is no target, with the reason in the arm."""
    if arm.policy == "equal_memory":
        known = [a.peak for a in arms if a.kind == "naive_recompute" and a.peak is not None]
        target = known[0] if known else bench.peak_or_infinity(Arm("naive_recompute", None))
        if target == math.inf:
            arm.failure, arm.note = "no target", "naive_recompute does not fit, so there is no peak to equal"
            return None
        return target
    given = bench.arguments.memory_gib
    state = 2 if bench.optimizer is not None else 0
    resident = sum(p.nbytes for p in bench.decoder.parameters()) * (1 + state)
    # What the allocator, the compiler's kernels and other libraries hold is not in the count.
    return (0.92 * bench.device.memory if given is None else given * 2**30) - resident


def most_kept(peak: Callable[[int], float], target: float, chunks: int, chunk_bytes: float) -> int | None:
    """The largest number of kept chunks whose peak is within the target; None: not even none. Peaks are nearly affine: few probes."""
    low, high, at = -1, chunks + 1, 0
    while high - low > 1:
        found = peak(at)
        low, high = (at, high) if found <= target else (low, at)
        guess = (low + high) // 2 if math.isinf(found) else at + math.floor((target - found) / chunk_bytes)
        at = min(max(guess, low + 1), high - 1)
    return low if low >= 0 else None


# Measuring ------------------------------------------------------------------------------------------------------------------------


def attempt(bench: Bench, arm: Arm, action: Callable[[Arm], object]) -> None:
    """An arm that does not fit is out, and the others go on."""
    if arm.failure is not None:
        return
    try:
        action(arm)
    except torch.OutOfMemoryError:
        arm.failure = "out of memory"
    # After the handler: until then the traceback keeps the tensors alive.
    if arm.failure is not None:
        bench.clear()


def measure(bench: Bench, context: int) -> tuple[list[Arm], str | None]:
    """All arms at one context, and the name of the arm that gradients were compared with."""
    arguments = bench.arguments
    bench.draw(context)
    if bench.compiled:
        # Or the second context would be compiled for lengths that vary.
        torch._dynamo.reset()
    arms = make_arms(arguments.arms, arguments.policy)
    references: list[Reference] = []

    def first(arm: Arm) -> None:
        settle(bench, arm, arms)
        if arm.failure is None:
            _warm_up(bench, arm, references)
            arm.peak = bench.peak(arm)

    for arm in arms:
        _say(f"{context:,} tokens: {arm.name}, first step, check and memory")
        attempt(bench, arm, first)
    for number in range(arguments.rounds):
        turn = number % len(arms)
        for arm in arms[turn:] + arms[:turn]:
            _say(f"{context:,} tokens: round {number + 1} of {arguments.rounds}, {arm.name}")
            attempt(bench, arm, lambda arm: _time(bench, arm))
            arm.seconds += [None] * (number + 1 - len(arm.seconds))
    bench.clear()
    return arms, references[0].name if references else None


def _warm_up(bench: Bench, arm: Arm, references: list[Reference]) -> None:
    losses: list[Tensor] = []
    bench.prepare(arm)
    arm.first_seconds = bench.device.timed(lambda: losses.append(bench.step(arm)))
    if arm.mode == "meta":
        loss, gradients = losses[0].item(), bench.take_gradients()
        if references:
            arm.error = references[0].require(arm.name, loss, gradients)
        else:
            references.append(Reference(arm.name, loss, gradients, bench.precision))
    for _ in range(bench.arguments.warmup - 1):
        bench.prepare(arm)
        bench.step(arm)
    bench.decoder.zero_grad(set_to_none=True)


def _time(bench: Bench, arm: Arm) -> None:
    bench.prepare(arm)
    arm.seconds.append(bench.device.timed(lambda: bench.step(arm)))
    bench.decoder.zero_grad(set_to_none=True)


def _say(message: str) -> None:
    """Progress: one line that is overwritten, or lines of a log."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)
    elif message:
        print(message, file=sys.stderr, flush=True)


def _show(text: str) -> None:
    _say("")
    print(text, flush=True)


# Results --------------------------------------------------------------------------------------------------------------------------


def baseline_of(arms: Sequence[Arm]) -> Arm | None:
    """The first dense arm that fits."""
    return next((arm for arm in arms if arm.kind == "dense" and arm.median is not None), None)


def result_of(arm: Arm, baseline: Arm | None, tokens: int) -> dict[str, Any]:
    engine = None if arm.engine is None else dataclasses.asdict(arm.engine)
    if engine is not None and math.isinf(engine["residual_gib"]):
        engine["residual_gib"] = ".inf"
    result: dict[str, Any] = {
        "name": arm.name,
        "mode": arm.mode,
        "engine": engine,
        "failure": arm.failure,
        "note": arm.note,
    }
    times = [t for t in arm.seconds if t is not None]
    result |= {"first_step_seconds": arm.first_seconds, "seconds": arm.seconds, "peak_bytes": arm.peak}
    result |= {"gradient_error": arm.error, "flops_per_token": arm.flops}
    if arm.median is None:
        return result
    result |= {"median_seconds": arm.median, "min_seconds": min(times), "max_seconds": max(times)}
    result["tokens_per_second"] = tokens / arm.median
    if baseline is not None and baseline.flops is not None and arm.flops is not None:
        pairs = [(a, b) for a, b in zip(arm.seconds, baseline.seconds, strict=True) if a is not None and b is not None]
        result["time_ratio"] = statistics.median(a / b for a, b in pairs)
        result["flops_ratio"] = arm.flops / baseline.flops
        result["time_over_flops"] = result["time_ratio"] / result["flops_ratio"]
    return result


def table(result: Mapping[str, Any], device: Cpu | Cuda, *, compiled: bool) -> str:
    """One context as an aligned Markdown table."""
    head = ["arm", "median s", "min … max s", "tokens/s", "time ×", "FLOPs ×", "quotient"]
    head += [f"peak {device.unit}"] + (["first step s"] if compiled else [])
    rows = [head]
    for arm in result["arms"]:
        peak = "-" if arm["peak_bytes"] is None else f"{arm['peak_bytes'] / device.unit_bytes:,.1f}"
        row = [arm["name"], "-", "-", "-", "-", "-", "-", peak]
        if arm["failure"] is not None:
            row[2] = arm["failure"]
        elif "median_seconds" in arm:
            row[1] = f"{arm['median_seconds']:.3f}"
            row[2] = f"{arm['min_seconds']:.3f} … {arm['max_seconds']:.3f}"
            row[3] = f"{arm['tokens_per_second']:,.0f}"
            ratios = ("time_ratio", "flops_ratio", "time_over_flops")
            row[4:7] = [f"{arm[name]:.2f}" if name in arm else "-" for name in ratios]
        if compiled:
            row.append("-" if arm["first_step_seconds"] is None else f"{arm['first_step_seconds']:.1f}")
        rows.append(row)
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "| " + " | ".join("-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def section(result: Mapping[str, Any], device: Cpu | Cuda, *, compiled: bool) -> str:
    """One context: title, table, and what the table does not say."""
    lines = [f"### Context {result['context']:,}", "", table(result, device, compiled=compiled), ""]
    if result["baseline"] not in (None, "dense"):
        lines.append(f"- The ratios are to {result['baseline']}.")
    lines += [f"- {arm['name']}: {arm['note']}." for arm in result["arms"] if arm["note"]]
    errors = [arm["gradient_error"] for arm in result["arms"] if arm["gradient_error"] is not None]
    if errors:
        lines.append(
            f"- Exact arms agree with {result['reference']} in every gradient to {max(errors):.0e} of its norm."
        )
    return "\n".join(lines).rstrip() + "\n"


def preamble(record: Mapping[str, Any]) -> str:
    """Date, machine, what a step is, how to read the tables, and what was checked."""
    machine, versions, arguments = (record[name] for name in ("machine", "versions", "arguments"))
    where = f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB" if "gpu" in machine else machine["cpu"]
    threads = "" if "gpu" in machine else f", {_count(arguments['threads'], 'thread')}"
    step = "forward, backward and AdamW" if arguments["optimizer"] == "adamw" else "forward and backward"
    shape = ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in record["sizes"].items())
    parameters, prime = record["parameters"], record["prime_parameters"]
    lines = [
        f"{record['date'][:10]}, {where}{threads}; {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        f"A step is {step} of {_count(arguments['batch'], 'sequence')}, {_numbers(arguments['precision'], record['compiled'])}.",
        f"Network: {shape}; {parameters:,} parameters, of them {prime:,} in prime MLPs.",
        f"Times are medians of {_count(arguments['rounds'], 'interleaved round')}. time ×: as a multiple of the dense step, median of the "
        "rounds' ratios. FLOPs ×: what the arm's policy asks for, computing again included, as a multiple of the dense step. quotient: the "
        "first over the second. peak: bytes beyond parameters and optimizer state, gradients included.",
    ]
    for check in record["checks"]:
        lines.append(
            f"Checked: naive and engine agree in every gradient to {check['largest_gradient_error']:.0e} of its norm, where first order is "
            f"off by {check['first_order_error']:.2g} ({check['context']:,} tokens, {_numbers(check['precision'], check['compiled'])})."
        )
    if record["kernel_checks"]:
        worst = max(check["largest_error"] for check in record["kernel_checks"])
        lines.append(f"Checked: Triton attention and its plain twin agree in both orders to {worst:.0e}.")
    return "\n".join(textwrap.fill(f"- {line}", 108, subsequent_indent="  ") for line in lines) + "\n"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _numbers(precision: str, compiled: bool) -> str:
    return f"{'bf16 autocast' if precision == 'bf16' else 'float32'}, {'' if compiled else 'not '}compiled"


def describe(bench: Bench) -> dict[str, Any]:
    """Where, with what and on what: everything but the measurements."""
    names = ["torch", "triton", "flash_attn"]
    versions = {"Python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine = {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform()} | bench.device.describe()
    arguments = {name: str(v) if isinstance(v, Path) else v for name, v in vars(bench.arguments).items()}
    named = bench.decoder.named_parameters()
    return {
        "benchmark": "meta_step",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions,
        "arguments": arguments,
        "sizes": dict(bench.sizes),
        "inner": INNER,
        "parameters": bench.specs["ttt"].num_parameters(),
        "prime_parameters": sum(p.numel() for name, p in named if "prime" in name),
        "compiled": bench.compiled,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# Command line ---------------------------------------------------------------------------------------------------------------------


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SIZES), help="small on the CPU, qwen2.5-1.5b on CUDA")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SIZE=N", help=f"change sizes: {', '.join(SIZES['small'])}"
    )
    parser.add_argument("--context", type=int, nargs="+", help="tokens per sequence; several give several tables")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every arm")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before, at least one: it is checked")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--arms", nargs="+", metavar="KIND[:POLICY]")
    parser.add_argument(
        "--policy", nargs="+", choices=[*POLICIES, *SEARCHED], help="of the engine's arms that name none"
    )
    parser.add_argument(
        "--precision", choices=["32", "bf16"], help="bf16: autocast; weights and fast weights stay float32"
    )
    parser.add_argument("--optimizer", choices=["none", "adamw"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="off on the CPU, on on CUDA")
    parser.add_argument(
        "--memory-gib", type=float, help="what policy fill may use, parameters and optimizer state included"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file, after every context")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    arguments = parser.parse_args(given)
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if min(arguments.rounds, arguments.warmup, arguments.batch, arguments.threads) < 1:
        parser.error("--rounds, --warmup, --batch and --threads are at least 1")
    if (
        arguments.device == "cpu"
        and arguments.memory_gib is None
        and "fill" in " ".join(arguments.policy + arguments.arms)
    ):
        parser.error("policy fill on the CPU: say how much it may use with --memory-gib")
    for path in (arguments.json, arguments.markdown):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: the folder does not exist")
    return arguments


def sizes_of(arguments: argparse.Namespace) -> dict[str, int]:
    sizes = dict(SIZES[arguments.shape])
    for change in arguments.set:
        name, _, number = change.partition("=")
        if name not in sizes or not number.isdigit():
            raise SystemExit(f"--set: got {change!r}, expected SIZE=N with SIZE one of {', '.join(sizes)}")
        sizes[name] = int(number)
    odd = [context for context in arguments.context if context % sizes["chunk"] or context < 1]
    if odd:
        raise SystemExit(f"--context: got {odd[0]}, expected a multiple of the chunk of {sizes['chunk']} tokens")
    return sizes


def run(bench: Bench) -> None:
    """Check, then measure one context after the other; what is known by then is shown and written."""
    arguments = bench.arguments
    record = describe(bench)
    _say("checking naive against engine, and kernels")
    record |= {"checks": check_short(bench), "kernel_checks": check_triton(bench, arguments.context), "contexts": []}
    document = preamble(record)
    _show(document)
    for context in arguments.context:
        arms, reference = measure(bench, context)
        baseline = baseline_of(arms)
        results = [result_of(arm, baseline, context * arguments.batch) for arm in arms]
        found = {"context": context, "baseline": baseline and baseline.name, "reference": reference, "arms": results}
        record["contexts"].append(found)
        record["kernels"] = sorted(kernels_that_ran)
        text = section(found, bench.device, compiled=bench.compiled)
        _show(text)
        document += "\n" + text
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")
        if arguments.markdown:
            arguments.markdown.write_text(document)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    sizes = sizes_of(arguments)
    make_arms(arguments.arms, arguments.policy)
    torch.set_num_threads(arguments.threads)
    try:
        run(Bench(arguments, sizes, Cuda() if arguments.device == "cuda" else Cpu()))
    except Disagreement as problem:
        _say("")
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
