"""Import of a full-size checkpoint: seconds of the header audit, seconds and memory of the import without parity.

    python benchmarks/import_full_size.py [--config CONFIG_JSON] [--dir SCRATCH] [--json FILE]

A random bfloat16 checkpoint of the config's shapes (Qwen2.5-1.5B by default, 3.1 GB; ``configs/shapes/`` has others, and
any family will do) is written to a scratch folder, imported in a process of its own and removed. Needs about twice the
checkpoint's size on disk.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ttt_lit.checkpoint.importing import audit_headers, import_checkpoint
from ttt_lit.checkpoint.tensors import write_tensors
from ttt_lit.families import family_of_config

SHAPES = Path(__file__).parents[1] / "configs/shapes"
GOALS = {"audit_seconds": 1.0, "import_seconds": 60.0, "peak_gib": 6.0}


def write_random(config_file: Path, folder: Path) -> int:
    """A random bf16 checkpoint of the config's shapes; returns its number of parameters."""
    config = json.loads(config_file.read_text())
    family = family_of_config(config)
    generator = torch.Generator().manual_seed(0)
    spec = family.spec_from_config(config)
    names = family.stored_names(spec)
    folder.mkdir()
    state = {
        names[name]: torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
        for name, shape in spec.parameter_shapes().items()
    }
    write_tensors(folder, state)
    shutil.copyfile(config_file, folder / "config.json")
    return spec.num_parameters()


def measure(source: str, output: str) -> dict[str, float]:
    """Seconds and peak resident GiB of this process, start of the interpreter and imports apart for the seconds."""
    start = time.perf_counter()
    audit_headers(source)
    audited = time.perf_counter()
    import_checkpoint(source, output, parity=False, console=Console(quiet=True))
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"audit_seconds": audited - start, "import_seconds": done - audited, "peak_gib": peak}


def run_apart(*arguments: str) -> str:
    """This file again with a hidden option. A process inherits the peak memory of the one that starts it, so that one
    must stay small: writing the checkpoint happens apart too."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=SHAPES / "qwen2.5-1.5b.json")
    parser.add_argument(
        "--dir", type=Path, help="where the scratch folder goes; the system's temporary folder by default"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        print(write_random(*map(Path, arguments.write)))
        return 0
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="import-full-size-") as scratch:
        source = f"{scratch}/hf"
        Console(stderr=True).print("writing a random checkpoint (about a minute for 3 GB) …")
        parameters = int(run_apart("--write", str(arguments.config), source))
        figures = json.loads(run_apart("--measure", source, f"{scratch}/ours"))
    table = Table(title=f"import of {arguments.config.name}: {parameters:,} parameters, bfloat16, without parity")
    for column in ("figure", "measured", "goal"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, goal in GOALS.items():
        table.add_row(name, f"{figures[name]:.2f}", f"< {goal:g}")
    Console().print(table)
    missed = [name for name, goal in GOALS.items() if figures[name] >= goal]
    result = figures | {"parameters": parameters, "goals": GOALS, "missed": missed, "torch": torch.__version__}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
