"""Exact arms must agree in loss and gradients before they are timed."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from step.arms import POLICIES, Arm
from step.bench import Bench
from step.shapes import changed

# Per tensor, as a share of its norm. bfloat16 rounds every intermediate result to 8 bits, in another order on either side: 0.05 has been
# seen, and 0.4 where the second order is missing. That the method is the same is shown in float32.
TOLERANCE = {"32": 1e-3, "bf16": 0.2}
# A tensor whose gradient almost cancels carries rounding noise of the whole gradient's size.
NOISE = {"32": 1e-5, "bf16": 1e-3}


class Disagreement(Exception):
    """Two computations of one thing differ, or could not be compared: a timing of either would say nothing."""


def worst(errors: Mapping[str, float]) -> tuple[float, str]:
    """What is not a number is worst of all."""
    return max((math.inf if math.isnan(error) else error, name) for name, error in errors.items())


class Reference:
    """Loss and gradients that every other exact arm must have too; kept on the host, whose memory is not measured there."""

    def __init__(self, name: str, loss: float, gradients: Mapping[str, Tensor], precision: str) -> None:
        self.name, self._loss, self._precision = name, loss, precision
        self._norms = {name: torch.linalg.vector_norm(g).item() for name, g in gradients.items()}
        self._gradients = {name: g.cpu() for name, g in gradients.items()}

    def error(self, gradients: Mapping[str, Tensor]) -> tuple[float, str]:
        """Largest ‖difference‖ / ‖gradient‖ of a tensor, and its name."""
        if gradients.keys() != self._gradients.keys():
            return math.inf, sorted(gradients.keys() ^ self._gradients.keys())[0]
        noise = NOISE[self._precision] * math.hypot(*self._norms.values())
        differences = {
            n: torch.linalg.vector_norm(g - self._gradients[n].to(g.device)).item() for n, g in gradients.items()
        }
        return worst({name: d / (self._norms[name] + noise) for name, d in differences.items()})

    def require(self, name: str, loss: float, gradients: Mapping[str, Tensor]) -> float:
        """The largest error of a gradient; Disagreement if it is above the tolerance."""
        error, where = self.error(gradients)
        limit = TOLERANCE[self._precision]
        off = abs(loss - self._loss) / abs(self._loss)
        if not (error <= limit and off <= limit / 10):
            raise Disagreement(
                f"{name} and {self.name} disagree: gradient of {where} off by {error:.1e} of its norm (limit {limit:g}), loss "
                f"{loss:.6f} and {self._loss:.6f}; nothing is timed"
            )
        return error


def check_short(bench: Bench) -> list[dict[str, Any]]:
    """Naive against engine on three chunks, a window that cuts and its sinks: in float32 as it comes, and as it is timed."""
    window, chunk = bench.sizes["window"], bench.sizes["chunk"]
    bench.draw(3 * chunk)
    kept = bench.specs
    bench.specs = {"ttt": changed(kept["sinks"], window=min(window, 3 * chunk // 2))}
    # What is compiled stays compiled, so that comes last.
    variants = [("32", False), (bench.arguments.precision, bench.compiled)]
    try:
        return [_check_variant(bench, *variant) for variant in dict.fromkeys(variants)]
    except torch.OutOfMemoryError as problem:
        raise Disagreement("the check of naive against engine does not fit in memory, so nothing is timed") from problem
    finally:
        bench.specs, bench.precision = kept, bench.arguments.precision


def _check_variant(bench: Bench, precision: str, compiled: bool) -> dict[str, Any]:
    bench.precision = precision
    engine = dataclasses.replace(POLICIES["recompute"], compile=compiled)

    def results(kind: str) -> tuple[float, dict[str, Tensor]]:
        arm = Arm(kind, None, None if kind == "naive_recompute" else engine)
        bench.prepare(arm)
        return bench.forward_backward(arm).item(), bench.take_gradients()

    reference = Reference("naive", *results("naive_recompute"), precision)
    error = reference.require("engine", *results("engine"))
    distance, _ = reference.error(results("first_order")[1])
    return {
        "context": bench.context,
        "precision": precision,
        "compiled": compiled,
        "largest_gradient_error": error,
        "limit": TOLERANCE[precision],
        "first_order_error": distance,
    }
