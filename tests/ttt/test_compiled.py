"""Compiled, the engine computes what it computes eagerly; where nothing can compile, it says so and goes on."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers.compare import assert_equals_naive, assert_same_tensors, gradients_of, scan
from helpers.tiny import random_decoder, random_tokens, tiny_spec, ttt_layer

import ttt_lit.ttt.compiled as compiled
from ttt_lit.model.spec import LayerSpec
from ttt_lit.ops.attention import kernels_that_ran
from ttt_lit.ttt.chunk import KeyValues, LayerInput, layer_kind, run_layer
from ttt_lit.ttt.dual import Dual
from ttt_lit.ttt.model import TTTModel
from ttt_lit.ttt.settings import EngineConfig

# Dynamo looks at .grad of every input of a graph, and torch warns about those that are not leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

COMPILED = EngineConfig(compile=True)
RICH = {"qk_norm": True, "qkv_bias": True, "tied_head": False}


@pytest.fixture
def traced(monkeypatch):
    """Everything of compilation but the generated code: what decides whether a gradient survives it."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def decoder_of(*layers, **changes):
    return random_decoder(tiny_spec(*(layers or (LayerSpec(), ttt_layer(window=5), ttt_layer(window=6))), **changes))


@pytest.mark.slow
def test_traced_gradients_equal_the_naive_twin(traced):
    """Five chunks: no carried keys, a growing past and a full window, with and without sinks; the results of products given back."""
    engine = EngineConfig(compile=True, residual_gib=1.0)
    layers = (
        LayerSpec(window=3, sink_tokens=2),
        ttt_layer(window=5),
        ttt_layer(window=6),
        LayerSpec(window=5, sink_tokens=2),
    )
    assert_equals_naive(decoder_of(*layers, **RICH), random_tokens(2, 21), chunk=4, engine=engine)


@pytest.mark.slow
def test_the_first_order_canary(traced):
    """A compiled second derivative that is lost silently gives exactly the first-order gradient: the difference must be the eager one."""
    decoder, tokens = decoder_of(), random_tokens(2, 13)
    found = {}
    for mode in ("meta", "first_order"):
        for name, engine in (("eager", EngineConfig()), ("compiled", COMPILED)):
            decoder.zero_grad()
            scan(decoder, tokens, mode=mode, engine=engine).loss.backward()
            found[mode, name] = {n: g.clone() for n, g in gradients_of(decoder).items()}
    assert_same_tensors(found["meta", "compiled"], found["meta", "eager"])
    second_order = {
        name: {n: g - found["first_order", name][n] for n, g in found["meta", name].items()}
        for name in ("eager", "compiled")
    }
    assert_same_tensors(second_order["compiled"], second_order["eager"])
    for name in ("layers.1.prime_mlp.down_proj.weight", "layers.0.mlp.gate_proj.weight", "embed_tokens.weight"):
        size = torch.linalg.vector_norm(found["meta", "eager"][name])
        assert torch.linalg.vector_norm(second_order["compiled"][name]) > 0.05 * size, name


@pytest.mark.slow
def test_the_whole_model_compiles_its_blocks_too(traced):
    decoder, tokens = decoder_of(LayerSpec(window=3), LayerSpec(), ttt_layer(window=5)), random_tokens(2, 9)
    names = list(decoder.state_dict())
    model = TTTModel(decoder, COMPILED)
    for mode in ("meta", "none"):
        decoder.zero_grad()
        out = model(tokens, mode=mode, chunk=4, inner_lr=0.5, clip=1.0)
        out.loss.backward()
        compiled_gradients = {n: g.clone() for n, g in gradients_of(decoder).items()}
        eager = decoder_of(LayerSpec(window=3), LayerSpec(), ttt_layer(window=5))
        expected = scan(eager, tokens, mode=mode)
        expected.loss.backward()
        torch.testing.assert_close(out.token_nll, expected.token_nll, rtol=1e-10, atol=1e-10)
        assert_same_tensors(compiled_gradients, gradients_of(eager))
    assert list(decoder.state_dict()) == names
    assert "torch.compile" in kernels_that_ran


@pytest.mark.slow
def test_one_shape_through_the_real_compiler():
    """Inductor's generated code, float64, forward and adjoint of a layer with attention."""
    if compiled._missing_compiler("cpu") is not None:
        pytest.skip("no C++ compiler on this machine: torch.compile cannot generate code for a CPU")
    decoder = decoder_of(ttt_layer(window=5), ttt_layer(window=6))
    assert_equals_naive(decoder, random_tokens(1, 9), chunk=4, engine=COMPILED)
    torch._dynamo.reset()


# A graph that returns a linear map's result and a view of it, as a layer does with its products and its values.
A_PRODUCT_AND_ITS_VIEW = """
import torch
from torch._dynamo.utils import counters
from ttt_lit.ttt.compiled import BACKEND, _compiler

def both(x, weight):
    y = torch.nn.functional.linear(x, weight)
    return y, y.unflatten(-1, (-1, 3)).transpose(1, 2)

torch.manual_seed(0)
x, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
for got, expected in zip(torch.compile(both, backend=_compiler(BACKEND), fullgraph=True)(x, weight), both(x, weight)):
    torch.testing.assert_close(got, expected)
    for g, e in zip(*(torch.autograd.grad(t.square().sum(), (x, weight), retain_graph=True) for t in (got, expected))):
        torch.testing.assert_close(g, e)
print("generated code found:", counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_a_second_process_reads_the_caches_of_the_first(tmp_path):
    """It finds the generated code of forward and backward there, and is right."""
    if compiled._missing_compiler("cpu") is not None:
        pytest.skip("no C++ compiler on this machine: torch.compile cannot generate code for a CPU")
    found = []
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, "-c", A_PRODUCT_AND_ITS_VIEW],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        found.append(process.stdout.strip())
    assert found == ["generated code found: 0", "generated code found: 2"]


@pytest.fixture
def graphs(monkeypatch):
    """Per graph that the engine has compiled: whether AOTAutograd's cache was on meanwhile."""
    cached = []

    def compile_graph(graph, _):
        cached.append(torch._functorch.config.enable_autograd_cache)
        return graph.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _: compile_graph)
    for cache in (compiled._compiler, compiled._compiled_layer):
        cache.cache_clear()
    yield cached
    for cache in (compiled._compiler, compiled._compiled_layer):
        cache.cache_clear()
    torch._dynamo.reset()


def layer_of(decoder, index):
    """Kind, weights and rotation tables of a layer of a suffix, for chunks of four tokens."""
    kind = layer_kind(decoder.spec, index, device=torch.device("cpu"), dtype=torch.float64)
    rope = decoder.rope(4, torch.zeros((), dtype=torch.float64))[index]
    return kind, dict(decoder.block(index).named_parameters()), rope


def test_the_autograd_cache_is_off_for_what_the_engine_compiles_alone(graphs):
    decoder, x = decoder_of(ttt_layer(), LayerSpec()), torch.zeros(2, 4, 8, dtype=torch.float64)
    with torch._functorch.config.patch(enable_autograd_cache=True):
        kind, weights, rope = layer_of(decoder, 1)
        compiled._run_compiled(kind, weights, Dual(x), LayerInput(rope))
        assert graphs == [False]
        compiled.compile_blocks(decoder)
        decoder.block(1)(x, *rope, layer=decoder.spec.layers[1], use_prime=True)
        assert graphs == [False, False]
        assert torch._functorch.config.enable_autograd_cache


def test_a_growing_past_is_compiled_once(graphs):
    kind, weights, rope = layer_of(decoder_of(ttt_layer(), LayerSpec()), 1)
    draw = torch.Generator().manual_seed(0)
    for length in (4, 8, 12):
        x, *past = (
            torch.randn(shape, dtype=torch.float64, generator=draw)
            for shape in [(2, 4, 8), (2, 1, length, 4), (2, 1, length, 4)]
        )
        given = LayerInput(rope, KeyValues(*past))
        got = compiled._run_compiled(kind, weights, Dual(x), given)
        torch.testing.assert_close(got.x.value, run_layer(kind, weights, Dual(x), given).x.value)
    assert len(graphs) == 1


def test_by_default_only_cuda_is_compiled():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not compiled.wants_compilation(None, cpu)
    assert not compiled.wants_compilation(False, cuda)
    assert compiled.layer_runner(None, cpu) is compiled.run_layer


def test_without_a_compiler_there_is_one_warning_and_the_same_result(monkeypatch):
    monkeypatch.setattr(compiled, "_missing_compiler", lambda _: "no C++ compiler (g++, clang++ or $CXX) was found")
    compiled._warn_once.cache_clear()
    decoder, tokens = decoder_of(), random_tokens(2, 9)
    with pytest.warns(UserWarning, match=r"engine.compile: no C\+\+ compiler .* was found, so nothing is compiled"):
        first = scan(decoder, tokens, engine=COMPILED).token_nll
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = scan(decoder, tokens, engine=COMPILED).token_nll
    assert torch.equal(first, second)
    assert torch.equal(first, scan(decoder, tokens, engine=EngineConfig()).token_nll)


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda _: None)
    compiled._missing_compiler.cache_clear()
    assert "triton is not installed" in compiled._missing_compiler("cuda")
    assert "no C++ compiler" in compiled._missing_compiler("cpu")
    compiled._missing_compiler.cache_clear()


@pytest.mark.slow
def test_every_kind_of_layer_has_a_limit_of_variants_of_its_own(monkeypatch):
    """Two shapes with evaluation between make about 35 variants of the three kinds in this suffix; beyond a limit torch stops the run."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(compiled, "_VARIANTS", 24)
    decoder = decoder_of(ttt_layer(window=7), ttt_layer(window=7), LayerSpec(window=7), ttt_layer(window=7))
    with torch._dynamo.config.patch(recompile_limit=8):
        for batch, length in ((3, 13), (1, 21)):
            tokens = random_tokens(batch, length)
            scan(decoder, tokens, engine=COMPILED).loss.backward()
            with torch.no_grad():
                got = scan(decoder, tokens, engine=COMPILED).token_nll
            torch.testing.assert_close(got, scan(decoder, tokens).token_nll, rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()
