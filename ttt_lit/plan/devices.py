"""What a device can do at best, as its vendor publishes it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    name: str
    peak_tflops: float | None
    """10¹² operations per second in dense bf16 matrix products. None: not known."""
    memory_gib: float | None
    """None: not known."""

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


# Vendors call 2³⁰ bytes a GB here. Peaks are those of the data sheets without sparsity.
DEVICES = {
    name: Device(name=name, peak_tflops=peak, memory_gib=memory)
    for name, peak, memory in (
        ("h100", 989, 80),
        ("h200", 989, 141),
        ("a100", 312, 80),
        ("b200", 2250, 180),
        ("l40s", 362, 48),
        ("cpu", None, None),
    )
}


def device_named(name: str, *, peak_tflops: float | None = None, memory_gib: float | None = None) -> Device:
    """A device of the table, with what is given in place of its own figures. ValueError listing the known ones."""
    if name not in DEVICES:
        raise ValueError(f"--device: got {name!r}, expected one of {', '.join(DEVICES)}")
    known = DEVICES[name]
    for option, value in (("--peak-tflops", peak_tflops), ("--memory-gib", memory_gib)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{option}: got {value}, expected a positive number")
    return Device(name=name, peak_tflops=peak_tflops or known.peak_tflops, memory_gib=memory_gib or known.memory_gib)
