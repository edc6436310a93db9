"""The decoder: embeddings, layers, head, and the pieces from which the TTT scan is assembled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_lit.model.attention import Attention
from ttt_lit.model.block import Block
from ttt_lit.model.norm import RMSNorm
from ttt_lit.model.rope import rope_tables
from ttt_lit.model.spec import ModelSpec


class Decoder(nn.Module):
    """A network whose parameters are exactly ``spec.parameter_shapes()``.

    ``spec`` may be replaced while training by one with the same parameters (``set_spec``): windows and fast weights are read from it at
    each call, so a stage transition touches no tensor.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec, layer) for layer in spec.layers)
        self.norm = RMSNorm(spec.hidden_size, eps=spec.norm_eps, unit_offset=spec.norm_unit_offset)
        self.lm_head = None if spec.tied_head else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def set_spec(self, spec: ModelSpec) -> None:
        """Change windows and TTT layers. ValueError if the new spec needs other parameters."""
        before, after = self.spec.parameter_shapes(), spec.parameter_shapes()
        if before != after:
            changed = sorted(set(before.items()) ^ set(after.items()))
            raise ValueError(f"set_spec: the parameters would change ({changed[:3]} …); convert the checkpoint instead")
        self.spec = spec

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings (B, T, D) of tokens (B, T) int64."""
        x = self.embed_tokens(tokens)
        return (
            x
            if self.spec.embedding_scale == 1.0
            else x * torch.tensor(self.spec.embedding_scale, dtype=x.dtype, device=x.device)
        )

    def rope(self, length: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """cos and sin tables (length, head_dim) per layer; layers of equal base share theirs."""
        make = {
            base: rope_tables(base, self.spec.head_dim, length, device=like.device, dtype=like.dtype)
            for base in {layer.rope_base for layer in self.spec.layers}
        }
        return [make[layer.rope_base] for layer in self.spec.layers]

    def block(self, index: int) -> Block:
        """One layer's weights."""
        block = self.layers[index]
        assert isinstance(block, Block)
        return block

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, D)."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden_states(self, tokens: Tensor, *, use_prime: bool = True) -> list[Tensor]:
        """The scaled embeddings and every layer's output, each (B, T, D), before the final norm: L + 1 entries."""
        states = [self.embed(tokens)]
        tables = self.rope(tokens.shape[1], states[0])
        for block, layer, (cos, sin) in zip(self.layers, self.spec.layers, tables, strict=True):
            states.append(block(states[-1], cos, sin, layer=layer, use_prime=use_prime))
        return states

    def forward(self, tokens: Tensor, *, use_prime: bool = True) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) int64, without any inner update."""
        return F.linear(self.norm(self.hidden_states(tokens, use_prime=use_prime)[-1]), self.head_weight)

    @torch.no_grad()
    def initialise(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Fill every matrix with normal(0, std), biases and learned sinks with zero, norms with the identity: a model from nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, std, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Attention) and module.sink_logit is not None:
                module.sink_logit.zero_()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(0.0 if module.unit_offset else 1.0)
