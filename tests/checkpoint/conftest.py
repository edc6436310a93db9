import io
from pathlib import Path

import pytest
import torch
from qwen2_folders import CONFIG, qwen2_tensors, write_folder
from rich.console import Console


@pytest.fixture
def hf_folder(tmp_path):
    """Factory: ``hf_folder(config changes…, tensors=…, shards=…)`` -> folder, and its tensors as ``.tensors``."""

    class Folder(type(Path())):
        tensors: dict

    def make(*, name="hf", shards=1, dtype=torch.bfloat16, edit=None, **changes):
        config = CONFIG | changes
        tensors = qwen2_tensors(config, dtype)
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
