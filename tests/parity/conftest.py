"""Tiny random models of transformers' own making, saved as it saves them."""

import io
import os

# Before transformers is imported: nothing here may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import gemma3_variants
import pytest
import qwen2_variants
import torch
from rich.console import Console

FAMILIES = {"qwen2": qwen2_variants, "gemma3": gemma3_variants}


@pytest.fixture
def hf_model(tmp_path):
    """Factory: ``hf_model(family, config changes…)`` -> (transformers' model in float32, its folder)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family="qwen2", *, dtype=torch.float32, **changes):
        torch.manual_seed(0)
        settings = FAMILIES[family]
        config = AutoConfig.for_model(settings.MODEL_TYPE, **settings.BASE | changes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms near the identity, everything else large enough that each part moves the logits.
                parameter.normal_(settings.NORM_IDENTITY if "norm" in name else 0.0, 0.3)
        folder = tmp_path / "hf"
        model.to(dtype).save_pretrained(folder)
        return model.eval(), folder

    return make


@pytest.fixture
def quiet():
    return Console(file=io.StringIO(), width=200)
