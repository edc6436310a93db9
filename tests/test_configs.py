"""Every YAML that ships parses, resolves to numbers, and fits the files it names."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import get_args

import pytest
import yaml

from ttt_lit.families import family_of_config
from ttt_lit.launch.matrix import expand
from ttt_lit.launch.matrix_file import read_matrix
from ttt_lit.train.run import assemble
from ttt_lit.train.run_config import Role
from ttt_lit.train.schedule import InnerLRSchedule
from ttt_lit.train.stages import plan_stages

ROOT = Path(__file__).resolve().parents[1]
DATA = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs" / "data").glob("*.yaml"))}
ARMS = sorted(path.stem for path in (ROOT / "configs").glob("[gq]_*.yaml"))
DEMO = {"q": ["configs/size/demo.yaml"], "g": ["configs/size/demo.yaml", "configs/size/demo_gemma.yaml"]}
SHAPES = {"q": "configs/shapes/qwen2.5-1.5b.json", "g": "configs/shapes/gemma-3-1b-pt.json"}
EXTERNAL = {"artifacts/demo/": "configs/demo/config.json", "artifacts/demo_gemma/": "configs/demo_gemma/config.json"}
RUNS = {
    "bridge, full size": ["configs/q_p1_bridge.yaml"],
    "bridge, demo size": ["configs/q_p1_bridge.yaml", "configs/size/demo.yaml"],
    "bridge, pilot size": ["configs/q_p1_bridge.yaml", "configs/size/pilot.yaml"],
    "demo pretraining": ["configs/demo/pretrain.yaml"],
    "demo pretraining, Gemma": ["configs/demo_gemma/pretrain.yaml"],
} | {f"{arm}, demo size": [f"configs/{arm}.yaml", *DEMO[arm[0]]] for arm in ARMS if arm != "q_p1_bridge"}


@functools.cache
def assembled(*configs):
    """A run's parts from its configuration files; assembling takes a second, and nothing here changes them."""
    arguments = [f"--config={ROOT / path}" for path in configs]
    return assemble([*arguments, "--run.root=/nowhere", "--trainer.accelerator=cpu"], command="fit")


@pytest.fixture(params=RUNS, ids=str)
def parts(request):
    return assembled(*RUNS[request.param])


def test_a_run_resolves_to_whole_steps_that_spend_its_budget(parts):
    module = parts.module
    plans = plan_stages(module.stages, module.size, module.budget, devices=1)
    assert sum(plan.tokens for plan in plans) == module.budget.tokens
    assert [plan.name for plan in plans] == list(module.stages.enabled())


def test_a_run_reads_what_some_data_config_makes_for_its_model(parts):
    """The folders that an experiment names are outputs of configs/data, made with the tokenizer of its start, long enough."""
    module, folders = parts.module, parts.data.folders
    made = {config["output"]: config for config in DATA.values()}
    start = module.start_config
    tokenizer = start.tokenizer or f"{start.init_from}/tokenizer"
    read = {plan.context for plan in module.stages.enabled().values()} | {"long"}
    for dataset, context in (("short", module.size.short), ("long", module.size.long)):
        if dataset not in read:
            continue
        config = made[folders[dataset]]
        assert config["context"] == context
        assert config["layout"] == ("packed" if dataset == "short" else "per_document")
        # The demo's checkpoint is imported from a model that was trained with the demo's tokenizer.
        external = next((path for prefix, path in EXTERNAL.items() if folders[dataset].startswith(prefix)), None)
        if external is not None:
            assert config["tokenizer"] == f"artifacts/{Path(external).parent.name}/tokenizer"
            assert config["train_tokenizer"] == json.loads((ROOT / external).read_text())["vocab_size"]
        else:
            assert config["tokenizer"] == tokenizer


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_named_after_its_file_and_knows_its_role(arm):
    run = yaml.safe_load((ROOT / "configs" / f"{arm}.yaml").read_text())["run"]
    assert run["experiment"] == arm
    assert run["role"] in get_args(Role)


def test_arms_of_a_comparison_differ_in_nothing_but_start_stages_and_layers():
    """Assembled, not as written: budget, steps, optimiser, schedules and carry are those of every other arm; rates and the inner loop those
    of every arm of the family that starts from weights too, or from random ones too."""
    seen: dict[str, object] = {}
    for arm in ARMS:
        module = assembled(f"configs/{arm}.yaml", *DEMO[arm[0]]).module
        kind = f"{arm[0]} from {module.start_config.init}"
        shared = {name: getattr(module, name) for name in ("size", "budget", "optim", "engine")}
        shared |= {f"{kind}: inner": module.inner} if module.ttt is not None else {}
        shared["validation"] = dataclasses.replace(module.validation, headline="as_trained")
        shared["start"] = dataclasses.replace(module.start_config, init="checkpoint", init_from="")
        for name, stage in module.stages.enabled().items():
            plain = dataclasses.replace(stage, attention="dense", mode="none", inner_schedule=InnerLRSchedule())
            shared[f"stage {name}"] = dataclasses.replace(plain, lr=1.0, new_lr=None)
            shared[f"{kind}: lr of stage {name}"] = stage.lr
            if stage.new_lr is not None:
                shared[f"{kind}: new_lr of stage {name}"] = stage.new_lr
        for name, value in shared.items():
            assert seen.setdefault(name, value) == value, (arm, name)


def test_qwen_s_imported_arms_learn_at_the_measured_rate_and_the_baseline_at_the_paper_s():
    written = {
        arm: yaml.safe_load((ROOT / f"configs/{arm}.yaml").read_text())["model"] for arm in ARMS if arm[0] == "q"
    }
    rates = {arm: model.get("inner", {}).get("lr") for arm, model in written.items() if "ttt" in model}
    assert rates.pop("q_ttt_scratch") is None
    assert yaml.safe_load((ROOT / "configs/base.yaml").read_text())["model"]["inner"]["lr"] == 1.0
    assert set(rates.values()) == {0.1}


@pytest.mark.parametrize("arm", ARMS)
def test_the_inner_rate_starts_low_in_the_first_stage_that_updates_and_in_no_other(arm):
    module = assembled(f"configs/{arm}.yaml", *DEMO[arm[0]]).module
    updating = [stage for stage in module.stages.enabled().values() if stage.mode in ("meta", "first_order")]
    begins = [stage.inner_schedule.lr(1.0, 0.0) for stage in updating]
    assert begins == pytest.approx([0.1, *[1.0] * (len(updating) - 1)] if updating else [])


def test_a_size_says_how_much_and_never_touches_a_stage():
    for path in sorted((ROOT / "configs/size").glob("*.yaml")):
        assert "stages" not in yaml.safe_load(path.read_text()).get("model", {}), path.name


@pytest.mark.parametrize("name", ["demo", "demo_wallclock"])
def test_the_demos_matrices_raise_the_rate_of_every_arm_with_stage_a(name):
    """The overlay is named by hand in each entry; one that was forgotten would weaken or strengthen one arm alone."""
    for planned in expand(read_matrix(ROOT / "configs/matrix" / f"{name}.yaml"), configs=str(ROOT / "configs")):
        arm = yaml.safe_load((ROOT / "configs" / f"{planned.experiment}.yaml").read_text())
        has_stage_a = "A" in arm["model"].get("stages", {})
        assert ("configs/demo/scratch.yaml" in " ".join(planned.arguments)) == has_stage_a, planned.name


@pytest.mark.parametrize("name", ["qwen_ablations", "gemma_policies"])
def test_every_cell_of_an_ablation_trains_something_of_its_own(name, tmp_path):
    """Two runs whose stages, networks and starts are equal would measure one thing twice and call it two."""
    seen: dict[str, str] = {}
    for planned in expand(read_matrix(ROOT / "configs/matrix" / f"{name}.yaml"), configs=str(ROOT / "configs")):
        arguments = [str(ROOT / a) if a.startswith("configs/") else a for a in planned.arguments]
        module = assemble([*arguments, f"--run.root={tmp_path}", "--trainer.accelerator=cpu"], command="fit").module
        plans = plan_stages(module.stages, module.size, module.budget, devices=1)
        shape = json.loads((ROOT / SHAPES[planned.experiment[0]]).read_text())
        imported = family_of_config(shape).spec_from_config(shape)
        settings = ("mode", "carry", "lr", "new_lr", "teacher_kl")
        trained = [
            (p.network(imported).layers, p.context, p.budget, *(getattr(p.config, name) for name in settings))
            for p in plans
        ]
        key = repr(
            (trained, module.start_config, module.ttt, module.budget, planned.experiment[0], module.validation.headline)
        )
        assert seen.setdefault(key, planned.name) == planned.name


def planned_runs(name):
    return expand(read_matrix(ROOT / "configs/matrix" / f"{name}.yaml"), configs=str(ROOT / "configs"))


def setting(planned, name):
    """The last value that a run's arguments give to a setting."""
    pairs = dict(itertools.pairwise(planned.arguments))
    return pairs.get(f"--{name}")


def test_the_study_at_the_smaller_window_is_the_seeds_own_and_pays_for_nothing_twice():
    """Every run has its twin in qwen.yaml, which differs in the window alone; what it leaves out are runs that have no window."""
    own, small = planned_runs("qwen"), planned_runs("qwen_window_2k")
    assert {setting(run, "model.size.window") for run in small} == {"2048"}

    def without_window(run):
        text = " ".join(run.arguments).replace(" --model.size.window 2048", "").replace("window_2k", "full")
        return run.experiment, run.gpu_hours and run.gpu_hours.share, text

    left_out = {without_window(run) for run in own} - {without_window(run) for run in small}
    assert {without_window(run) for run in small} <= {without_window(run) for run in own}
    assert {run[0] for run in left_out} == {"q_fa_import", "q_fa_scratch"}
    for arm in ("q_fa_import", "q_fa_scratch"):
        stages = assembled(f"configs/{arm}.yaml", *DEMO["q"]).module.stages.enabled()
        assert {stage.attention for stage in stages.values()} == {"dense"}


@pytest.mark.parametrize(
    "study, control",
    [("qwen", "q_ttt_at_evaluation"), ("qwen_window_2k", "q_ttt_at_evaluation"), ("gemma", "g_fa_import")],
)
def test_every_candidate_of_a_study_has_a_control_without_memory_at_every_seed(study, control):
    """The same start, the same attention in the last stage, the same tokens, no update in training: what TTT's own part is held against."""
    runs = [run for run in planned_runs(study) if run.gpu_hours is None]
    seeds = {arm: {setting(run, "model.start.seed") for run in runs if run.experiment == arm} for arm in ARMS}
    shape = json.loads((ROOT / SHAPES[control[0]]).read_text())
    imported = family_of_config(shape).spec_from_config(shape)

    def last_attention(arm):
        module = assembled(f"configs/{arm}.yaml").module
        plans = plan_stages(module.stages, module.size, module.budget, devices=1)
        return module.start_config, module.budget, plans[-1].network(imported).layers

    modes = {stage.mode for stage in assembled(f"configs/{control}.yaml").module.stages.enabled().values()}
    assert modes == {"none"}
    candidates = [
        arm
        for arm in ARMS
        if seeds[arm]
        and yaml.safe_load((ROOT / f"configs/{arm}.yaml").read_text())["run"]["role"] in ("bridge", "direct")
    ]
    assert len(candidates) == 2
    for arm in candidates:
        assert last_attention(arm) == last_attention(control), arm
        assert seeds[arm] == seeds[control] == {"0", "1"}


@pytest.mark.parametrize("study, other", [("qwen", "qwen_ablations"), ("gemma", "gemma_policies")])
def test_runs_that_two_matrices_share_are_the_same_runs(study, other):
    shared = {run.name: run.arguments for run in planned_runs(study)}
    both = [run for run in planned_runs(other) if run.name in shared]
    assert both
    assert all(run.arguments == shared[run.name] for run in both)


@pytest.mark.parametrize(
    "bridge, scratch", [("q_p1_bridge", "q_ttt_scratch"), ("g_p1_hybrid_preserve", "g_ttt_scratch")]
)
def test_the_baseline_has_the_candidates_modules(bridge, scratch):
    one, other = (
        yaml.safe_load((ROOT / "configs" / f"{arm}.yaml").read_text())["model"]["ttt"] for arm in (bridge, scratch)
    )
    assert {key: value for key, value in one.items() if key != "prime_init"} == {
        key: value for key, value in other.items() if key != "prime_init"
    }


def test_short_and_long_sets_share_their_split():
    assert DATA["stdlib.yaml"].get("validation_fraction") == DATA["stdlib_long.yaml"].get("validation_fraction")
    assert DATA["dclm_8k.yaml"]["validation_fraction"] == DATA["books_32k.yaml"]["validation_fraction"]


def test_the_sizes_keep_their_ratios():
    full, demo = (assembled(*RUNS[name]).module.size for name in ("bridge, full size", "bridge, demo size"))
    for size in (full, demo):
        assert (size.long // size.short, size.window // size.short, size.short // size.chunk) == (4, 1, 8)


def test_the_demos_external_model_is_of_a_known_family():
    spec = family_of_config(json.loads((ROOT / "configs/demo/config.json").read_text())).spec_from_config(
        json.loads((ROOT / "configs/demo/config.json").read_text())
    )
    assert spec.tied_head
    assert spec.qkv_bias
    assert spec.num_heads != spec.num_kv_heads
