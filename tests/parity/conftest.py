"""Tiny random Qwen2 models of transformers' own making, saved as it saves them."""

import io
import os

# Before transformers is imported: nothing here may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from qwen2_variants import BASE
from rich.console import Console


@pytest.fixture
def hf_model(tmp_path):
    """Factory: ``hf_model(config changes…)`` -> (transformers' model in float32, its folder)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def make(dtype=torch.float32, **changes):
        torch.manual_seed(0)
        config = Qwen2Config(**BASE | changes, attn_implementation="eager")
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms near one, everything else large enough that each part moves the logits.
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        folder = tmp_path / "hf"
        model.to(dtype).save_pretrained(folder)
        return model.eval(), folder

    return make


@pytest.fixture
def quiet():
    return Console(file=io.StringIO(), width=200)
