"""One layer: attention, then (in TTT layers) the prime MLP, then the ordinary MLP, each with its own norms and residual."""

from __future__ import annotations

from torch import Tensor, nn

from ttt_lit.model.attention import Attention
from ttt_lit.model.mlp import GatedMLP
from ttt_lit.model.norm import RMSNorm
from ttt_lit.model.spec import LayerSpec, ModelSpec


class Block(nn.Module):
    """The weights of one layer. What may change between stages (window, use of the prime MLP) is an argument of ``forward``."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()

        def norm(present: bool) -> nn.Module:
            if not present:
                return nn.Identity()
            return RMSNorm(spec.hidden_size, eps=spec.norm_eps, unit_offset=spec.norm_unit_offset)

        self.input_layernorm = norm(spec.pre_norms)
        self.self_attn = Attention(spec, sink_logit=layer.sink_logit)
        self.post_attention_layernorm = norm(spec.post_norms)
        self.prime_mlp: GatedMLP | None = None
        if layer.prime is not None:
            self.pre_prime_layernorm = norm(spec.pre_norms)
            self.prime_mlp = GatedMLP(spec.hidden_size, layer.prime.intermediate_size, spec.activation)
            self.post_prime_layernorm = norm(layer.prime.post_norm)
        self.pre_feedforward_layernorm = norm(spec.pre_norms)
        self.mlp = GatedMLP(spec.hidden_size, spec.intermediate_size, spec.activation)
        self.post_feedforward_layernorm = norm(spec.post_norms)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, layer: LayerSpec, use_prime: bool = True) -> Tensor:
        """A whole sequence at once: x (B, T, D) → (B, T, D). Nothing here learns while reading."""
        x = self.attend(x, cos, sin, layer=layer)
        if use_prime and self.prime_mlp is not None:
            x = x + self.post_prime_layernorm(self.prime_mlp(self.pre_prime_layernorm(x)))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, *, layer: LayerSpec) -> Tensor:
        """The block's first part, attention and its residual: x (B, T, D) → (B, T, D)."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, window=layer.window, sink_tokens=layer.sink_tokens)
        return x + self.post_attention_layernorm(attended)

    def fast_mlp(self, layer: LayerSpec) -> GatedMLP:
        """The MLP whose weights the inner loop updates."""
        chosen = self.prime_mlp if layer.fast == "prime" else self.mlp
        assert layer.fast is not None
        assert chosen is not None
        return chosen
