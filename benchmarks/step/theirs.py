"""The dense network as transformers runs it, with the same weights."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ttt_lit.families import family_named
from ttt_lit.model.decoder import Decoder


def transformers_model(decoder: Decoder) -> nn.Module:
    """transformers' Qwen2 whose every parameter is the decoder's own, beside frozen biases of zero where the decoder has none."""
    family, spec = family_named("qwen2"), dataclasses.replace(decoder.spec, qkv_bias=True)
    config = AutoConfig.for_model(**family.config_from_spec(spec, None))
    with decoder.norm.weight.device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    ours = dict(decoder.named_parameters())
    stored = family.stored_names(decoder.spec)
    state: dict[str, Any] = {stored[name]: parameter for name, parameter in ours.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    shared = {id(parameter) for parameter in ours.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in shared:
            assert name.endswith("_proj.bias"), name
            nn.init.zeros_(parameter.requires_grad_(False))
    return model


def transformers_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of tokens (B, T+1), as its trainer computes it."""
    targets = tokens[:, 1:].contiguous()
    loss: Tensor = model(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss
    return loss
