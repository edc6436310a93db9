"""Every YAML that ships parses, resolves to numbers, and fits the files it names."""

import json
from pathlib import Path

import pytest
import yaml

from ttt_lit.families import family_of_config
from ttt_lit.train.run import assemble
from ttt_lit.train.stages import plan_stages

ROOT = Path(__file__).resolve().parents[1]
DATA = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs" / "data").glob("*.yaml"))}
RUNS = {
    "bridge, full size": ["configs/q_p1_bridge.yaml"],
    "bridge, demo size": ["configs/q_p1_bridge.yaml", "configs/size/demo.yaml"],
    "demo pretraining": ["configs/demo/pretrain.yaml"],
}


@pytest.fixture(params=RUNS, ids=str)
def parts(request, tmp_path):
    configs = [f"--config={ROOT / path}" for path in RUNS[request.param]]
    return assemble([*configs, f"--run.root={tmp_path}", "--trainer.accelerator=cpu"], command="fit")


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
    external = json.loads((ROOT / "configs/demo/config.json").read_text())
    for dataset, context in (("short", module.size.short), ("long", module.size.long)):
        config = made[folders[dataset]]
        assert config["context"] == context
        assert config["layout"] == ("packed" if dataset == "short" else "per_document")
        # The demo's checkpoint is imported from a model that was trained with the demo's tokenizer.
        if folders[dataset].startswith("artifacts/demo/"):
            assert config["tokenizer"] == "artifacts/demo/tokenizer"
            assert config["train_tokenizer"] == external["vocab_size"]
        else:
            assert config["tokenizer"] == tokenizer


def test_short_and_long_sets_share_their_split():
    assert DATA["stdlib.yaml"].get("validation_fraction") == DATA["stdlib_long.yaml"].get("validation_fraction")
    assert DATA["dclm_8k.yaml"]["validation_fraction"] == DATA["books_32k.yaml"]["validation_fraction"]


def test_the_sizes_keep_their_ratios(tmp_path):
    full, demo = (
        assemble(
            [*(f"--config={ROOT / path}" for path in RUNS[name]), f"--run.root={tmp_path}"], command="fit"
        ).module.size
        for name in ("bridge, full size", "bridge, demo size")
    )
    for size in (full, demo):
        assert (size.long // size.short, size.window // size.short, size.short // size.chunk) == (4, 1, 8)


def test_the_demos_external_model_is_of_a_known_family():
    spec = family_of_config(json.loads((ROOT / "configs/demo/config.json").read_text())).spec_from_config(
        json.loads((ROOT / "configs/demo/config.json").read_text())
    )
    assert spec.tied_head
    assert spec.qkv_bias
    assert spec.num_heads != spec.num_kv_heads
