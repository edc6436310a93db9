"""Bytes of tensors that are alive: counted by reference, so the numbers are the same in every run and on every machine."""

import gc

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages made inside the block; what existed before (parameters, inputs) does not count."""

    def __init__(self, *existing):
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in existing}
        self._refs = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._refs[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self._alive())
        return out

    def _alive(self):
        # An expired entry is dropped at once: its address may be given to another storage.
        self._refs = {key: entry for key, entry in self._refs.items() if not entry[0].expired()}
        return sum(size for _, size in self._refs.values())

    def now(self):
        gc.collect()
        return self._alive()
