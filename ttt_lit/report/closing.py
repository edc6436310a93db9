"""What stands below the families: problems, the comparison across families, and how to read it all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ttt_lit.record.schema import RunRecord
from ttt_lit.report.blocks import Block, Code, Grid, Heading, Listing, Paragraph
from ttt_lit.report.figure_style import ROLE_NAMES
from ttt_lit.verdict.arm import Arm, gpu_hours
from ttt_lit.verdict.comparison import Differences
from ttt_lit.verdict.formats import hours, loss
from ttt_lit.verdict.gates import MAX_DELTA, MAX_LAST_RISE, MAX_SHARE, MIN_SAVING, flags
from ttt_lit.verdict.heldout import final_bytes
from ttt_lit.verdict.study import FamilyStudy, Study


def problems(study: Study, differences: Mapping[str, Mapping[str, Differences]]) -> list[Block]:
    """Everything that keeps a run or a comparison from being taken at face value; ``differences``: by family and arm."""
    arms = [arm for family in study.families.values() for arm in family.arms]
    compared = [each for family in differences.values() for arm in family.values() for each in arm.values() if each]
    reasons = [
        *(flag for arm in arms for flag in flags(arm)),
        *(reason for each in compared for reason in each.reasons),
    ]
    # A family's problem is said with its name; the same without it would be said twice.
    known = {problem.partition(": ")[2] for problem in study.problems}
    found = list(dict.fromkeys([*study.problems, *_missing(study), *(each for each in reasons if each not in known)]))
    unfinished = [record for arm in arms for record in arm.records if record.status != "finished"]
    blocks: list[Block] = [Heading(level=2, text="Flags and problems")]
    blocks.append(Listing(items=tuple(found)) if found else Paragraph(text="None."))
    if unfinished:
        rows = tuple((record.name, record.status, record.reason or "–") for record in unfinished)
        header = ("run", "status", "reason")
        blocks.append(Grid(caption="Runs that did not finish", header=header, rows=rows, wide=True))
    return blocks


def _missing(study: Study) -> Iterator[str]:
    """Roles that a decision needs and no run has."""
    for family in study.families.values():
        arms: dict[str, Arm | None] = {
            "ttt_scratch": family.baseline,
            "fa_scratch": family.fa_scratch,
            "fa_import": family.fa_import,
        }
        for role, arm in arms.items():
            if arm is None and not any(
                each.role == role and not each.variant and each.share is None for each in family.arms
            ):
                yield f"{family.family}: no run of role {role} ({ROLE_NAMES[role]}), matched by tokens, without a variant"  # type: ignore[index]
        if not family.candidates:
            yield f"{family.family}: no bridge and no direct conversion"


def across(study: Study) -> list[Block]:
    """Bits per byte of every arm: the only unit that two tokenizers share, with the bytes measured. Empty where there is one family."""
    if len(study.families) < 2:
        return []
    rows = tuple(
        (
            arm.name,
            family.family,
            ROLE_NAMES.get(arm.role, "none"),
            loss(arm.bits_per_byte),
            final_bytes(arm.records),
        )
        for family in study.families.values()
        for arm in _main_arms(family)
    )
    return [
        Heading(level=2, text="Across families"),
        Paragraph(
            text="Families have tokenizers of their own, so their nats per token cannot be compared. Bits per byte can, but only as "
            "orientation: each family's held-out blocks are cut by its own tokenizer, so they do not hold the same text, not even the "
            "same amount of it, and the models differ too."
        ),
        Grid(
            caption="Final long-context loss in bits per byte, token-matched arms",
            header=("arm", "family", "role", "bits per byte", "held-out bytes"),
            rows=rows,
        ),
    ]


def _main_arms(family: FamilyStudy) -> list[Arm]:
    return [arm for arm in family.arms if not arm.variant and arm.share is None]


def other_runs(study: Study) -> list[Block]:
    """Runs that take no part in the comparison."""
    records = [*study.external, *study.others]
    if not records:
        return []
    rows = tuple(
        (
            record.name,
            record.model.family,
            record.role or "none",
            record.status,
            _final(record),
            hours(gpu_hours(record, "marginal")),
        )
        for record in records
    )
    return [
        Heading(level=2, text="Other runs"),
        Grid(
            caption="External checkpoints' own training, and runs without a role",
            header=("run", "family", "role", "status", "loss", "GPU-h"),
            rows=rows,
        ),
    ]


def _final(record: RunRecord) -> str:
    final = record.final()
    return loss(final.nats_per_token if final else None)


def reading(records: Sequence[RunRecord], command: str) -> list[Block]:
    """How to read the page, what it was measured on, and how it was made."""
    return [
        Heading(level=2, text="How to read this"),
        Paragraph(
            text="Terms. An arm is one setting, run once per seed; the baseline is TTT-E2E trained from scratch; FA is full attention; a "
            "candidate converts a pretrained model, through sliding-window stages (bridge) or at once (direct). Stages: A trains from "
            "scratch on short contexts, B0 goes on with dense attention, B1 with a sliding window, B2 with TTT layers, C on long "
            "contexts. An arm's loss is that of all held-out blocks at the end of its last stage, with the inner loop on where it "
            "has TTT layers unless its configuration says otherwise."
        ),
        Paragraph(
            text=f"Accounts. GPU-hours are device-hours of the compute account: training, waiting for data included; validation, "
            f"checkpoints and compilation are booked apart. “Run alone” is what the run itself took, “with parents” adds every run "
            f"that made its start checkpoint, and is unknown where one of these is. The saving of {MIN_SAVING:.0%} is judged "
            f"under each; a budget of time is overrun by up to two steps per stage, so measured shares up to {MAX_SHARE:.2f} count as "
            f"{1 - MIN_SAVING:.2f}."
        ),
        Paragraph(
            text="Time. GPU-hours and seconds per 1,000 tokens compare runs only where each had its device to itself: of runs that "
            "shared a device or CPU cores, with each other or with other work, they are not comparable, and no gate can see that. "
            "On a CPU a “GPU-hour” is an hour of one process."
        ),
        Paragraph(
            text="Intervals. Differences are paired by held-out block and by seed: every block was read by both models, and only the "
            "difference is averaged; below zero the first named is better. The 95% interval comes from resampling documents, with all "
            "blocks cut from them, and seeds where there are several; with one seed it says nothing about what another seed would "
            "give, and with two or three it is too narrow where seeds differ much; a single document gives no interval. “Flagged” or † "
            "behind a difference: it may not be used as evidence, for reasons that stand under Flags and problems."
        ),
        Paragraph(
            text="Ceiling. What the imported model loses when it is given only the last tokens, a window of them, on one block of each "
            "held-out document that was probed (the runs' losses are over other blocks of the same held-out side): as much as a memory of "
            "what lies further back would win that is as good as its own full attention. A difference that is a "
            "small share of it is a small part of what there is to remember; one beyond 100% is not remembering alone. It is measured "
            "before any training, so a trained model may make somewhat more of a long context."
        ),
        Paragraph(
            text="Insufficient evidence. Where a gate judges a difference, it passes or fails only if the whole interval lies on one side "
            f"of its limit (for the loss {MAX_DELTA:g} nats per token). The one exception is stable convergence, which asks whether the "
            "training loss rises over the last third of stage C: after convergence it is flat, and the interval of its change lies on "
            "both sides of 0. So this gate fails if that whole interval is above 0, and otherwise passes if it is nowhere above "
            f"{MAX_LAST_RISE:g}; a smaller rise may hide in it. Everything else, missing runs included, is “insufficient”. That is no "
            "failure of the method and no success."
        ),
        Heading(level=2, text="Environment"),
        Listing(items=tuple(_environments(records))),
        Heading(level=2, text="Made with"),
        Code(text=command),
    ]


def _environments(records: Sequence[RunRecord]) -> Iterator[str]:
    """Each environment once, with how many runs had it."""
    found: dict[str, int] = {}
    for record in records:
        environment = record.environment
        versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
        tree = f"revision {record.git.revision[:12]}" if record.git.revision else "no revision"
        parts = (
            f"{environment.num_devices} × {environment.device}",
            versions or "versions not recorded",
            f"kernels {', '.join(environment.kernels) or 'not recorded'}",
            tree + (" with changes" if record.git.dirty else ""),
        )
        text = "; ".join(parts)
        found[text] = found.get(text, 0) + 1
    for text, number in sorted(found.items()):
        yield f"{text} ({number} {'run' if number == 1 else 'runs'})"
