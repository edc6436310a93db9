"""What one optimiser step did, summed over its micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_lit.train.optim import Group
from ttt_lit.train.parallel import sum_over_ranks
from ttt_lit.ttt.scan import SequenceLoss


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimiser step, the same on every rank. Losses in nats per token."""

    loss: float
    tokens: int
    num_bytes: int
    grad_norm: float
    """Global norm of the outer gradient before clipping."""
    update_norms: tuple[float, ...]
    """Mean ‖ΔW‖ of each inner step over the step's sequences, in the order of the chunks; empty where nothing is updated."""
    teacher_kl: float | None
    """KL(teacher ‖ model), nats per token, before its weight; None without a teacher."""
    rates: dict[Group, float]
    """Outer learning rate per group of the optimiser."""
    inner_lr: float


class StepWindow:
    """Sums of an accumulation window, in float64 on the device of the losses: nothing is read back before the window closes."""

    def __init__(self) -> None:
        self.grad_norm: Tensor | None = None
        self._sums: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._has_teacher = False

    def add(self, out: SequenceLoss, num_bytes: Tensor) -> None:
        """One micro-batch, and the bytes of its targets."""
        total = out.token_nll.detach().sum(dtype=torch.float64)
        count = torch.tensor(out.token_nll.numel(), dtype=torch.float64, device=total.device)
        self._has_teacher = out.token_kl is not None
        kl = torch.zeros_like(total) if out.token_kl is None else out.token_kl.detach().sum(dtype=torch.float64)
        self._sums.append(torch.stack([total, kl, count, num_bytes.to(total.device, torch.float64)]))
        batch = torch.full((1,), float(out.token_nll.shape[0]), dtype=torch.float64, device=total.device)
        self._norms.append(torch.cat([out.update_norms.detach().sum(1, dtype=torch.float64), batch]))

    def close(self, *, rates: dict[Group, float], inner_lr: float) -> StepReport:
        """Sum over ranks (a collective call) and start the next window."""
        assert self.grad_norm is not None
        sums = torch.cat([torch.stack(self._sums).sum(0), torch.stack(self._norms).sum(0)])
        nll, kl, tokens, num_bytes, *norms, sequences = sum_over_ranks(sums).tolist()
        report = StepReport(
            loss=nll / tokens,
            tokens=int(tokens),
            num_bytes=int(num_bytes),
            grad_norm=self.grad_norm.item(),
            update_norms=tuple(norm / sequences for norm in norms),
            teacher_kl=kl / tokens if self._has_teacher else None,
            rates=dict(rates),
            inner_lr=inner_lr,
        )
        self.grad_norm = None
        self._sums, self._norms = [], []
        return report
