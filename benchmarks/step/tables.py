"""What was measured, as Markdown for people."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from step.devices import Cpu, Cuda


def table(result: Mapping[str, Any], device: Cpu | Cuda, *, compiled: bool) -> str:
    """One context as an aligned Markdown table."""
    head = ["arm", "median s", "min … max s", "tokens/s", "time ×", "FLOPs ×", "quotient"]
    head += [f"peak {device.unit}"] + (["first step s"] if compiled else [])
    rows = [head]
    for arm in result["arms"]:
        peak = "-" if arm["peak_bytes"] is None else f"{arm['peak_bytes'] / device.unit_bytes:,.1f}"
        row = [arm["name"], "-", "-", "-", "-", "-", "-", peak]
        if arm["failure"] is not None:
            row[2] = arm["failure"]
        elif "median_seconds" in arm:
            row[1] = f"{arm['median_seconds']:.3f}"
            row[2] = f"{arm['min_seconds']:.3f} … {arm['max_seconds']:.3f}"
            row[3] = f"{arm['tokens_per_second']:,.0f}"
            ratios = ("time_ratio", "flops_ratio", "time_over_flops")
            row[4:7] = [f"{arm[name]:.2f}" if name in arm else "-" for name in ratios]
        if compiled:
            row.append("-" if arm["first_step_seconds"] is None else f"{arm['first_step_seconds']:.1f}")
        rows.append(row)
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "| " + " | ".join("-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def section(result: Mapping[str, Any], device: Cpu | Cuda, *, compiled: bool) -> str:
    """One context: title, table, and what the table does not say."""
    lines = [f"### Context {result['context']:,}", "", table(result, device, compiled=compiled), ""]
    if result["baseline"] not in (None, "dense"):
        lines.append(f"- The ratios are to {result['baseline']}.")
    lines += [f"- {arm['name']}: {arm['note']}." for arm in result["arms"] if arm["note"]]
    for name, price in result["sinks"].items():
        times, flops = price["time_ratio"], price["flops_ratio"]
        lines.append(f"- {name}: {times:.3f} × the time of the same arm without sinks, {flops:.4f} × its FLOPs.")
    compared = [arm for arm in result["arms"] if arm["gradient_error"] is not None]
    for reference in dict.fromkeys(arm["compared_with"] for arm in compared):
        of_this = [arm for arm in compared if arm["compared_with"] == reference]
        lines.append(
            f"- Compared with {reference}, every gradient agrees to {max(arm['gradient_error'] for arm in of_this):.0e} of its norm: "
            f"{', '.join(arm['name'] for arm in of_this)}."
        )
    return "\n".join(lines).rstrip() + "\n"


def preamble(record: Mapping[str, Any]) -> str:
    """Date, machine, what a step is, how to read the tables, and what was checked."""
    machine, versions, arguments = (record[name] for name in ("machine", "versions", "arguments"))
    where = f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB" if "gpu" in machine else machine["cpu"]
    clock = "" if "gpu" in machine or arguments["threads"] > 1 else " of processor time"
    threads = "" if "gpu" in machine else f", {_count(arguments['threads'], 'thread')}"
    step = "forward, backward and AdamW" if arguments["optimizer"] == "adamw" else "forward and backward"
    shape = ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in record["sizes"].items())
    parameters, prime = record["parameters"], record["prime_parameters"]
    lines = [
        f"{record['date'][:10]}, {where}{threads}; {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        f"A step is {step} of {_count(arguments['batch'], 'sequence')}, {_numbers(arguments['precision'], record['compiled'])}.",
        f"Network: {shape}; {parameters:,} parameters, of them {prime:,} in prime MLPs.",
        f"Times are medians of {_count(arguments['rounds'], 'interleaved round')}{clock}. "
        "time ×: as a multiple of the dense step, median of the rounds' ratios. FLOPs ×: what the arm's policy asks for, computing again "
        "included, as a multiple of the dense step. quotient: the first over the second. peak: bytes beyond parameters and optimizer "
        "state, gradients included.",
    ]
    for check in record["checks"]:
        lines.append(
            f"Checked: naive and engine agree in every gradient to {check['largest_gradient_error']:.0e} of its norm, where first order is "
            f"off by {check['first_order_error']:.2g} ({check['context']:,} tokens, {_numbers(check['precision'], check['compiled'])})."
        )
    if record["kernel_checks"]:
        worst = max(check["largest_error"] for check in record["kernel_checks"])
        lines.append(f"Checked: Triton attention and its plain twin agree in both orders to {worst:.0e}.")
    return "\n".join(textwrap.fill(f"- {line}", 108, subsequent_indent="  ") for line in lines) + "\n"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _numbers(precision: str, compiled: bool) -> str:
    return f"{'bf16 autocast' if precision == 'bf16' else 'float32'}, {'' if compiled else 'not '}compiled"
