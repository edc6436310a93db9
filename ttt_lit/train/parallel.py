"""How a model is spread over ranks (FSDP2), filled with weights, and gathered again.

The plan follows from second order: every block below the lowest TTT layer is a unit of its own; the suffix, the final norm, the
embeddings and the head form the root unit. The inner gradient then never crosses a unit's boundary: a suffix block as its own unit
would free parameters in the middle of the inner backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ttt_lit.model.decoder import Decoder


def data_mesh(module: L.LightningModule) -> DeviceMesh | None:
    """The devices over which a run's models are sharded; None: they are whole."""
    if not isinstance(module.trainer.strategy, ModelParallelStrategy):
        return None
    assert module.device_mesh is not None
    mesh: DeviceMesh = module.device_mesh["data_parallel"]
    return mesh


class HasDecoder(Protocol):
    """What is sharded: a module around a decoder."""

    decoder: Decoder


def shard(model: HasDecoder, mesh: DeviceMesh) -> None:
    """Shard parameters over a one-dimensional mesh, in place. Master weights keep their dtype: no cast, compute runs under autocast."""
    assert isinstance(model, nn.Module)
    for block in model.decoder.layers[: model.decoder.spec.suffix_start]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters after a forward that no backward follows; nothing to do where nothing is sharded.

    The root unit keeps its parameters gathered until its backward. Without one, the module would go on showing plain tensors that the
    optimiser does not know.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy full tensors into a module's parameters, sharded or not, one at a time. KeyError for a name that ``state`` lacks."""
    for name, parameter in module.named_parameters():
        copy_full(parameter, state[name])


@torch.no_grad()
def copy_full(target: Tensor, full: Tensor) -> None:
    """Copy a full tensor, the same on every rank, into a tensor that may be sharded."""
    full = full.to(device=target.device, dtype=target.dtype)
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements)
    target.copy_(full)


def gather(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Full copies on CPU, in order. A collective call: every rank must iterate to the end."""
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks; the input itself where there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
