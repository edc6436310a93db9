"""Names of all metrics, each with its group and its unit, defined once.

A name reads ``group/quantity_unit``. Logging code, the TensorBoard layout and the report use these constants, so a
curve and a table never disagree about what they show. Names are plain strings because they end up in checkpoints.
Standard library only.
"""

from __future__ import annotations

from typing import Final, Literal

Inner = Literal["on", "off"]
"""Whether the inner loop updates the fast weights while a loss is measured."""

Account = Literal["compute", "validation", "checkpoint", "compile"]
"""What a device-second was spent on. Compute includes waiting for data."""
ACCOUNTS: Final[tuple[Account, ...]] = ("compute", "validation", "checkpoint", "compile")

TRAIN_LOSS: Final = "train/loss_nats_per_token"
TEACHER_KL: Final = "train/teacher_kl_nats_per_token"
GRAD_NORM: Final = "train/outer_grad_norm"
INNER_UPDATE_NORM: Final = "inner/update_norm"
LEARNING_RATE: Final = "optim/lr"
INNER_LEARNING_RATE: Final = "inner/lr"
BUDGET_SPENT: Final = "budget/spent_fraction"
TOKENS: Final = "budget/tokens"
BYTES: Final = "budget/bytes"
TOKENS_PER_SECOND: Final = "throughput/tokens_per_s"
SECONDS_PER_1K_TOKENS: Final = "throughput/s_per_1k_tokens"
FLOP_PER_SECOND: Final = "throughput/flop_per_s"
PEAK_MEMORY: Final = "memory/peak_gib"
FINAL_LOSS: Final = "final/loss_nats_per_token"
FINAL_BITS_PER_BYTE: Final = "final/bits_per_byte"
FINAL_GPU_HOURS: Final = "final/gpu_hours"

UNITS: Final[dict[str, str]] = {
    TRAIN_LOSS: "nats per token",
    TEACHER_KL: "KL(teacher ‖ model) in nats per token, before its weight",
    GRAD_NORM: "global L2 norm of the outer gradient before clipping",
    INNER_UPDATE_NORM: "L2 norm of the fast weights' change per chunk, mean over sequences and chunks",
    LEARNING_RATE: "outer learning rate",
    INNER_LEARNING_RATE: "inner learning rate",
    BUDGET_SPENT: "share of the stage's budget, 0 to 1",
    TOKENS: "tokens over all ranks",
    BYTES: "bytes of text over all ranks",
    TOKENS_PER_SECOND: "tokens per second of compute over all devices",
    SECONDS_PER_1K_TOKENS: "seconds of compute per 1,000 tokens over all devices",
    FLOP_PER_SECOND: "floating-point operations per second by the analytic count, over all devices",
    PEAK_MEMORY: "GiB of rank 0: allocated by the stage on a GPU, resident in the process so far on a CPU",
    FINAL_LOSS: "nats per token of the held-out long blocks at the end of the run, as its headline says: inner loop on or off",
    FINAL_BITS_PER_BYTE: "the same in bits per byte of text",
    FINAL_GPU_HOURS: "device-hours of compute of the whole run",
}
"""The unit of every fixed name above; names made by the functions below state theirs in their docstring."""

TOKENS_AXIS: Final = "tokens/"
GPU_HOURS_AXIS: Final = "gpu_hours/"


def learning_rate(group: str) -> str:
    """Name of one optimiser group's learning rate."""
    return f"{LEARNING_RATE}/{group}"


def val_loss(inner: Inner) -> str:
    """Name of the validation loss in nats per token."""
    return f"val/{inner}/loss_nats_per_token"


def val_bits_per_byte(inner: Inner) -> str:
    """Name of the validation loss in bits per byte of text."""
    return f"val/{inner}/bits_per_byte"


def gpu_seconds(account: Account) -> str:
    """Name of one account of device-seconds (seconds × devices)."""
    return f"budget/gpu_s_{account}"


def position_loss(bucket: tuple[int, int], inner: Inner) -> str:
    """Name of the mean loss (nats per token) over positions start … stop - 1; zero-padded, so that names sort."""
    start, stop = bucket
    return f"position/{inner}/nats_per_token_{start:06d}_to_{stop:06d}"


DAMAGE_PARTS: Final = ("inside", "beyond", "nats")
"""Of a context's positions: inside the stage's window, beyond it, all."""


def damage(context: str, inner: Inner, part: str) -> str:
    """Name of the loss above the imported model's on the same tokens, nats per token, at both ends of a stage."""
    return f"damage/{context}/{inner}/{part}_nats_per_token"


def on_tokens_axis(name: str) -> str:
    """The same metric logged with ``step`` = tokens trained; mixed axes under one tag are unreadable."""
    return TOKENS_AXIS + name


def on_gpu_hours_axis(name: str) -> str:
    """The same metric logged with ``step = gpu_hours_step(seconds)``."""
    return GPU_HOURS_AXIS + name


def gpu_hours_step(device_seconds: float) -> int:
    """Thousandths of a GPU-hour: TensorBoard steps are integers, and whole hours would be too coarse."""
    return round(device_seconds / 3.6)


def custom_scalars_layout() -> dict[str, dict[str, list[object]]]:
    """Layout for ``SummaryWriter.add_custom_scalars``: position buckets together, inner loop on beside off."""
    return {
        "loss by token position": {
            "inner loop on": ["Multiline", ["position/on/.*"]],
            "inner loop off": ["Multiline", ["position/off/.*"]],
        },
        "training": {
            "nats per token against tokens": ["Multiline", ["^" + on_tokens_axis(TRAIN_LOSS)]],
            "nats per token against thousandths of a GPU-hour": ["Multiline", ["^" + on_gpu_hours_axis(TRAIN_LOSS)]],
        },
        "damage": {
            "inner loop off": ["Multiline", ["damage/.*/off/.*"]],
            "inner loop on": ["Multiline", ["damage/.*/on/.*"]],
        },
        "validation": {
            "nats per token": ["Multiline", ["^" + val_loss("on"), "^" + val_loss("off")]],
            "bits per byte": ["Multiline", ["^" + val_bits_per_byte("on"), "^" + val_bits_per_byte("off")]],
            "nats per token against tokens": [
                "Multiline",
                [on_tokens_axis(val_loss("on")), on_tokens_axis(val_loss("off"))],
            ],
            "nats per token against thousandths of a GPU-hour": [
                "Multiline",
                [on_gpu_hours_axis(val_loss("on")), on_gpu_hours_axis(val_loss("off"))],
            ],
        },
    }


# The first bucket is 1/128 of the context and the others grow by sqrt(2): 15 buckets, edges at a half, a quarter, …
_FIRST_SHARE = 128
_LOG_BUCKETS = 14


def position_buckets(context: int) -> list[tuple[int, int]]:
    """Log-spaced ranges ``(start, stop)`` that cover 0 … context without gaps: 8 to 15 for a context of at least 16.

    Edges fall on context/2, context/4, … where these are whole, so a window of a quarter of the context ends a bucket.
    """
    if context < 1:
        raise ValueError(f"position_buckets: got context {context}, expected at least 1 token")
    first = max(1, context // _FIRST_SHARE)
    ratio = (context / first) ** (1 / _LOG_BUCKETS)
    edges = sorted({0, context} | {round(first * ratio**index) for index in range(_LOG_BUCKETS)})
    return list(zip(edges[:-1], edges[1:], strict=True))
