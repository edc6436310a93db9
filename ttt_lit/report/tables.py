"""The tables of a study, for the page and the terminal alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ttt_lit.record.measured import Damage
from ttt_lit.record.schema import RunRecord, Stage
from ttt_lit.report.table import Cell, Folded, Mark, Rows, Table
from ttt_lit.report.words import ACCOUNT_WORDS, NOT_PROVED, REFERENCES, ROLE_NAMES, difference, shared_cores
from ttt_lit.verdict.arm import ACCOUNTS, Arm, gpu_hours
from ttt_lit.verdict.comparison import Differences, compare, hours_ratio, hours_to_target, reached_at_once, target_loss
from ttt_lit.verdict.formats import NONE, billions, change, count, counted, hours, loss
from ttt_lit.verdict.gate import Gate
from ttt_lit.verdict.gates import CandidateGates
from ttt_lit.verdict.heldout import final_bytes, subset_loss, subset_words
from ttt_lit.verdict.recommendation import shorten_failures
from ttt_lit.verdict.study import FamilyStudy, Study
from ttt_lit.verdict.two_by_two import Cells, Effects
from ttt_lit.verdict.unfinished import marked

UPPER_BOUND = "≤"
"""Before hours that are an upper bound."""
_FOLDED_FROM = 4
"""Reasons of a passed gate from which they are folded."""
_DELTAS = tuple(f"Δ {name}" for name in REFERENCES.values())


def measured(
    family: FamilyStudy, judged: Sequence[CandidateGates], differences: Mapping[str, Differences]
) -> Table | None:
    """The baseline, every conversion at its number of tokens, and at every budget that is a share of its GPU-hours."""
    arms: dict[str, tuple[Arm, str]] = {}
    for each in judged:
        matched = None if each.variant else family.matched(each.experiment, each.variant)
        words = NOT_PROVED if each.marginal.outcome == "insufficient" else "measured"
        for arm in (*([matched] if matched else []), *family.shares(each.experiment, each.variant).values()):
            arms[arm.name] = (arm, "not measured" if arm.loss is None else words)
    if not arms:
        return None
    every = {family.baseline.name: (family.baseline, "baseline"), **arms} if family.baseline else arms
    rows: Rows = tuple(
        (
            (marked(arm.name, arm.records), words),
            loss(arm.loss),
            *_shares(arm, family.baseline),
            *(difference(differences[arm.name][role]) for role in REFERENCES),
        )
        for arm, words in every.values()
    )
    over = [d.interval for name in arms for d in (differences[name]["ttt_scratch"],) if d and d.interval]
    samples = dict.fromkeys(
        f"{counted(i.blocks, 'block')} of {counted(i.documents, 'document')}, {counted(i.seeds, 'seed')}" for i in over
    )
    cores = shared_cores(record for arm, _ in every.values() for record in arm.records)
    title = f"{family.family}: long-context loss (nats per token), GPU-hours as a multiple of the baseline's, Δ with 95% interval"
    return Table(
        title + (f" over {' or '.join(samples)}" if samples else "") + (f"; {cores}" if cores else ""),
        ("arm", "loss", *(f"GPU-hours, {words}" for words in ACCOUNT_WORDS.values()), *_DELTAS),
        rows,
    )


def _shares(arm: Arm, baseline: Arm | None) -> list[str]:
    """GPU-hours as multiples of the baseline's, one per account.

    Dashes unless both are finished: the hours of a run that is cut off or still running are not what it costs.
    """
    if baseline is None or not (arm.finished and baseline.finished):
        return [NONE] * len(ACCOUNTS)
    ratios = (hours_ratio(arm, baseline, account) for account in ACCOUNTS)
    return [NONE if ratio is None else f"{ratio:.3f}" if ratio < 1 else f"{ratio:.2f}" for ratio in ratios]


def gate_outcomes(judged: Mapping[str, Sequence[CandidateGates]]) -> Table:
    """One row per candidate, one column per gate and account; ``judged``: by family."""
    found = [(family, each, {_column(g): g for g in each.gates}) for family, of_it in judged.items() for each in of_it]
    columns = list(dict.fromkeys(column for *_, gates in found for column in gates))
    rows: Rows = tuple(
        (each.name, family, *(Mark(gates[column].outcome) if column in gates else NONE for column in columns))
        for family, each, gates in found
    )
    return Table("Outcome of every gate", ("candidate", "family", *columns), rows)


def _column(gate: Gate) -> str:
    return gate.name if gate.account is None else f"{gate.name}, {ACCOUNT_WORDS[gate.account]}"


def gate_numbers(family: FamilyStudy, judged: Sequence[CandidateGates]) -> Table:
    """Every number of every gate, once, with whose it is."""
    said = [(gate, (gate.name, *number)) for each in judged for gate in each.gates for number in gate.numbers]
    return Table(
        f"Gates of {family.family}: what was measured", ("gate", "number", "value", "of"), _once(said), wide=True
    )


def gate_reasons(family: FamilyStudy, judged: Sequence[CandidateGates], *, passed: bool = True) -> Table:
    """Every reason of every gate, once, with whose it is; ``passed``: also of gates that passed."""
    said: list[tuple[Gate, tuple[Cell, ...]]] = []
    for gate in (gate for each in judged for gate in each.gates):
        reasons = tuple(shorten_failures(reason, family) for reason in gate.brief or gate.reasons)
        if gate.outcome == "pass" and len(reasons) >= _FOLDED_FROM:
            reasons = (Folded(reasons),)  # type: ignore[assignment]
        if passed or gate.outcome != "pass":
            said += [(gate, (gate.name, Mark(gate.outcome), reason)) for reason in reasons]
    return Table(f"Gates of {family.family}: reasons", ("gate", "outcome", "reason", "of"), _once(said), wide=True)


def _once(said: Sequence[tuple[Gate, tuple[Cell, ...]]]) -> tuple[tuple[Cell, ...], ...]:
    """Each row once, behind it the arms; with the account where a gate says it under one of two."""
    of: dict[tuple[Cell, ...], dict[str, list[Gate]]] = {}
    for gate, row in said:
        of.setdefault(row, {}).setdefault(gate.subject, []).append(gate)
    return tuple((*row, tuple(_whose(*gates) for gates in arms.values())) for row, arms in of.items())


def _whose(gate: Gate, *others: Gate) -> str:
    return gate.subject if others or gate.account is None else f"{gate.subject}, {ACCOUNT_WORDS[gate.account]}"


def arms(family: FamilyStudy, differences: Mapping[str, Differences]) -> Table:
    """One row per arm, ablations left out: what most readers compare."""
    rows: Rows = tuple(
        (
            marked(arm.name, arm.records),
            (ROLE_NAMES.get(arm.role, "none"), counted(len(arm.records), "seed")),
            loss(arm.loss),
            loss(arm.bits_per_byte),
            billions(arm.tokens),
            *(hours(arm.gpu_hours(account)) for account in ACCOUNTS),
            *(difference(differences[arm.name][role]) for role in REFERENCES),
        )
        for arm in family.arms
        if not arm.variant
    )
    title = f"Arms of {family.family}: final long-context loss in nats per token, Δ with 95% interval (below zero is better)"
    header = ("arm", "role", "loss", "bits per byte", "tokens", "GPU-h alone", "with parents", *_DELTAS)
    return Table(title, header, rows)


def ablations(family: FamilyStudy) -> Table:
    """Variants against the default of the same experiment."""
    rows: list[tuple[Cell, ...]] = []
    for arm in (arm for arm in family.arms if arm.variant):
        shared = family.shares(arm.experiment, "")
        default = family.matched(arm.experiment, "") if arm.share is None else shared.get(arm.share)
        delta = difference(compare(arm, default, ceiling=family.ceiling.ceiling) if default else None)
        variant = arm.variant if arm.share is None else f"{arm.variant} at {arm.share:g}"
        spent = hours(arm.gpu_hours("marginal"))
        rows.append((arm.experiment, variant, loss(arm.loss), delta, spent, count(len(arm.records))))
    title = f"Ablations of {family.family}: variants against the default of the same experiment (nats per token)"
    return Table(title, ("experiment", "variant", "loss", "Δ default variant", "GPU-h alone", "seeds"), tuple(rows))


def readings(family: FamilyStudy, cells: Sequence[Cells]) -> Table:
    """Arms read with and without inner updates."""
    rows: Rows = tuple(
        (marked(each.arm.name, each.arm.records), each.trained, loss(each.off), loss(each.on), difference(each.gain))
        for each in cells
    )
    title = f"Inner updates of {family.family}: final loss of token-matched arms (nats per token; on − off below zero: they help)"
    return Table(title, ("arm", "trained with updates?", "read without", "read with", "on − off"), rows)


def trained_with(family: FamilyStudy, effects: Sequence[Effects]) -> Table:
    """Trained with updates − trained without."""
    rows: Rows = tuple((each.arm.name, each.control.name, *map(difference, each.comparisons)) for each in effects)
    title = f"Trained with − without updates, {family.family}: same start, attention and tokens (nats per token, 95% interval)"
    header = ("trained with", "trained without", "with both − without both", "read with", "read without", "interaction")
    return Table(title, header, rows)


def damage(family: FamilyStudy) -> Table:
    """Damage and gain, per run, stage and context."""
    records = [record for arm in family.arms for record in arm.records]
    return Table(
        "Nats per token: inside the window, beyond it",
        ("run", "stage", "context", "damage at the start", "damage at the end", "change", "gain, on − off"),
        tuple(row for record in records for stage in record.stages for row in _damage(record, stage)),
    )


def _damage(record: RunRecord, stage: Stage) -> Iterator[tuple[Cell, ...]]:
    for context in dict.fromkeys(each.context for each in stage.damage):
        found = {(each.when, each.inner): each for each in stage.damage if each.context == context}
        start, off, on = (found.get(key) for key in (("start", "off"), ("end", "off"), ("end", "on")))
        pairs = (_parts(start), _parts(off), _minus(off, start), _minus(on, off))
        lines = ((f"inside {change(inside)}", f"beyond {change(beyond)}") for inside, beyond in pairs)
        yield marked(record.name, [record]), stage.name, context, *lines


def _parts(damage: Damage | None) -> tuple[float | None, float | None]:
    return (None, None) if damage is None else (damage.inside, damage.beyond)


def _minus(after: Damage | None, before: Damage | None) -> tuple[float | None, ...]:
    pairs = zip(_parts(after), _parts(before), strict=True)
    return tuple(None if a is None or b is None else a - b for a, b in pairs)


def to_target(family: FamilyStudy) -> Table | None:
    """GPU-hours to the target loss, the numbers of the figure; None: there is no target."""
    target, found = reached(family), target_arms(family)
    if target is None or not found:
        return None
    rows: Rows = tuple((marked(arm.name, arm.records), *hours_to_reach(arm, target)) for arm in found)
    title = f"GPU-hours to {target_words(family)}"
    if any(UPPER_BOUND in cell for row in rows for cell in row[1:]):
        title += f". {UPPER_BOUND}: at the target at the first evaluation, so it was reached there or before"
    return Table(title, ("arm", *ACCOUNT_WORDS.values()), rows)


def target_arms(family: FamilyStudy) -> list[Arm]:
    """The arms that have a series; ablations left out."""
    return [arm for arm in family.arms if not arm.variant and any(record.evaluations for record in arm.records)]


def reached(family: FamilyStudy) -> float | None:
    """The target: the loss on the fixed subset that the baseline had reached at its last evaluation."""
    return None if family.baseline is None else target_loss(family.baseline)


def target_words(family: FamilyStudy) -> str:
    target = reached(family)
    if family.baseline is None or target is None:
        return "a target loss"
    records = family.baseline.records
    return f"{subset_loss(target, records)} nats per token on {subset_words(records)}"


def hours_to_reach(arm: Arm, target: float) -> tuple[str, ...]:
    """One text per account, mean over seeds; ``UPPER_BOUND`` where a seed was at the target at its first evaluation."""
    alone, whole = (hours_to_target(arm, target, account) for account in ACCOUNTS)
    if alone is None:
        return ("not known" if arm.gpu_hours("marginal") is None else "not reached",) * 2
    bound = f"{UPPER_BOUND} " if any(reached_at_once(record, target) for record in arm.records) else ""
    return bound + hours(alone), "not known" if whole is None else bound + hours(whole)


def across(study: Study) -> Table:
    """Bits per byte of every token-matched arm: the only unit that two tokenizers share, with the bytes measured."""
    rows: Rows = tuple(
        (arm.name, family.family, ROLE_NAMES.get(arm.role, "none"), loss(arm.bits_per_byte), final_bytes(arm.records))
        for family in study.families.values()
        for arm in family.arms
        if not arm.variant and arm.share is None
    )
    title = "Final long-context loss in bits per byte, token-matched arms"
    return Table(title, ("arm", "family", "role", "bits per byte", "held-out bytes"), rows)


def other_runs(study: Study) -> Table:
    """Runs that take no part in the comparison."""
    rows: list[tuple[Cell, ...]] = []
    for record in (*study.external, *study.others):
        final = record.final()
        spent, measured = hours(gpu_hours(record, "marginal")), loss(final.nats_per_token if final else None)
        rows.append((record.name, record.model.family, record.role or "none", record.status, measured, spent))
    title = "External checkpoints' own training, and runs without a role"
    return Table(title, ("run", "family", "role", "status", "loss", "GPU-h"), tuple(rows))


def unfinished(study: Study) -> Table:
    """Runs that did not finish."""
    records = [record for family in study.families.values() for arm in family.arms for record in arm.records]
    rows: Rows = tuple((each.name, each.status, each.reason or NONE) for each in records if each.status != "finished")
    return Table("Runs that did not finish", ("run", "status", "reason"), rows, wide=True)
