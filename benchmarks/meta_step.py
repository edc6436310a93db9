"""One training step of TTT beside a dense one: time, operations and memory of every way to compute it, interleaved in one run.

    python benchmarks/meta_step.py [--context 1024 2048] [--json FILE] [--markdown FILE]
    python benchmarks/meta_step.py --device cuda --markdown FILE

A step is forward and backward of one micro-batch of random tokens and weights, plus AdamW with ``--optimizer adamw`` (the default on
CUDA). The arms, ``KIND`` or ``KIND:POLICY``, are

- dense: a network without prime MLPs, with full attention; ``dense:recompute`` runs every block again in the backward;
- transformers: the dense network as transformers runs it, with the same weights (float32, or under the same autocast);
- swa: the network with windows, its prime MLPs not computed; ``swa:recompute`` alike;
- swa_sinks, engine_sinks: swa and engine with attention sinks before the windows, to stand beside the same arm without;
- naive, naive_recompute: one autograd graph over all chunks (``step/naive.py``), without and with torch's checkpoint;
- engine: exact meta-gradients as training computes them, once for every policy;
- first_order: the same, with the updates' gradients constant.

The policies of the engine are recompute, keep, factors, two_level, offload, and two that are found by measuring: equal_memory (the least
work whose peak is not above that of naive_recompute) and fill (not above --memory-gib, by default what the GPU has).

Before anything is timed, naive and engine must agree in loss and in every gradient (where an arm learns inside), and on CUDA the Triton
kernels with their plain twin; else the exit status is 1 and there is no table. Arms that compute the same (all exact ones; dense and
transformers) are compared too, at the context that they are timed at.

On one core of an EPYC the default takes about 40 minutes, contexts of 1,024 and 2,048 alone take 6. On a GPU the longest context takes most
of the time, and compilation some minutes: start with ``--context 8192 --rounds 3``.

The shapes small-152k and small-262k have the vocabularies of Qwen and of Gemma, where most of the time goes into the loss:
``--shape small-152k --context 512 --arms dense transformers``.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from step.arms import POLICIES, SEARCHED, make_arms
from step.bench import Bench
from step.checks import Disagreement, check_short
from step.console import say, show
from step.devices import Cpu, Cuda
from step.kernels import check_triton
from step.measure import measure
from step.results import baseline_of, describe, price_of_sinks, result_of
from step.shapes import SIZES
from step.tables import preamble, section

from ttt_lit.ops.attention import kernels_that_ran

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "shape": "small",
        "context": [1024, 2048, 4096, 8192],
        "precision": "32",
        "optimizer": "none",
        "compile": False,
        "arms": ["dense", "swa", "naive", "naive_recompute", "engine", "first_order:keep"],
        "policy": ["recompute", "equal_memory", "keep"],
    },
    "cuda": {
        "shape": "qwen2.5-1.5b",
        "context": [8192, 32768, 131072],
        "precision": "bf16",
        "optimizer": "adamw",
        "compile": True,
        "arms": [
            "dense",
            "dense:recompute",
            "swa:recompute",
            "naive",
            "naive_recompute",
            "engine",
            "first_order:recompute",
        ],
        "policy": ["recompute", "factors", "two_level", "fill"],
    },
}


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SIZES), help="small on the CPU, qwen2.5-1.5b on CUDA")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SIZE=N", help=f"change sizes: {', '.join(SIZES['small'])}"
    )
    parser.add_argument("--context", type=int, nargs="+", help="tokens per sequence; several give several tables")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every arm")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before, at least one: it is checked")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--arms", nargs="+", metavar="KIND[:POLICY]")
    parser.add_argument(
        "--policy", nargs="+", choices=[*POLICIES, *SEARCHED], help="of the engine's arms that name none"
    )
    parser.add_argument(
        "--precision", choices=["32", "bf16"], help="bf16: autocast; weights and fast weights stay float32"
    )
    parser.add_argument("--optimizer", choices=["none", "adamw"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="off on the CPU, on on CUDA")
    parser.add_argument(
        "--memory-gib", type=float, help="what policy fill may use, parameters and optimizer state included"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file, after every context")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    arguments = parser.parse_args(given)
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if min(arguments.rounds, arguments.warmup, arguments.batch, arguments.threads) < 1:
        parser.error("--rounds, --warmup, --batch and --threads are at least 1")
    if (
        arguments.device == "cpu"
        and arguments.memory_gib is None
        and "fill" in " ".join(arguments.policy + arguments.arms)
    ):
        parser.error("policy fill on the CPU: say how much it may use with --memory-gib")
    for path in (arguments.json, arguments.markdown):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: the folder does not exist")
    return arguments


def sizes_of(arguments: argparse.Namespace) -> dict[str, int]:
    sizes = dict(SIZES[arguments.shape])
    for change in arguments.set:
        name, _, number = change.partition("=")
        if name not in sizes or not number.isdigit():
            raise SystemExit(f"--set: got {change!r}, expected SIZE=N with SIZE one of {', '.join(sizes)}")
        sizes[name] = int(number)
    odd = [context for context in arguments.context if context % sizes["chunk"] or context < 1]
    if odd:
        raise SystemExit(f"--context: got {odd[0]}, expected a multiple of the chunk of {sizes['chunk']} tokens")
    return sizes


def run(bench: Bench) -> None:
    """Check, then measure one context after the other; what is known by then is shown and written."""
    arguments = bench.arguments
    record = describe(bench)
    say("checking naive against engine, and kernels")
    learns = any(arm.mode != "none" for arm in make_arms(arguments.arms, arguments.policy))
    record |= {"checks": check_short(bench) if learns else []}
    record |= {"kernel_checks": check_triton(bench, arguments.context), "contexts": []}
    document = preamble(record)
    show(document)
    for context in arguments.context:
        arms, reference = measure(bench, context)
        baseline = baseline_of(arms)
        results = [result_of(arm, baseline, context * arguments.batch) for arm in arms]
        found = {"context": context, "baseline": baseline and baseline.name, "reference": reference, "arms": results}
        found["sinks"] = price_of_sinks(arms)
        record["contexts"].append(found)
        record["kernels"] = sorted(kernels_that_ran)
        text = section(found, bench.device, compiled=bench.compiled)
        show(text)
        document += "\n" + text
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")
        if arguments.markdown:
            arguments.markdown.write_text(document)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    sizes = sizes_of(arguments)
    make_arms(arguments.arms, arguments.policy)
    torch.set_num_threads(arguments.threads)
    try:
        run(Bench(arguments, sizes, Cuda() if arguments.device == "cuda" else Cpu()))
    except Disagreement as problem:
        say("")
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
