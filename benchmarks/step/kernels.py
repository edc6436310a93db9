"""The Triton attention kernels must agree with their plain twin at the shapes of the step."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from step.bench import Bench
from step.checks import Disagreement, worst
from ttt_lit.ops import tiled_attention
from ttt_lit.ops.attention import choose_kernel

KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def check_kernels(
    ours: ModuleType, shapes: Iterable[tuple[int, int]], sizes: Mapping[str, int], batch: int, device: str
) -> list[dict[str, Any]]:
    """The attention functions of ``ours`` against the plain twin in float32, for (queries, keys) of the step, without and with sinks."""
    found = []
    for queries, keys in shapes:
        for (dtype, limit), sinks in itertools.product(KERNEL_TOLERANCE.items(), dict.fromkeys((0, sizes["sinks"]))):
            errors = _kernel_errors(ours, queries, keys, sizes | {"sinks": sinks}, batch, device, dtype)
            error, name = worst(errors)
            kind = str(dtype).removeprefix("torch.")
            if error > limit:
                raise Disagreement(
                    f"{ours.__name__} and tiled_attention disagree on {queries} queries of {keys} keys in {kind}: {name} is "
                    f"off by {error:.1e} of its norm (limit {limit:g}); nothing is timed"
                )
            found.append(
                {
                    "queries": queries,
                    "keys": keys,
                    "sinks": sinks,
                    "dtype": kind,
                    "largest_error": error,
                    "limit": limit,
                }
            )
    return found


def _kernel_errors(
    ours: ModuleType, queries: int, keys: int, sizes: Mapping[str, int], batch: int, device: str, dtype: torch.dtype
) -> dict[str, float]:
    width = sizes["hidden"] // sizes["heads"]
    reach = (width**-0.5, sizes["window"], sizes["sinks"])
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: str, length: int) -> Tensor:
        shape = (batch, sizes[heads], length, width)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, do, dto, tq = (random("heads", queries) for _ in range(4))
    k, v = (random("kv_heads", keys) for _ in range(2))
    tk, tv = (random("kv_heads", queries) for _ in range(2))

    def results(functions: ModuleType, *given: Tensor) -> Iterator[tuple[str, Tensor]]:
        q, k, v, do, dto, tq, tk, tv = given
        o, lse = functions.forward(q, k, v, *reach)
        yield from zip(("o", "lse"), (o, lse), strict=True)
        gradients = functions.backward(do, q, k, v, o, lse, *reach, queries)
        yield from zip(("dq", "dk", "dv"), gradients, strict=True)
        to, mu = functions.jvp(q, k, v, o, lse, tq, tk, tv, *reach)
        yield from zip(("to", "mu"), (to, mu), strict=True)
        second = functions.dual_backward(do, dto, q, k, v, o, lse, to, mu, tq, tk, tv, *reach)
        yield from zip(("second dq", "second dk", "second dv", "dtq", "dtk", "dtv"), second, strict=True)

    given = (q, k, v, do, dto, tq, tk, tv)
    wanted = results(tiled_attention, *(t.float() for t in given))
    return {
        name: (torch.linalg.vector_norm(x.float() - y) / torch.linalg.vector_norm(y)).item()
        for (name, x), (_, y) in zip(results(ours, *given), wanted, strict=True)
    }


def check_triton(bench: Bench, contexts: Sequence[int]) -> list[dict[str, Any]]:
    """Nothing where the Triton kernels do not serve."""
    sizes, dtype = bench.sizes, torch.bfloat16 if bench.arguments.precision == "bf16" else torch.float32
    head_dim, device = sizes["hidden"] // sizes["heads"], torch.device(bench.device.name)
    window, batch = sizes["window"], bench.arguments.batch
    if choose_kernel(device=device, dtype=dtype, head_dim=head_dim, window=window, second_order=True) != "triton":
        return []
    from ttt_lit.ops import triton_attention

    chunk = sizes["chunk"]
    # The first chunk, one that carries a full window, and whole sequences as the blocks below read them.
    shapes = {(chunk, chunk), *((chunk, min(context, chunk + window - 1)) for context in contexts)}
    shapes |= {(context, context) for context in contexts if context > window}
    return check_kernels(triton_attention, sorted(shapes), sizes, batch, bench.device.name)
