import io
from pathlib import Path

import pytest
import torch
from hf_folders import CONFIGS, random_tensors, write_folder
from rich.console import Console


@pytest.fixture
def hf_folder(tmp_path):
    """Factory: ``hf_folder(family, config changes…, edit=…, shards=…)`` -> folder, and its tensors as ``.tensors``."""

    class Folder(type(Path())):
        tensors: dict

    def make(family="qwen2", *, name="hf", shards=1, dtype=torch.bfloat16, edit=None, **changes):
        config = CONFIGS[family] | changes
        tensors = random_tensors(config, dtype)
        if edit is not None:
            edit(tensors)
        folder = Folder(write_folder(tmp_path / name, config, tensors, shards))
        folder.tensors = tensors
        return folder

    return make


@pytest.fixture
def quiet():
    """A console that keeps its text for the test."""
    return Console(file=io.StringIO(), width=200)
