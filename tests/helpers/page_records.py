"""A run as pages show it: with a curve, evaluations and positions."""

import csv
import io
import math

from helpers.records import CONTEXT, point, run, validation
from ttt_lit.record.measured import Bucket, Throughput, Transition
from ttt_lit.record.schema import Parent

DOCUMENTS = [f"{number:012x}" for number in range(12)]


def arm(experiment, role, loss, *, hours, seed=0, noise=0.0, **fields):
    """A run whose evaluations, buckets, speed and transition are there to be drawn."""
    scatter = {each: 0.1 * math.sin(number) + noise * (number % 3) for number, each in enumerate(DOCUMENTS)}
    final = validation({each: loss + by for each, by in scatter.items()})
    edges = [0, 64, 1024, 8192, CONTEXT]
    final.buckets = [
        Bucket(start=start, stop=stop, nats_per_token=loss - 0.1 * place)
        for place, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True))
    ]
    series = [point(hours * share, loss + 0.5 * (1 - share)) for share in (0.25, 0.5, 0.75, 0.95)]
    whole = {"parents": [] if role.endswith("scratch") else [Parent(name="free", gpu_seconds=0.0)]}
    record = run(experiment, role, {}, seed=seed, hours=hours, final=final, evaluations=series, **(whole | fields))
    stage = record.stages[0]
    stage.throughput = Throughput(
        tokens_per_second=1e5, seconds_per_1k_tokens=0.01, flop_per_token=1.0, flop_per_second=1.0
    )
    stage.transition = Transition(kind="window", preserves=True, before=3.1, after=3.1, tolerance=1e-5)
    return record


def rows_of(sheet):
    """The rows of a CSV file's text or bytes, by column."""
    text = sheet.decode("utf-8") if isinstance(sheet, bytes) else sheet
    return list(csv.DictReader(io.StringIO(text, newline="")))
