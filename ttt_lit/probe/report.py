"""``probe.json`` for readers: three sentences, tables, and an overlay for ``fit``. Everything here is a function of that file alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt_lit.experiment.formats import NONE, change, counted
from ttt_lit.experiment.gates import MAX_DELTA
from ttt_lit.experiment.own_part import MIN_CEILING
from ttt_lit.experiment.statistics import MIN_DOCUMENTS
from ttt_lit.probe.summary import WORTH_KEEPING

Probe = Mapping[str, Any]


def sentences(probe: Probe) -> tuple[str, str, str]:
    """What the window costs, what sinks repair, and how much a memory could win. ValueError-free once there is a recommendation."""
    return _cost(probe), _repair(probe), _worth(probe)


def markdown(probe: Probe, command: str) -> str:
    """The page ``probe.md``."""
    checkpoint, data, settings = probe["checkpoint"], probe["data"], probe["settings"]
    parts = [
        f"# What a conversion does to {checkpoint['name']}",
        *sentences(probe),
        "![Left: damage by position. Right: the ceiling.](probe.png)",
        f"`{command}`",
        f"{checkpoint['family']}, {checkpoint['num_parameters']:,} parameters; {counted(data['documents'], 'held-out document')} "
        f"of {data['name']}, {data['context']:,} tokens of each; {settings['precision']}; {probe['seconds'] / 60:.1f} minutes on "
        f"{counted(probe['threads'], 'thread')}. Nats per token throughout; brackets are 95 % intervals over documents"
        + (f", too narrow below {MIN_DOCUMENTS} of them." if data["documents"] < MIN_DOCUMENTS else "."),
        "## Damage of the window",
        "Loss minus the imported model's on the same tokens. Inside the window nothing changes; `block` is the mean over all positions."
        + _policy(settings["imported_windows"]),
        _table(("window", "sinks", "beyond the window", "block", "documents"), _damage_rows(probe)),
        "## The ceiling: what lost context is worth",
        "Loss of the imported model in fresh contexts of window to window + stride tokens, minus its loss with the whole past. Positions "
        "see more than the window, and positions that are not compared count as 0 in `block`: a lower estimate, and the closer, the "
        "smaller the stride. The study's gates compare `block`.",
        _table(("window", "stride", "beyond window + stride", "block", "documents"), _ceiling_rows(probe)),
        *_inner_part(probe),
        *_layers_part(probe),
    ]
    return "\n\n".join(parts) + "\n"


def overlay(probe: Probe, path: Path) -> str:
    """An overlay for ``fit --config``: what was measured, with the reason beside each value."""
    found, data = probe["recommendation"], probe["data"]
    cost, repair, worth = sentences(probe)
    lines = [
        f"# Made by python cli.py probe from {probe['checkpoint']['name']} and {data['name']}",
        f"# ({counted(data['documents'], 'held-out document')}, {data['context']:,} tokens of each); {path.name} has the measurements.",
        "model:",
        "  size:",
        f"    # {worth}",
        f"    window: {found['window']}",
        f"    # {cost}",
        f"    # {repair}",
        f"    sink_tokens: {found['sink_tokens']}",
        f"    # {_kept_reason(probe)}",
        f"    full_attention_layers: {found['full_attention_layers']}",
    ]
    if found["inner_lr"] is not None:
        lines += ["  inner:", f"    # {_rate_reason(probe)}", f"    lr: {found['inner_lr']!r}"]
    lines += [
        "  validation:",
        f"    # The run carries the ceiling. It holds for this long data at size.long {data['context']} alone.",
        f"    probe: {path.as_posix()}",
    ]
    return "\n".join(lines) + "\n"


# Sentences ------------------------------------------------------------------------------------------------------------------------


def _cost(probe: Probe) -> str:
    row = _damage_at(probe, min)
    if row["beyond"] is None:
        return f"A window of {row['window']:,} tokens costs nothing: it spans the context."
    words = "without sinks" if row["sink_tokens"] == 0 else f"with {counted(row['sink_tokens'], 'sink token')}"
    return (
        f"A window of {row['window']:,} tokens {words} costs {_with_ends(row, 'beyond')} nats per token beyond the window "
        f"({counted(row['documents'], 'document')})."
    )


def _repair(probe: Probe) -> str:
    sinks, none = probe["recommendation"]["sink_tokens"], _damage_at(probe, min)
    best = next(row for row in _at_window(probe) if row["sink_tokens"] == sinks)
    ceiling = next((row for row in probe["ceiling"] if row["window"] == best["window"]), None)
    worth = "" if ceiling is None else f"; the lost context itself is worth {ceiling['beyond']:.3f}"
    if best is none or none["beyond"] is None:
        return f"More sink tokens repair nothing that would be worth a gate's width of {MAX_DELTA:g}{worth}."
    left = f"{change(best['beyond'])} nats per token beyond the window remain{worth}"
    if none["beyond"] <= 0:
        return f"With {counted(sinks, 'sink token')} {left}."
    share = 1 - best["beyond"] / none["beyond"]
    return f"{counted(sinks, 'sink token').capitalize()} repair{'s' if sinks == 1 else ''} {share:.0%} of it: {left}."


def _worth(probe: Probe) -> str:
    window = probe["recommendation"]["window"]
    row = next(row for row in probe["ceiling"] if row["window"] == window)
    start = (
        f"A memory beyond {window:,} tokens could win {_with_ends(row, 'nats')} nats per token of a block of "
        f"{probe['data']['context']:,}, by a lower estimate"
    )
    if probe["recommendation"]["gate_can_tell"]:
        return f"{start}: more than twice the gate of {MAX_DELTA:g}, which can tell a memory from nothing here."
    if row["documents"] < MIN_DOCUMENTS:
        return (
            f"{start}: fewer than {MIN_DOCUMENTS} documents do not say whether the gate of {MAX_DELTA:g} can tell that from nothing; raise "
            "--max-documents."
        )
    return (
        f"{start}: the interval does not exclude {MIN_CEILING:g}, twice the gate, so a model without memory could pass; use another "
        "window or data."
    )


def _kept_reason(probe: Probe) -> str:
    layers, kept = probe["layers"], probe["recommendation"]["full_attention_layers"]
    if layers is None:
        return "Which layers are worth keeping was not measured."
    best = layers["greedy"][-1]
    names = ", ".join(map(str, best["kept"]))
    said = f"keeping {'layer' if len(best['kept']) == 1 else 'layers'} {names} at full attention repairs {best['repaired']:.3f} nats per token beyond the window"
    if kept:
        return f"Sinks leave more than {WORTH_KEEPING:g} above what the lost context is worth; {said}."
    return f"Not needed, though {said}: sinks leave at most {WORTH_KEEPING:g} above what the lost context is worth."


def _rate_reason(probe: Probe) -> str:
    rate = probe["recommendation"]["inner_lr"]
    row = next(row for row in probe["inner"] if row["window"] is not None and row["rate"] == rate)
    words = "best of those tried" if row["nats"] < 0 else "least harm of those tried, and none helps"
    return f"Untrained, on − off is {_with_ends(row, 'nats')} within the window: {words}."


def _at_window(probe: Probe) -> list[Any]:
    return [row for row in probe["damage"] if row["window"] == probe["window"]]


def _damage_at(probe: Probe, which: Any) -> Any:
    return which(_at_window(probe), key=lambda row: row["sink_tokens"])


# Tables ---------------------------------------------------------------------------------------------------------------------------


def _policy(windows: Sequence[int | None]) -> str:
    """Which layers are narrowed, where not all are alike."""
    dense, local = (
        [str(i) for i, each in enumerate(windows) if each is None],
        {each for each in windows if each is not None},
    )
    if not local:
        return ""
    sizes = " or ".join(f"{each:,}" for each in sorted(local))
    return (
        f" Layers {', '.join(dense) or 'none'} had full attention and get the sinks; the others keep their window of {sizes}, or are "
        "narrowed to a smaller one without sinks."
    )


def _damage_rows(probe: Probe) -> Iterable[Sequence[str]]:
    for row in probe["damage"]:
        yield (
            f"{row['window']:,}",
            str(row["sink_tokens"]),
            _with_ends(row, "beyond"),
            _with_ends(row, "nats"),
            str(row["documents"]),
        )


def _ceiling_rows(probe: Probe) -> Iterable[Sequence[str]]:
    for row in probe["ceiling"]:
        yield (
            f"{row['window']:,}",
            f"{row['stride']:,}",
            _with_ends(row, "beyond"),
            _with_ends(row, "nats"),
            str(row["documents"]),
        )


def _inner_part(probe: Probe) -> list[str]:
    if not probe["inner"]:
        return []
    settings = probe["settings"]
    layers = ", ".join(map(str, settings["ttt_layers"]))
    rows = [
        (
            "as imported" if row["window"] is None else f"window {row['window']:,}, sinks {row['sink_tokens']}",
            f"{row['rate']:g}",
            _with_ends(row, "nats"),
            f"{row['update_norm']:.3g}",
            str(row["documents"]),
        )
        for row in probe["inner"]
    ]
    return [
        "## The inner loop, untrained",
        f"Loss with inner updates minus without, prime MLPs just inserted as copies in layers {layers}, "
        f"chunk {settings['chunk']:,}, clip {settings['clip']:g}. A mean update as long as the rate means that the clip was always active.",
        _table(("attention", "inner rate", "on − off", "mean update norm", "documents"), rows),
    ]


def _layers_part(probe: Probe) -> list[str]:
    layers = probe["layers"]
    if layers is None:
        return []
    alone = [
        (str(row["layer"]), _with_ends(row, "repaired"))
        for row in sorted(layers["alone"], key=lambda row: -row["repaired"])
    ]
    greedy = [(", ".join(map(str, row["kept"])), _with_ends(row, "repaired")) for row in layers["greedy"]]
    documents = counted(layers["alone"][0]["documents"], "document")
    return [
        "## Layers kept at full attention",
        f"What keeping one layer repairs of the damage beyond the window of {layers['window']:,} tokens with "
        f"{counted(layers['sink_tokens'], 'sink token')}, best first, and the greedy list ({documents} only: this is the dearest part).",
        _table(("layer", "repaired"), alone),
        _table(("kept together", "repaired"), greedy),
    ]


def _with_ends(row: Mapping[str, Any], name: str) -> str:
    prefix = "" if name == "nats" else f"{name}_"
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    if row[name] is None:
        return NONE
    return change(row[name]) + ("" if low is None else f" [{change(low)}, {change(high)}]")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
