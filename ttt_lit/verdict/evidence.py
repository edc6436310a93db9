"""What keeps a comparison from deciding: reasons for "insufficient evidence" that lie in the baseline, the runs and their number.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ttt_lit.record.schema import RunRecord
from ttt_lit.verdict.arm import Account, Arm, unknown_parents
from ttt_lit.verdict.comparison import flags
from ttt_lit.verdict.findings import MIN_LEARNT
from ttt_lit.verdict.formats import counted
from ttt_lit.verdict.matching import unlike_inner_loops, unmatched
from ttt_lit.verdict.statistics import MIN_DOCUMENTS

SHARES = (0.35, 0.5, 0.7, 1.0)
"""Budgets at which a candidate is run, as shares of the baseline's GPU-hours; all must be there."""
MIN_SEEDS = 2
"""One training run says nothing about how much training runs differ."""
DEMO_EVALUATION_TOKENS = 1_000_000
"""30 blocks of 32K. Paired differences of documents scatter by some 0.03 nats, so fewer cannot resolve 0.01."""
DEMO_TOKENS = 100_000_000
"""Trained by the baseline: 0.4 % of the full schedule. A model that has seen less has hardly left the statistics of single tokens."""
DEMO_CONTEXT = 8_192
"""Tokens. The paper's short context; learning while reading is about what lies beyond it."""


def baseline_reasons(baseline: Arm | None, resamples: int) -> Iterator[str]:
    """What is wrong with the arm that all others are compared with."""
    if baseline is None:
        yield "there is no baseline, or more than one; exactly one token-matched arm of TTT-E2E from scratch is needed"
        return
    yield from flags(baseline, resamples=resamples)
    yield from _by_seed(baseline, _weak_baseline)
    yield from demo_reasons(baseline)
    if not baseline.gpu_hours("marginal"):
        yield f"the GPU-hours of {baseline.name} are not known"


def demo_reasons(baseline: Arm) -> Iterator[str]:
    """Why runs of this size decide nothing, however many there are."""
    yield from _by_seed(baseline, _demo_size)


def _by_seed(baseline: Arm, problems: Callable[[RunRecord], Iterator[str]]) -> Iterator[str]:
    """What several seeds have alike is said once."""
    seeds: dict[str, list[str]] = {}
    for record in baseline.records:
        for problem in problems(record):
            seeds.setdefault(problem, []).append(str(record.seed))
    yield from (f"{baseline.name}, seed {', '.join(each)}: {problem}" for problem, each in seeds.items())


def _weak_baseline(record: RunRecord) -> Iterator[str]:
    if record.start.source is not None or record.parents:
        yield "the baseline did not start from random weights"
    final, entropy = record.final(), record.unigram_entropy
    if entropy is None:
        yield "the unigram entropy is not known, so whether the baseline has learnt enough cannot be told"
    elif final is not None and not final.nats_per_token <= entropy - MIN_LEARNT:
        yield (
            f"the baseline has learnt too little: {final.nats_per_token:.3f} nats per token, unigram entropy {entropy:.3f}, "
            f"at least {MIN_LEARNT:g} nat below is needed"
        )


def _demo_size(record: RunRecord) -> Iterator[str]:
    final = record.final()
    if final is not None and final.tokens < DEMO_EVALUATION_TOKENS:
        yield f"demo size: {final.tokens:,} evaluation tokens, at least {DEMO_EVALUATION_TOKENS:,} are needed"
    if record.totals.tokens < DEMO_TOKENS:
        yield f"demo size: {record.totals.tokens:,} training tokens, at least {DEMO_TOKENS:,} are needed"
    if final is not None and final.context < DEMO_CONTEXT:
        yield f"demo size: a long context of {final.context:,} tokens, at least {DEMO_CONTEXT:,} are needed"
    sources = set() if final is None else {block.source for block in final.documents}
    if final is not None and len(sources) < MIN_DOCUMENTS:
        yield f"demo size: {counted(len(sources), 'document')}, an interval needs at least {MIN_DOCUMENTS}"


def missing_shares(arms: Mapping[float, Arm]) -> Iterator[str]:
    """Budgets at which a candidate was not run; ``arms``: by planned share."""
    if not arms:
        yield "there are no wall-clock-matched runs; run the candidate at " + ", ".join(f"{s:g}" for s in SHARES)
        return
    for share in SHARES:
        if share not in arms:
            yield f"no run at {share:g} of the baseline's GPU-hours"


def single_seeds(baseline: Arm | None, arms: Sequence[Arm]) -> Iterator[str]:
    """Arms with too few seeds, in one sentence; ``arms``: the wall-clock-matched ones."""
    single = [arm.name for arm in ([] if baseline is None else [baseline]) + list(arms) if len(arm.seeds) < MIN_SEEDS]
    if single:
        yield f"a single seed: {', '.join(single)}; run at least {MIN_SEEDS}"


def evidence_reasons(baseline: Arm | None, arms: Sequence[Arm], account: Account) -> Iterator[str]:
    """Too few seeds, or GPU-hours that cannot be compared; ``arms``: the wall-clock-matched ones."""
    yield from single_seeds(baseline, arms)
    if baseline is not None:
        environments = [record.environment for arm in (baseline, *arms) for record in arm.records]
        devices = {f"{each.num_devices} × {each.device}" for each in environments}
        if len(devices) > 1:
            yield f"GPU-hours of different devices: {', '.join(sorted(devices))}; run all on the same"
        yield from unmatched(baseline, arms)
    yield from unlike_inner_loops(arms)
    for arm in arms:
        if arm.gpu_hours("marginal") is None:
            yield f"the GPU-hours of {arm.name} are not known"
    if account == "with_parents":
        records = [record for arm in (*([] if baseline is None else [baseline]), *arms) for record in arm.records]
        unknown = {name for record in records for name in unknown_parents(record)}
        if unknown:
            yield f"the cost of parents is not known: {', '.join(sorted(unknown))}"
