"""Bytes of tensors that are alive: counted by reference, so the numbers are the same in every run and on every machine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages made inside the block; what existed before (parameters, inputs) does not count.

    Works on fake tensors too, which have sizes and no memory. What an operator allocates inside and frees again is not seen.
    """

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in existing}
        self._refs: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0
        """Bytes in ``_refs``, storages that have died since the last look included."""
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        # Looking for the dead costs time, and without them the peak is no higher.
        if self._bound > self.peak:
            self.peak = max(self.peak, self._alive())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        # While a reference is held the address belongs to no other storage.
        if key not in self._refs:
            self._refs[key] = (StorageWeakRef(storage), size)
            self._bound += size

    def _alive(self) -> int:
        self._refs = {key: entry for key, entry in self._refs.items() if not entry[0].expired()}
        self._bound = sum(size for _, size in self._refs.values())
        return self._bound

    def take_peak(self) -> int:
        """The highest number of bytes since the last call; counting starts again from what is alive."""
        peak, self.peak = self.peak, self._alive()
        return peak

    def now(self) -> int:
        """Bytes that are alive after garbage has been collected."""
        gc.collect()
        return self._alive()
