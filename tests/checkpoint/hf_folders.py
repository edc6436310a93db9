"""Tiny folders as Hugging Face writes them: published configs with small sizes, tensors under the names that transformers gives them."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES = Path(__file__).parents[2] / "configs/shapes"
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
CONFIGS = {
    "qwen2": json.loads((SHAPES / "qwen2.5-1.5b.json").read_text())
    | SMALL
    | {"num_hidden_layers": 3, "max_window_layers": 3, "bos_token_id": 1, "eos_token_id": 1},
    "gemma3": json.loads((SHAPES / "gemma-3-1b-pt.json").read_text())
    | SMALL
    | {"num_hidden_layers": 7, "head_dim": 6, "query_pre_attn_scalar": 6},
}


def random_tensors(config, dtype, seed=0):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator).to(dtype) for n, p in model.named_parameters()}


def write_folder(path, config, tensors, shards=1):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path
