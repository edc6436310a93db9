"""The machine a step runs on: how its time is taken and its memory counted."""

import gc
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_lit.plan.live_bytes import LiveBytes


class Cpu:
    name, unit, unit_bytes = "cpu", "MiB", 2**20
    memory = 0
    """Bytes that arms may fill unless told otherwise."""

    def timed(self, step: Callable[[], object]) -> float:
        """Seconds; of one thread those that it ran, so that other processes take none of them."""
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        step()
        return clock() - start

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
