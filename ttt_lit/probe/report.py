"""``probe.json`` for readers: three sentences, tables, and an overlay for ``fit``. Everything here is a function of that file alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt_lit.probe.summary import WORTH_KEEPING
from ttt_lit.verdict.formats import NONE, change, counted
from ttt_lit.verdict.gates import MAX_DELTA
from ttt_lit.verdict.own_part import MIN_CEILING
from ttt_lit.verdict.statistics import MIN_DOCUMENTS

Probe = Mapping[str, Any]
BLOCK = "per token of the whole block"


def sentences(probe: Probe) -> tuple[str, str, str]:
    """What the window costs, what sinks repair, and how much a memory could win. ValueError-free once there is a recommendation."""
    return _cost(probe), _repair(probe), _worth(probe)


def markdown(probe: Probe, command: str) -> str:
    """The page ``probe.md``."""
    checkpoint, data, settings = probe["checkpoint"], probe["data"], probe["settings"]
    parts = [
        f"# What a conversion does to {checkpoint['name']}",
        *unfinished(probe),
        *sentences(probe),
        "![Left: damage by position. Right: the ceiling.](probe.png)",
        f"`{command}`",
        f"{checkpoint['family']}, {checkpoint['num_parameters']:,} parameters; {counted(data['documents'], 'held-out document')} "
        f"of {data['name']}, {data['context']:,} tokens of each; {settings['precision']}; {probe['seconds'] / 60:.1f} minutes on "
        f"{counted(probe['threads'], 'thread')}. Nats per token throughout; brackets are 95 % intervals over documents"
        + (f", too narrow below {MIN_DOCUMENTS} of them." if data["documents"] < MIN_DOCUMENTS else "."),
        "## Damage of the window",
        "Loss minus the imported model's on the same tokens. Inside the window nothing changes."
        + _policy(settings["imported_windows"]),
        _table(("window", "sinks", "per token beyond the window", BLOCK, "documents"), _damage_rows(probe)),
        "## The ceiling: what lost context is worth",
        "Loss of the imported model in fresh contexts of window to window + stride tokens, minus its loss with the whole past. Positions "
        "see more than the window, and positions that are not compared count as 0 in the mean over the whole block, which is what the "
        "study's gates compare: a lower estimate, and the closer, the smaller the stride.",
        _table(("window", "stride", "per token beyond window + stride", BLOCK, "documents"), _ceiling_rows(probe)),
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
        *(f"# {line}" for line in unfinished(probe)),
        "model:",
        "  size:",
        f"    # {worth}",
        *_window_lines(probe),
        f"    # Sinks, layers and the inner rate were tried at a window of {probe['window']:,} tokens.",
        f"    # {cost}",
        f"    # {repair}",
        f"    sink_tokens: {found['sink_tokens']}",
        f"    # {_kept_reason(probe)}",
    ]
    if found["full_attention_layers"] is not None:
        lines.append(f"    full_attention_layers: {found['full_attention_layers']}")
    if found["inner_lr"] is not None:
        lines += ["  inner:", f"    # {_rate_reason(probe)}", f"    lr: {found['inner_lr']!r}"]
    else:
        lines.append(f"  # {_rate_reason(probe)}")
    if data["context"] == data["folder_context"]:
        lines += ["  validation:", "    # The run carries the ceiling.", f"    probe: {path.as_posix()}"]
    else:
        lines.append(
            f"  # validation.probe is left out: {data['context']:,} tokens of each document were read, and a run on this folder reads "
            f"{data['folder_context']:,}; its ceiling needs a probe without --context."
        )
    return "\n".join(lines) + "\n"


def _window_lines(probe: Probe) -> list[str]:
    """The recommended window with what it costs, or why there is none."""
    found = probe["recommendation"]
    if found["window"] is None:
        why = "the damage there was not measured" if found["gate_can_tell"] else "the ceiling does not decide on one"
        return [f"    # No window is set here: {why}."]
    left = found["at_window"]
    of = f"({counted(left['documents'], 'document')}{_at_least_worth(left)})"
    return [
        f"    # With {counted(left['sink_tokens'], 'sink token')} it costs {_with_ends(left, 'after')} nats per token beyond it {of}.",
        f"    window: {found['window']}",
    ]


# Sentences ------------------------------------------------------------------------------------------------------------------------


def _cost(probe: Probe) -> str:
    row = probe["sinks"]
    words = "without sinks" if row["fewest"] == 0 else f"with {counted(row['fewest'], 'sink token')}"
    return (
        f"A window of {row['window']:,} tokens {words} costs {_with_ends(row, 'before')} nats per token beyond the window "
        f"({counted(row['documents'], 'document')})."
    )


def _repair(probe: Probe) -> str:
    row, worth = probe["sinks"], _at_least_worth(probe["sinks"])
    if len(row["tried"]) == 1:
        return f"Other numbers of sink tokens were not tried{worth}."
    if row["sink_tokens"] == row["fewest"]:
        return f"More sink tokens repair nothing that would be worth a gate's width of {MAX_DELTA:g}{worth}."
    sinks, left = counted(row["sink_tokens"], "sink token"), f"{change(row['after'])} nats per token beyond the window"
    if row["before"] <= 0:
        return f"With {sinks} it is {left}{worth}."
    instead = "" if row["fewest"] == 0 else f" instead of {row['fewest']}"
    verb = "repairs" if row["sink_tokens"] == 1 else "repair"
    return f"{sinks}{instead} {verb} {1 - row['after'] / row['before']:.0%} of it: {left} remain{worth}."


def _at_least_worth(row: Mapping[str, Any]) -> str:
    return "" if row["worth"] is None else f"; the lost context itself is worth at least {change(row['worth'])}"


def _worth(probe: Probe) -> str:
    found, context = probe["recommendation"], probe["data"]["context"]
    row = next(row for row in probe["ceiling"] if row["window"] == found["ceiling_window"])
    start = (
        f"A memory beyond {row['window']:,} tokens could win at least {_with_ends(row, 'nats')} nats per token of a block of {context:,}; "
        "the true ceiling is higher."
    )
    if found["gate_can_tell"]:
        return (
            f"{start} That is at least twice the gate of {MAX_DELTA:g}, which can tell a memory from nothing here, if the memory of the "
            f"trained baseline wins more than {MAX_DELTA:g} itself."
        )
    if row["documents"] < MIN_DOCUMENTS:
        return (
            f"{start} Fewer than {MIN_DOCUMENTS} documents do not say whether the gate of {MAX_DELTA:g} can tell that from nothing; "
            f"{_more_documents(probe)}."
        )
    return (
        f"{start} The interval does not exclude less than {MIN_CEILING:g}, twice the gate, so a model without memory could pass; use "
        "another window or data."
    )


def _more_documents(probe: Probe) -> str:
    """What to do about too few, by what keeps them few."""
    data = probe["data"]
    if data["held_out_documents"] < MIN_DOCUMENTS:
        return f"the folder holds out {data['held_out_documents']}, so prepare more data"
    if data["planned_documents"] < MIN_DOCUMENTS:
        return f"give --max-documents {MIN_DOCUMENTS} or more"
    return "the same command continues"


def unfinished(probe: Probe) -> list[str]:
    """One line about what is missing, if anything is."""
    if probe["finished"]:
        return []
    return [f"Unfinished: {', '.join(probe['missing'])} not measured; the same command continues."]


def _kept_reason(probe: Probe) -> str:
    layers, kept = probe["layers"], probe["recommendation"]["full_attention_layers"]
    if layers is None:
        return "Which layers are worth keeping was not measured."
    step = layers["greedy"][len(kept) - 1 if kept else -1]
    noun = "layer" if len(step["kept"]) == 1 else "layers"
    said = (
        f"keeping {noun} {', '.join(map(str, step['kept']))} at full attention repairs {change(step['repaired'])} nats per token beyond "
        "the window"
    )
    if kept is None:
        return f"What the lost context is worth was not measured on these documents; {said}."
    if kept:
        return f"Sinks leave more than {WORTH_KEEPING:g} above what the lost context is worth; {said}."
    return f"Not needed, though {said}: sinks leave at most {WORTH_KEEPING:g} above what the lost context is worth."


def _rate_reason(probe: Probe) -> str:
    rate, settings = probe["recommendation"]["inner_lr"], probe["settings"]
    rows = [row for row in probe["inner"] if row["window"] is not None]
    if not rows:
        return "The inner loop was not tried in the window, so no inner.lr is set here."
    how = f"Untrained, at chunk {settings['chunk']:,} and clip {settings['clip']:g} within a window of {probe['window']:,} tokens"
    if rate is None:
        tried = ", ".join(f"{row['rate']:g}" for row in rows)
        return f"{how}, no inner rate of {tried} helps, so no inner.lr is set here."
    row = next(row for row in rows if row["rate"] == rate)
    return f"{how}, on − off is {_with_ends(row, 'nats')}, the best of the rates tried. Another chunk or clip needs its own."


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
