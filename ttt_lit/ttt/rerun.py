"""Run a function without keeping its graph, and run it again when its gradient is wanted.

``torch.utils.checkpoint`` does this for ordinary functions. One that takes an inner gradient it rebuilds during the forward, and what
the inner gradient did not read stays alive until the backward: a large part of every chunk's attention. Here the forward runs
without a graph of its own and only the inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def rerun(function: Callable[..., Any], *args: Any, parameters: Sequence[Tensor]) -> Any:
    """``function(*args)``, differentiable once with respect to the tensors in ``args`` and to ``parameters``.

    Args:
        function: called without grad mode in the forward, with grad mode in the backward; both must return equal values. It may nest
            tensors in tuples, named tuples, lists and dicts.
        args: tensors anywhere in them become inputs; everything else is passed on as it is.
        parameters: tensors that ``function`` reads by itself, from a module.
    """
    leaves, structure = pytree.tree_flatten(args)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def call(tensors: Sequence[Tensor]) -> Any:
        filled = list(constants)
        for i, tensor in zip(where, tensors, strict=True):
            filled[i] = tensor
        return function(*pytree.tree_unflatten(filled, structure))

    run = _Call(call, num_inputs=len(where), device=leaves[where[0]].device.type)
    flat = _Rerun.apply(run, *(leaves[i] for i in where), *parameters)
    assert run.structure is not None
    return pytree.tree_unflatten(list(flat), run.structure)


class _Call:
    """A function of a flat list of tensors, to be called twice under the same autocast settings."""

    def __init__(self, function: Callable[[Sequence[Tensor]], Any], *, num_inputs: int, device: str) -> None:
        self.function, self.num_inputs = function, num_inputs
        self.structure: pytree.TreeSpec | None = None
        self.device = device
        self.enabled = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled):
            flat, self.structure = pytree.tree_flatten(self.function(tensors))
        return flat


class _Rerun(torch.autograd.Function):
    """Thin and eager: used once per chunk, never compiled, and its own backward is never differentiated."""

    @staticmethod
    def forward(ctx: Any, run: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(run(tensors[: run.num_inputs]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, run = ctx.saved_tensors, ctx.run
        # Cut from the outer graph; the parameters are leaves already, and the function reads these very tensors.
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in saved[: run.num_inputs]]
        with torch.enable_grad():
            outputs = run(inputs)
        pairs = [(out, g) for out, g in zip(outputs, gradients, strict=True) if g is not None and out.requires_grad]
        tensors = [*inputs, *saved[run.num_inputs :]]
        wanted = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
        found = torch.autograd.grad(
            [out for out, _ in pairs], [tensors[i] for i in wanted], [g for _, g in pairs], allow_unused=True
        )
        by_index = dict(zip(wanted, found, strict=True))
        return None, *(by_index.get(i) for i in range(len(tensors)))
