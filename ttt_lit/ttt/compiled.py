"""torch.compile, where it is wanted and a compiler exists: one function per kind of suffix layer, and the blocks below.

Nothing that is compiled is differentiated more than once, so ordinary compilation suffices; the second derivatives are written out in
``dual.py`` and in the operators.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings

import torch

from ttt_lit.model.decoder import Decoder
from ttt_lit.ops.attention import kernels_that_ran
from ttt_lit.ttt.chunk import RunLayer, run_layer

BACKEND = "inductor"
# A layer's function is compiled with and without tangents, graph, carried keys and known results: more than torch's default of 8
# variants, beyond which it would go on uncompiled without a word.
_VARIANTS = 64


def wants_compilation(setting: bool | None, device: torch.device) -> bool:
    """The setting, by default on for CUDA; False with one warning where it is wanted and no compiler exists."""
    if not (device.type == "cuda" if setting is None else setting):
        return False
    missing = _missing_compiler(device.type)
    if missing is None:
        return True
    _warn_once(
        f"engine.compile: {missing}, so nothing is compiled and training is slower; install it, or set compile: false"
    )
    return False


@functools.cache
def compiled_layer(backend: str) -> RunLayer:
    """``run_layer``, compiled for each kind of layer and shape at its first use."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    kernels_that_ran.add("torch.compile")
    return torch.compile(run_layer, backend=backend, fullgraph=True)


def layer_runner(setting: bool | None, device: torch.device) -> RunLayer:
    """``run_layer`` or its compiled form."""
    return compiled_layer(BACKEND) if wants_compilation(setting, device) else run_layer


def compile_blocks(decoder: Decoder) -> None:
    """Compile what reads whole sequences, once, in place. Only ``forward``: hooks of a sharded block stay outside."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for index in range(decoder.spec.num_layers):
        block = decoder.block(index)
        block.forward = torch.compile(block.forward, backend=BACKEND)  # type: ignore[method-assign]


def _missing_compiler(device: str) -> str | None:
    if BACKEND != "inductor":
        return None
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    names = [os.environ.get("CXX"), "g++", "clang++"]
    if not any(name and shutil.which(name) for name in names):
        return "no C++ compiler (g++, clang++ or $CXX) was found"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
