"""A stage's teacher: the imported dense model, frozen, whose distribution over the vocabulary the stage's network is held to."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ttt_lit.model.decoder import Decoder
from ttt_lit.train.origin import Origin
from ttt_lit.train.parallel import fill, shard
from ttt_lit.train.stage_flops import number_bytes
from ttt_lit.ttt.compiled import compile_blocks, wants_compilation
from ttt_lit.ttt.scan import Teaching, read_whole


class Teacher(nn.Module):
    """The imported model with the windows that it was imported with. It never changes: a run neither trains nor saves it."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Teaching:
        """What the student is compared with, for tokens (B, T+1) int64.

        Sharded, the root unit stays whole from the first call on: nothing changes it, and the student's backward reads its head.
        """
        return Teaching(read_whole(self.decoder, tokens[:, :-1]), self.decoder.head_weight)


def check_teacher(origin: Origin) -> None:
    """ValueError unless the start checkpoint is a model as it was imported."""
    if not origin.as_imported:
        raise ValueError(
            "teacher_kl: the teacher is the start checkpoint, but that one is a training run's and no longer the model as imported; start "
            "from the imported checkpoint, or set teacher_kl: 0"
        )


def make_teacher(origin: Origin, trainer: L.Trainer, mesh: DeviceMesh | None, *, compiled: bool | None) -> Teacher:
    """Read the start checkpoint once more, in the trainer's compute precision, sharded over ``mesh`` as the student is."""
    assert origin.checkpoint is not None
    device = trainer.strategy.root_device
    with torch.device("meta"):
        teacher = Teacher(Decoder(origin.spec))
    teacher.to(torch.bfloat16 if number_bytes(trainer.precision) == 2 else torch.float32).requires_grad_(False)
    if mesh is not None:
        shard(teacher, mesh)
    teacher.to_empty(device=device)
    fill(teacher.decoder, origin.checkpoint.state())
    if wants_compilation(compiled, device):
        compile_blocks(teacher.decoder)
    return teacher
