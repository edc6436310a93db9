"""The command line: one function per command, imported only when it runs, so that help answers at once."""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

# Two releases of Lightning carried malware (pytorch-lightning#21691, GHSA-w37p-236h-pfx3): never import them.
MALICIOUS_LIGHTNING = ("2.6.2", "2.6.3")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 an error of the input or a failed check, 2 a wrong command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](rest)
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _import(arguments: list[str]) -> int:
    """Hugging Face checkpoint → our checkpoint, audited and proved equal."""
    parser = argparse.ArgumentParser(prog="cli.py import", description=_import.__doc__)
    parser.add_argument("--source", required=True, help="folder of a Hugging Face checkpoint, or a hub id")
    parser.add_argument("--output", required=True, help="folder to make; must not exist")
    parser.add_argument(
        "--allow",
        action="append",
        metavar="KEY=REASON",
        help="drop an extra tensor and record why; may be given several times",
    )
    parser.add_argument(
        "--parity",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the logits with transformers; off only for models that do not fit into memory",
    )
    parser.add_argument(
        "--trained-by",
        metavar="RUN",
        help="folder or record.json of the run that trained the source, if there is one: its GPU-hours are counted as a parent's",
    )
    given = parser.parse_args(arguments)
    from ttt_lit.checkpoint.importing import import_checkpoint

    trained_by = None
    if given.trained_by is not None:
        from ttt_lit.record.schema import RunRecord

        trained_by = RunRecord.read(Path(given.trained_by)).trained_by()
    import_checkpoint(given.source, given.output, allow=given.allow, parity=given.parity, trained_by=trained_by)
    print(f"written to {given.output}")
    return 0


def _export(arguments: list[str]) -> int:
    """Our dense or windowed checkpoint → Hugging Face folder."""
    parser = argparse.ArgumentParser(prog="cli.py export", description=_export.__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder of a dense or windowed checkpoint of ours")
    parser.add_argument("--output", required=True, help="folder to make; must not exist")
    parser.add_argument(
        "--engine",
        choices=("any", "transformers"),
        default="any",
        help="who has to run it: transformers and vLLM's own class (default), or transformers alone",
    )
    given = parser.parse_args(arguments)
    from ttt_lit.checkpoint.export import export_checkpoint

    print(f"written to {export_checkpoint(given.checkpoint, given.output, engine=given.engine)}")
    return 0


def _prepare(arguments: list[str]) -> int:
    """Text → tokens → LitData shards with a manifest."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from ttt_lit.data.corpus import left_out
    from ttt_lit.data.prepare import PrepareConfig, prepare
    from ttt_lit.strict_yaml import check_config_files

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="cli.py prepare", description=_prepare.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="YAML file of the settings below, e.g. configs/data/stdlib.yaml"
    )
    parser.add_class_arguments(PrepareConfig)
    check_config_files(arguments)
    given = parser.parse_args(arguments).as_dict()
    given.pop("config")
    config = PrepareConfig(**given)
    known = (Path(config.output) / "manifest.json").is_file()
    manifest = prepare(config, progress=True)
    entries = ((name, manifest.side(name)) for name in ("train", "validation"))
    sides = (f"{entry.documents} {name} documents with {entry.tokens} tokens" for name, entry in entries)
    note = " (prepared before with these settings: the source was not read again; delete the folder to renew it)"
    print(f"{config.output}: {', '.join(sides)}{note if known else ''}")
    if not known and (names := left_out(config.source)):
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        print(f"note: not read, because of their endings: {shown}")
    return 0


def _fit(arguments: list[str]) -> int:
    """Train a run of stages; a second start continues it."""
    _refuse_malicious_lightning()
    from ttt_lit.train.run import fit

    return fit(arguments)


def _validate(arguments: list[str]) -> int:
    """Measure a checkpoint on held-out blocks, inner loop on and off."""
    _refuse_malicious_lightning()
    from ttt_lit.train.run import validate

    return validate(arguments)


def _plan(arguments: list[str]) -> int:
    """Work, time and memory of a run's stages, before it starts. No weights, data or GPU needed."""
    parser = argparse.ArgumentParser(
        prog="cli.py plan",
        description=_plan.__doc__,
        allow_abbrev=False,
        epilog="Everything else is read as fit reads it: --config FILE, several times, and dotted settings.",
    )
    parser.add_argument("--shape", metavar="FILE", help="Hugging Face config.json, in place of model.start.init_from")
    parser.add_argument("--device", help="h100, h200 (default), a100, b200, l40s or cpu")
    parser.add_argument("--devices", type=int, help="how many; default: as configured")
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        help="assumed share of the peak (default: %(default)s); not a measurement",
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="10¹² dense operations per second, in place of the published peak"
    )
    parser.add_argument("--memory-gib", type=float, help="memory of a device, in place of the published one")
    parser.add_argument("--output", help="folder for plan.md")
    given, others = parser.parse_known_args(arguments)
    _refuse_malicious_lightning()
    from ttt_lit.plan.plan import PlanOptions, plan

    plan(others, PlanOptions(**vars(given)))
    return 0


def _matrix(arguments: list[str]) -> int:
    """Train every run of a matrix file, parents first; a second start continues it."""
    parser = argparse.ArgumentParser(
        prog="cli.py matrix",
        description=_matrix.__doc__,
        allow_abbrev=False,
        epilog="Runs that are finished are skipped, those that were cut off are continued, diverged ones are shown and left alone. "
        "Exit status 0: every run is finished. docs/matrix.md describes the file.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="matrix file, e.g. configs/matrix/demo.yaml")
    parser.add_argument(
        "--launcher", choices=("local", "slurm"), default="local", help="processes here (default), or jobs of a cluster"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time; default: 1 on this machine, all that may start on slurm"
    )
    parser.add_argument("--root", metavar="FOLDER", help="folder of all runs; default: as configured")
    parser.add_argument("--dry-run", action="store_true", help="print commands, budgets, expected GPU-hours and memory")
    planner = parser.add_argument_group("with --dry-run, as for cli.py plan")
    planner.add_argument("--shape", metavar="FILE", help="Hugging Face config.json, in place of every run's start")
    planner.add_argument("--device", help="h100, h200 (default), a100, b200, l40s or cpu")
    planner.add_argument("--devices", type=int, help="how many for each run; default: as configured")
    planner.add_argument(
        "--utilisation", type=float, default=0.4, help="assumed share of the peak (default: %(default)s)"
    )
    planner.add_argument("--peak-tflops", type=float, help="in place of the published peak")
    planner.add_argument("--memory-gib", type=float, help="in place of the published memory")
    given = vars(parser.parse_args(arguments))
    dry_run = given.pop("dry_run")
    launched = {key: given.pop(key) for key in ("config", "launcher", "jobs", "root")}
    ignored = [key for key, value in given.items() if value != parser.get_default(key)]
    if ignored and not dry_run:
        parser.error(f"--{ignored[0].replace('_', '-')} is for the planner: add --dry-run, or leave it out")
    from ttt_lit.launch.command import LaunchOptions, launch_matrix

    options = LaunchOptions(**launched)
    _refuse_malicious_lightning()
    if dry_run:
        from ttt_lit.launch.dry_run import dry_run as print_plans
        from ttt_lit.plan.plan import PlanOptions

        return print_plans(options, PlanOptions(**given))
    program = (sys.executable, str(Path(__file__).resolve()))
    return launch_matrix(options, program=program, entry="ttt_lit.train.run:fit")


def _probe(arguments: list[str]) -> int:
    """What a conversion will do to a checkpoint, before any training: damage of the window, value of context, inner loop."""
    parser = argparse.ArgumentParser(
        prog="cli.py probe",
        description=_probe.__doc__,
        allow_abbrev=False,
        epilog="Every result is written at once. The same command continues a probe that was cut off; more documents, windows or minutes "
        "add to it. docs/probe.md says what each number means.",
    )
    parser.add_argument(
        "--checkpoint", required=True, help="folder of an imported checkpoint of ours, not yet converted"
    )
    parser.add_argument(
        "--data", required=True, help="prepared folder, per_document, whose held-out documents are read"
    )
    parser.add_argument(
        "--output", help="folder for probe.json, .md, .yaml and .png; default: probes/NAME of the checkpoint"
    )
    parser.add_argument("--context", type=int, help="tokens of each document; default: the folder's context")
    parser.add_argument(
        "--windows", type=int, nargs="+", help="default: context/8, /4 and /2; the middle one is tried in depth"
    )
    parser.add_argument("--sinks", type=int, nargs="+", help="numbers of sink tokens; default: 0 1 4 16")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens of a fresh context's piece; default: the window, or half of what lies beyond it",
    )
    parser.add_argument(
        "--max-documents", type=int, help="for the ceiling; default: 20, below which no interval decides"
    )
    parser.add_argument("--sweep-documents", type=int, help="of these, for damage and inner loop; default: 4, or all")
    parser.add_argument("--layer-documents", type=int, help="of these, for single layers; 0: none; default: 2, or all")
    parser.add_argument("--keep-layers", type=int, help="length of the greedy list of kept layers; 0: none; default: 2")
    parser.add_argument("--inner-rates", type=float, nargs="*", help="default: 1 0.3 0.1 0.03; none: no inner loop")
    parser.add_argument("--chunk", type=int, help="tokens of an inner step; default: context/8, at most 1024")
    parser.add_argument(
        "--ttt-layers",
        nargs="+",
        metavar="LAYERS",
        help="last_quarter, global, global_suffix or indices; default: global for models of two kinds of attention, else last_quarter",
    )
    parser.add_argument("--max-minutes", type=float, help="stop before a measurement that would end later")
    parser.add_argument(
        "--precision", choices=("32-true", "bf16-mixed"), help="default: bf16-mixed where hardware makes it faster"
    )
    parser.add_argument("--device", help="torch device; default: cuda where there is one, else cpu")
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    _refuse_malicious_lightning()
    from ttt_lit.probe.command import probe
    from ttt_lit.probe.config import ProbeConfig

    return probe(ProbeConfig(**given), command=shlex.join(["python", "cli.py", "probe", *arguments]))


def _check_reference(arguments: list[str]) -> int:
    """Golden files of the official implementation: losses and exact gradients."""
    parser = argparse.ArgumentParser(prog="cli.py check-reference", description=_check_reference.__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="golden .safetensors file")
    files = parser.parse_args(arguments).files
    from ttt_lit.reference.check import check_reference

    return check_reference(files)


def _report(arguments: list[str]) -> int:
    """Run records → summary in the terminal, and the page that answers the question."""
    parser = argparse.ArgumentParser(prog="cli.py report", description=_report.__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, its record.json, or a folder of many runs"
    )
    parser.add_argument("--output", help="folder for report.html, report.md, three sheets (CSV) and figures/")
    given = parser.parse_args(arguments)
    from ttt_lit.report.collect import read_records
    from ttt_lit.report.console import console

    found = read_records(given.runs)
    print(console(found.records, unreadable=found.unreadable))
    if given.output is not None:
        from ttt_lit.report.write import write_report

        command = shlex.join(["python", "cli.py", "report", *arguments])
        page = write_report(found.records, Path(given.output), command=command, unreadable=found.unreadable)
        print(f"\nwritten to {page}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "import": _import,
    "prepare": _prepare,
    "probe": _probe,
    "plan": _plan,
    "fit": _fit,
    "matrix": _matrix,
    "validate": _validate,
    "export": _export,
    "report": _report,
    "check-reference": _check_reference,
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.__doc__}" for name, command in COMMANDS.items()]
    return "usage: python cli.py COMMAND …\n\n" + "\n".join(lines) + "\n\npython cli.py COMMAND --help explains one."


def _refuse_malicious_lightning() -> None:
    for package in ("lightning", "pytorch-lightning"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version in MALICIOUS_LIGHTNING:
            raise RuntimeError(
                f"{package} {version} is a malicious release (GHSA-w37p-236h-pfx3): rotate your credentials and install {package}==2.6.6"
            )


if __name__ == "__main__":
    sys.exit(main())
