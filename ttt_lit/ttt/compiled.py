"""torch.compile, where it is wanted and a compiler exists: one function per kind of suffix layer, and the blocks below.

Nothing that is compiled is differentiated more than once, so ordinary compilation suffices; the second derivatives are written out in
``dual.py`` and in the operators.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ttt_lit.model.decoder import Decoder
from ttt_lit.ops.attention import kernels_that_ran
from ttt_lit.ttt.chunk import LayerInput, LayerKind, LayerResult, RunLayer, Weights, run_layer
from ttt_lit.ttt.dual import Dual

BACKEND = "inductor"
# Each kind of layer is compiled with and without tangents, graph, carried keys and known results, and for several batch sizes and
# lengths of the past. Beyond torch's default of 8 variants a run would stop.
_VARIANTS = 256


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


def layer_runner(setting: bool | None, device: torch.device) -> RunLayer:
    """``run_layer`` or its compiled form."""
    return _run_compiled if wants_compilation(setting, device) else run_layer


def _run_compiled(kind: LayerKind, weights: Weights, x: Dual, given: LayerInput) -> LayerResult:
    for carried in given.past or ():
        # A past that grows with every chunk: without the mark, torch compiles its first length for that length alone.
        torch._dynamo.maybe_mark_dynamic(carried, 2)
    return _compiled_layer(BACKEND, kind)(kind, weights, x, given)


@functools.cache
def _compiled_layer(backend: str, kind: LayerKind) -> RunLayer:
    """``run_layer`` for one kind of layer, compiled for each shape at its first use."""
    _raise_limits()
    kernels_that_ran.add("torch.compile")
    # torch keeps the variants with the code object, which all kinds would share: each gets one of its own.
    code = run_layer.__code__.replace(co_name=f"run_layer_{len(_kinds)}")
    _kinds.append(kind)
    own = types.FunctionType(code, run_layer.__globals__, code.co_name, run_layer.__defaults__, run_layer.__closure__)
    return torch.compile(own, backend=_compiler(backend), fullgraph=True)


_kinds: list[LayerKind] = []


@functools.cache
def _compiler(backend: str) -> Callable[..., Any]:
    """torch's backend of that name with AOTAutograd's cache off; the caches of generated code and kernels stay as they are.

    Through 2.13 torch writes freed memory into that cache for the sizes of a bias-free linear map's result, where a graph returns the
    result and a view of it: here a product and the values. The process that compiles is right or ends in a segmentation fault while it
    writes; one that reads the entry stops with "invalid shape dimension" (pytorch/pytorch#185630, mended after 2.13 by #184774).
    """
    compile_graph = torch._dynamo.lookup_backend(backend)

    def without_autograd_cache(graph: torch.fx.GraphModule, inputs: list[Any], **settings: Any) -> Any:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_graph(graph, inputs, **settings)

    return without_autograd_cache


def _raise_limits() -> None:
    """For the whole process: torch has no limit per function."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * _VARIANTS)


def compile_blocks(decoder: Decoder) -> None:
    """Compile what reads whole sequences, once, in place. Only ``forward``: hooks of a sharded block stay outside."""
    _raise_limits()
    for index in range(decoder.spec.num_layers):
        block = decoder.block(index)
        block.forward = torch.compile(block.forward, backend=_compiler(BACKEND))  # type: ignore[method-assign]


@functools.cache
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
