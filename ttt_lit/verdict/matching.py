"""What runs must have alike: the seeds of an arm, two arms that are compared, a candidate and its baseline. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ttt_lit.record.schema import RunRecord
from ttt_lit.verdict.arm import Arm


def found_settings(records: Sequence[RunRecord]) -> dict[str, set[object]]:
    """What the runs of an arm have alike, with the values that were found."""
    return {
        "the network": {(each.model.num_parameters, tuple(each.model.ttt_layers)) for each in records},
        "the setting that they are judged by": {each.headline for each in records},
        "their stages": {_plan(each) for each in records if each.status == "finished"},
        "the inner loop": _known(map(_inner_loop, records)),
    }


def _plan(record: RunRecord) -> tuple[object, ...]:
    return tuple((stage.name, stage.mode, stage.context, tuple(stage.windows), stage.carry) for stage in record.stages)


def unequal(arm: Arm, other: Arm) -> list[str]:
    """What two arms must share to be compared and do not: held-out documents, data, tokenizer, tokens per optimiser step.

    Two token-matched arms must also have trained on the same number of tokens. What a run has not got (it stopped before, or reads no
    short documents) is not unequal.
    """
    problems: list[str] = []
    ours, theirs = _document_ids(arm), _document_ids(other)
    if ours and theirs and (len(ours) > 1 or ours != theirs):
        sizes = " and ".join(str(len(ids)) for ids in (max(ours, key=len), max(theirs, key=len)))
        shared = len(frozenset.intersection(*ours, *theirs))
        problems.append(
            f"{arm.name} and {other.name} were measured on different documents ({sizes}, {shared} in common)"
        )
    facts: Mapping[str, tuple[set[object], set[object]]] = {
        "tokenizer": (_known(r.data.tokenizer for r in arm.records), _known(r.data.tokenizer for r in other.records)),
        "short documents": (_known(r.data.short for r in arm.records), _known(r.data.short for r in other.records)),
        "long documents": (_known(r.data.long for r in arm.records), _known(r.data.long for r in other.records)),
        "number of tokens per optimiser step": (_tokens_per_step(arm), _tokens_per_step(other)),
    }
    for fact, (here, there) in facts.items():
        if here and there and len(here | there) > 1:
            problems.append(f"{arm.name} and {other.name} do not have the same {fact}")
    if arm.share is None and other.share is None:
        problems += _unequal_tokens(arm, other)
    return problems


def unlike_inner_loops(arms: Iterable[Arm]) -> Iterator[str]:
    """Arms that start from weights and learn while reading, with different settings of the inner loop: one setting was tuned for one arm.

    Between the kinds of start it may differ: the rate is a property of the weights, so an imported model has the one that was measured on
    it and the baseline the paper's. Each side then has what suits it, and all arms of a side have the same.
    """
    found: dict[object, list[str]] = {}
    for arm in arms:
        for setting in sorted(_known(_inner_loop(r) for r in arm.records if r.start.source is not None), key=str):
            found.setdefault(setting, []).append(arm.name)
    if len(found) > 1:
        each = "; ".join(f"{', '.join(names)}: {setting}" for setting, names in found.items())
        yield f"arms that start from weights do not have the same inner loop ({each})"


def _inner_loop(record: RunRecord) -> str | None:
    """The settings of the inner loop in words; None where the run has no updates, neither in training nor in the loss it is judged by."""
    settings = record.config.get("model", {}).get("inner")
    updates = record.headline == "on" or any(stage.mode in ("meta", "first_order") for stage in record.stages)
    return " ".join(f"{name} {value}" for name, value in settings.items()) if updates and settings else None


def _unequal_tokens(arm: Arm, other: Arm) -> Iterator[str]:
    """Token-matched arms train on the same number of tokens. Runs that did not finish are another problem."""
    ours, theirs = ({r.totals.tokens for r in each.records if r.status == "finished"} for each in (arm, other))
    if ours and theirs and len(ours | theirs) > 1:
        counts = " and ".join(" or ".join(f"{tokens:,}" for tokens in sorted(each)) for each in (ours, theirs))
        yield f"{arm.name} and {other.name} are matched by tokens but trained on {counts} tokens"


def _document_ids(arm: Arm) -> set[frozenset[str]]:
    return {frozenset(documents) for documents in arm.documents() if documents}


def _tokens_per_step(arm: Arm) -> set[object]:
    spent = [stage.spent for record in arm.records for stage in record.stages]
    return {each.tokens / each.optimizer_steps for each in spent if each.optimizer_steps}


def _known(values: Iterable[object]) -> set[object]:
    return {value for value in values if value is not None}


def unmatched(baseline: Arm, arms: Sequence[Arm]) -> Iterator[str]:
    """The baseline has the candidate's modules and is judged in the same setting; anything else compares two things at once."""
    facts: dict[str, Callable[[RunRecord], object]] = {
        "network": lambda record: (record.model.num_parameters, tuple(record.model.ttt_layers)),
        "inner loop in the loss that they are judged by": lambda record: record.headline,
    }
    for fact, read in facts.items():
        theirs = {read(record) for record in baseline.records}
        names = [arm.name for arm in arms if {read(record) for record in arm.records} != theirs]
        if names:
            yield f"{baseline.name} is not the matched baseline of {', '.join(names)}: another {fact}"
