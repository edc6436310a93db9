"""Who may import whom, read from the sources; nothing of the project is imported here."""

import ast
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("ttt_lit", "callbacks", "cli")

BELOW_TRAIN = (
    *("record", "ops", "model", "ttt", "families", "checkpoint", "convert", "data"),
    *("metrics", "identity", "strict_yaml"),
)
# Longest prefix wins. A module may import what starts with one of the listed names (inside the project).
MAY_IMPORT = {
    "ttt_lit": (),
    **{f"ttt_lit.{name}": () for name in ("metrics", "identity", "tokenizer_json", "strict_yaml")},
    # What a run writes down, what runs decide, the page: no torch.
    "ttt_lit.record": ("ttt_lit.record",),
    "ttt_lit.verdict": ("ttt_lit.record", "ttt_lit.verdict"),
    "ttt_lit.report": ("ttt_lit.record", "ttt_lit.verdict", "ttt_lit.report", "ttt_lit.metrics"),
    # The network and the method.
    "ttt_lit.ops": ("ttt_lit.ops",),
    "ttt_lit.model": ("ttt_lit.ops", "ttt_lit.model"),
    "ttt_lit.model.spec": (),
    "ttt_lit.ttt": ("ttt_lit.ops", "ttt_lit.model", "ttt_lit.ttt"),
    "ttt_lit.ttt.flops": ("ttt_lit.model.spec",),
    "ttt_lit.families": ("ttt_lit.model.spec", "ttt_lit.families"),
    "ttt_lit.checkpoint": (
        *(f"ttt_lit.{name}" for name in ("families", "model", "checkpoint", "identity", "tokenizer_json")),
    ),
    "ttt_lit.convert": ("ttt_lit.checkpoint", "ttt_lit.families", "ttt_lit.model", "ttt_lit.convert"),
    "ttt_lit.reference": (*(f"ttt_lit.{name}" for name in ("checkpoint", "model", "ttt", "train", "reference")),),
    "ttt_lit.data": ("ttt_lit.data", "ttt_lit.identity", "ttt_lit.tokenizer_json"),
    "ttt_lit.train": (*(f"ttt_lit.{name}" for name in (*BELOW_TRAIN, "train")),),
    "ttt_lit.plan": (
        *(f"ttt_lit.{name}" for name in (*BELOW_TRAIN, "train", "plan")),
        *("ttt_lit.verdict.formats", "ttt_lit.report.table"),
    ),
    # A launcher starts at once: it reads files, and leaves training to the processes that it starts.
    "ttt_lit.launch": ("ttt_lit.record", "ttt_lit.strict_yaml", "ttt_lit.train.lock", "ttt_lit.launch"),
    "ttt_lit.launch.dry_run": ("ttt_lit.record", "ttt_lit.train", "ttt_lit.plan", "ttt_lit.launch"),
    "ttt_lit.probe": (*(f"ttt_lit.{name}" for name in (*BELOW_TRAIN, "train", "verdict", "report.drawing", "probe")),),
    "callbacks": ("ttt_lit",),
    "cli": ("ttt_lit",),
}
STANDARD_LIBRARY_ONLY = (
    *(f"ttt_lit.{name}" for name in ("metrics", "identity", "tokenizer_json", "model.spec", "ttt.flops", "record")),
    "ttt_lit.report.collect",
    "ttt_lit.launch.folder",
    "ttt_lit.verdict.findings",
    *(f"ttt_lit.train.{name}" for name in ("lock", "budget", "ledger", "schedule", "divergence")),
)
NO_TORCH = ("ttt_lit.record", "ttt_lit.verdict", "ttt_lit.report")
TORCH_ONLY = ("ttt_lit.ops", "ttt_lit.model", "ttt_lit.ttt")
# Found at run time, so imported inside a function.
OPTIONAL = ("flash_attn",)
# Imported by their caller inside a function, on CUDA only.
TRITON = ("ttt_lit.ops.triton_attention", "ttt_lit.ops.triton_attention_kernels")
LAZILY_IMPORTED = {"ttt_lit.ops.carried_attention": "ttt_lit.ops.triton_attention"}
LIGHTNING = ("ttt_lit.data.stream", "ttt_lit.train", "callbacks", "cli")
TRANSFORMERS_MODELS = ("ttt_lit.checkpoint.parity",)
LAZY = ("cli",)
# AutoModelForCausalLM, Qwen2Model, PreTrainedModel, modeling_qwen2: network code, as opposed to configs and tokenizers.
_MODEL_CLASS = re.compile(r"modeling_|Model(For\w+)?$|For[A-Z]\w+$|^AutoModel")


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    in_function: bool
    for_types: bool


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def rule_for(module: str) -> tuple[str, ...]:
    owners = [owner for owner in MAY_IMPORT if within(module, (owner,))]
    return MAY_IMPORT[max(owners, key=len)]


def imports_of(module: str, source: str, modules: set[str]) -> list[Import]:
    """Every import with its absolute target; ``from package import name`` counts as the submodule if there is one."""
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, in_function, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                package = parts if f"{module}.__init__" in modules else parts[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([node.module] if node.module else [])])
            found.extend(Import(f"{base}.{alias.name}", node.lineno, in_function, for_types) for alias in node.names)
        in_function = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_types = for_types or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            visit(child, in_function, for_types)

    visit(ast.parse(source), False, False)
    return found


def resolve(target: str, modules: set[str]) -> str:
    """The module that an import target names: ``ttt_lit.model.spec.ModelSpec`` → ``ttt_lit.model.spec``."""
    while target and target not in modules and "." in target:
        target = target.rpartition(".")[0]
    return target


def _check_ours(module: str, item: Import, target: str) -> str | None:
    if within(target, ("callbacks",)):
        return "callbacks are named in YAML and imported by nobody"
    if within(target, ("cli",)):
        return "nothing imports the command line"
    if item.in_function and module not in LAZY and LAZILY_IMPORTED.get(module) != target:
        return "own modules are imported at the top of the file, except in cli.py"
    if not within(target, rule_for(module)):
        return "the layer below must not know the layer above"
    return None


def _check_outside(module: str, item: Import) -> str | None:
    top = item.target.split(".")[0]
    if top in sys.stdlib_module_names:
        return None
    if within(module, STANDARD_LIBRARY_ONLY):
        return "standard library only"
    if within(module, NO_TORCH) and top in ("torch", "lightning", "transformers"):
        return "no torch where runs are judged"
    if top in OPTIONAL and item.in_function:
        return None
    if top == "triton" and module in TRITON:
        return None
    if within(module, TORCH_ONLY) and top != "torch":
        return "torch only"
    if top in ("lightning", "pytorch_lightning", "lightning_fabric") and not within(module, LIGHTNING):
        return f"lightning belongs in {', '.join(LIGHTNING)}"
    if top == "transformers" and _uses_model_class(item.target) and not within(module, TRANSFORMERS_MODELS):
        return "transformers' model classes belong in the parity check and in tests"
    return None


def _uses_model_class(target: str) -> bool:
    return any(_MODEL_CLASS.search(part) for part in target.split(".")[1:])


def _attribute_uses(source: str) -> list[tuple[str, int]]:
    """``transformers.AutoModelForCausalLM`` after ``import transformers``."""
    return [
        (f"transformers.{node.attr}", node.lineno)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "transformers"
    ]


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for follower in sorted(graph.get(node, ())):
            cycle = walk(follower, [*path, node])
            if cycle:
                return cycle
        done.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := walk(node, []))), None)


def violations(sources: dict[str, str]) -> list[str]:
    """Everything that the table forbids. ``sources``: module name → text; packages are ``NAME.__init__``."""
    modules = set(sources)
    names = {name.removesuffix(".__init__") for name in sources}
    problems: list[str] = []
    graph: dict[str, set[str]] = {}
    for key, source in sources.items():
        module = key.removesuffix(".__init__")
        edges = graph.setdefault(module, set())
        for item in imports_of(module, source, modules):
            if item.target.split(".")[0] in OURS:
                target = resolve(item.target, names)
                problem = _check_ours(module, item, target)
                if not (item.in_function or item.for_types) and target != module:
                    edges.add(target)
            else:
                problem = _check_outside(module, item)
            if problem:
                problems.append(f"{module}:{item.line} imports {item.target}: {problem}")
        if not within(module, TRANSFORMERS_MODELS):
            problems += [
                f"{module}:{line} uses {name}: transformers' model classes belong in the parity check and in tests"
                for name, line in _attribute_uses(source)
                if _uses_model_class(name)
            ]
    cycle = find_cycle(graph)
    if cycle:
        problems.append("import cycle: " + " → ".join(cycle))
    return problems


def project_sources() -> dict[str, str]:
    files = [*(ROOT / "ttt_lit").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), *ROOT.glob("cli.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f.read_text(encoding="utf-8") for f in files}


def test_the_project_keeps_its_layers():
    assert violations(project_sources()) == []


def test_no_two_test_modules_share_a_name():
    """Folders of tests are no packages: pytest imports their modules by bare name, and refuses the second of two that share one."""
    files = [file for file in (ROOT / "tests").rglob("*.py") if not (file.parent / "__init__.py").exists()]
    names = Counter(file.stem for file in files if file.stem != "conftest")
    assert [name for name, times in names.items() if times > 1] == []


def test_every_package_has_a_rule():
    packages = {f"ttt_lit.{path.name}" for path in (ROOT / "ttt_lit").iterdir() if (path / "__init__.py").exists()}
    assert packages <= set(MAY_IMPORT)


SPEC = {"ttt_lit.model.spec": ""}


@pytest.mark.parametrize(
    "sources, message",
    [
        ({"ttt_lit.ops.a": "import numpy"}, "torch only"),
        ({"ttt_lit.ops.a": "import flash_attn"}, "torch only"),
        ({"ttt_lit.ops.a": "from ttt_lit.model import spec", **SPEC}, "layer below"),
        ({"ttt_lit.ops.a": "from ..model.spec import ModelSpec", **SPEC}, "layer below"),
        ({"ttt_lit.model.__init__": "from ..train import run", "ttt_lit.train.run": ""}, "layer below"),
        ({"ttt_lit.model.spec": "import torch"}, "standard library only"),
        ({"ttt_lit.record.schema": "import ttt_lit.metrics", "ttt_lit.metrics": ""}, "layer below"),
        ({"ttt_lit.families.a": "import ttt_lit.model.decoder", "ttt_lit.model.decoder": ""}, "layer below"),
        ({"ttt_lit.data.a": "from ttt_lit.model.spec import ModelSpec", **SPEC}, "layer below"),
        ({"ttt_lit.train.a": "import ttt_lit.verdict.gates", "ttt_lit.verdict.gates": ""}, "layer below"),
        ({"ttt_lit.verdict.a": "import torch"}, "no torch"),
        ({"ttt_lit.train.a": "import callbacks.b", "callbacks.b": ""}, "named in YAML"),
        ({"callbacks.a": "import callbacks.b", "callbacks.b": ""}, "named in YAML"),
        ({"ttt_lit.train.a": "from cli import main", "cli": ""}, "command line"),
        ({"ttt_lit.data.prepare": "import lightning as L"}, "lightning belongs"),
        ({"ttt_lit.launch.a": "def f():\n    from lightning.pytorch import Trainer"}, "lightning belongs"),
        ({"ttt_lit.train.a": "def f():\n    import ttt_lit.model.spec", **SPEC}, "top of the file"),
        ({"ttt_lit.train.a": "from transformers import AutoModelForCausalLM"}, "model classes"),
        ({"ttt_lit.train.a": "from transformers.models.qwen2.modeling_qwen2 import x"}, "model classes"),
        ({"ttt_lit.train.a": "import transformers\nm = transformers.Qwen2ForCausalLM"}, "model classes"),
        ({"ttt_lit.ttt.a": "import ttt_lit.ttt.b", "ttt_lit.ttt.b": "from ttt_lit.ttt import a"}, "import cycle"),
    ],
)
def test_a_planted_violation_is_found(sources, message):
    found = violations(sources)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    "sources",
    [
        {"cli": "def f():\n    from ttt_lit.model import spec\n    import lightning", **SPEC},
        {"callbacks.a": "import lightning\nfrom ttt_lit.record.schema import R", "ttt_lit.record.schema": ""},
        {"ttt_lit.ops.a": "def f():\n    import flash_attn"},
        {"ttt_lit.checkpoint.parity": "from transformers import AutoModelForCausalLM"},
        {"ttt_lit.data.prepare": "from transformers import AutoTokenizer, PretrainedConfig"},
        {"ttt_lit.data.stream": "import lightning, litdata, torch"},
        {"ttt_lit.ttt.a": "import torch\nfrom ttt_lit.model.spec import ModelSpec", **SPEC},
        {
            "ttt_lit.ttt.a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ttt_lit.ttt.b",
            "ttt_lit.ttt.b": "import ttt_lit.ttt.a",
        },
    ],
)
def test_what_is_allowed_passes(sources):
    assert violations(sources) == []


@pytest.mark.parametrize(
    "module",
    [
        "ttt_lit.model.spec",
        "ttt_lit.ttt.flops",
        "ttt_lit.report.write",
        "ttt_lit.verdict.gates",
        "ttt_lit.train.ledger",
    ],
)
def test_importing_a_plain_module_loads_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


ROOMS = (
    *sorted(f"ttt_lit.{path.parent.name}" for path in (ROOT / "ttt_lit").glob("*/__init__.py")),
    "callbacks",
    "cli",
)


def direct_imports() -> list[tuple[str, list[str]]]:
    """Each room with the rooms below it that it imports, without those that one of these imports too; from the ground up."""
    sources = project_sources()
    names = {name.removesuffix(".__init__") for name in sources}
    below: dict[str, set[str]] = {room: set() for room in ROOMS}
    for key, source in sources.items():
        for room in (room for room in ROOMS if within(key, (room,))):
            targets = [resolve(item.target, names) for item in imports_of(key, source, set(sources))]
            below[room] |= {other for other in ROOMS for target in targets if within(target, (other,))} - {room}
    order: list[str] = []
    while len(order) < len(ROOMS):
        ready = [room for room in ROOMS if room not in order and below[room] <= set(order)]
        assert ready, f"rooms import each other: {sorted(set(ROOMS) - set(order))}"
        order += ready
    reach: dict[str, set[str]] = {}
    for room in order:
        reach[room] = below[room].union(*(reach[other] for other in below[room]))
    return [
        (room, sorted(one for one in below[room] if not any(one in reach[other] for other in below[room])))
        for room in order
    ]


def test_the_picture_of_the_rooms_is_what_they_import():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = page.split("```mermaid\n")[1].split("```")[0].splitlines()[1:]
    short = [
        (room.removeprefix("ttt_lit."), [one.removeprefix("ttt_lit.") for one in rooms])
        for room, rooms in direct_imports()
    ]
    assert [line.strip() for line in drawn] == [f"{room} --> {' & '.join(rooms)}" for room, rooms in short if rooms]
