"""The module whose forward is the training loss: the root unit of sharding and the only thing the trainer calls."""

from __future__ import annotations

from torch import Tensor, nn

from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import Mode
from ttt_lit.ttt.compiled import compile_blocks, wants_compilation
from ttt_lit.ttt.inner import InnerRule
from ttt_lit.ttt.scan import SequenceLoss, Teaching, sequence_loss
from ttt_lit.ttt.settings import EngineConfig


class TTTModel(nn.Module):
    """A decoder read under TTT-E2E.

    Going through ``forward`` matters when sharded: FSDP gathers the root's parameters (suffix, final norm, head) there, and the engine
    then reads them freely.
    """

    def __init__(self, decoder: Decoder, engine: EngineConfig = EngineConfig()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.decoder = decoder
        self.engine = engine
        self._blocks_compiled = False

    def forward(
        self,
        tokens: Tensor,
        *,
        mode: Mode,
        chunk: int,
        inner_lr: float,
        clip: float,
        rule: InnerRule = "sgd",
        teacher: Teaching | None = None,
    ) -> SequenceLoss:
        """Losses of tokens (B, T+1) int64; the arguments are those of ``sequence_loss``."""
        if not self._blocks_compiled and wants_compilation(self.engine.compile, tokens.device):
            compile_blocks(self.decoder)
            self._blocks_compiled = True
        return sequence_loss(
            self.decoder,
            tokens,
            mode=mode,
            chunk=chunk,
            inner_lr=inner_lr,
            clip=clip,
            rule=rule,
            engine=self.engine,
            teacher=teacher,
        )
