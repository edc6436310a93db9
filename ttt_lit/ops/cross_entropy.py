"""Next-token loss from hidden states, with the logits of one piece of the sequence alive at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats. hidden (B, T, D), head (V, D), targets (B, T) int64. Returns (B, T).

    Differentiable twice. The log-softmax runs in float32 at least: at loss 3 the spacing of bfloat16 is 0.016 nats.
    """
    logits = F.linear(hidden, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def token_nll_in_pieces(hidden: Tensor, head: Tensor, targets: Tensor, *, piece: int) -> Tensor:
    """``token_nll`` over pieces of ``piece`` tokens, recomputing each piece's logits in the backward. First order only."""
    losses = []
    for x, y in zip(hidden.split(piece, dim=1), targets.split(piece, dim=1), strict=True):
        if torch.is_grad_enabled() and x.requires_grad:
            losses.append(checkpoint(token_nll, x, head, y, use_reentrant=False, preserve_rng_state=False))
        else:
            losses.append(token_nll(x, head, y))
    return torch.cat(losses, dim=1)
