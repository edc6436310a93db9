import io
from pathlib import Path

import gemma3_folders
import pytest
import qwen2_folders
import torch
from hf_folders import write_folder
from rich.console import Console

FAMILIES = {
    "qwen2": (qwen2_folders.CONFIG, qwen2_folders.qwen2_tensors),
    "gemma3": (gemma3_folders.CONFIG, gemma3_folders.gemma3_tensors),
}


@pytest.fixture
def hf_folder(tmp_path):
    """Factory: ``hf_folder(family, config changes…, edit=…, shards=…)`` -> folder, and its tensors as ``.tensors``."""

    class Folder(type(Path())):
        tensors: dict

    def make(family="qwen2", *, name="hf", shards=1, dtype=torch.bfloat16, edit=None, **changes):
        published, tensors_of = FAMILIES[family]
        config = published | changes
        tensors = tensors_of(config, dtype)
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
