"""The tutorial's commands work, in its order: word for word, on the tests' small world in place of the demo's."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny
import yaml

import cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = re.findall(r"^python cli\.py (.*)$", (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), flags=re.M)
SIZE = {
    "run": {"id": "demo"},
    "model": {
        "start": {"init_from": "artifacts/demo/checkpoint"},
        "size": {
            **{"short": tiny.SHORT, "long": tiny.LONG, "chunk": tiny.CHUNK, "window": tiny.CHUNK},
            **{"tokens_per_step": 128, "micro_batch_tokens": 128},
        },
        "budget": {"tokens": 40 * 128},
        "validation": {"blocks": 4, "subset": 2, "damage_blocks": 2},
    },
    "data": {"short": "artifacts/demo/data/short", "long": "artifacts/demo/data/long"},
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
}


@pytest.mark.slow
def test_every_command_of_the_tutorial_works(world, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "size" / "demo.yaml").write_text(yaml.safe_dump(SIZE))
    (tmp_path / "artifacts" / "demo").mkdir(parents=True)
    (tmp_path / "artifacts" / "demo" / "data").symlink_to(world)
    (tmp_path / "artifacts" / "demo" / "checkpoint").symlink_to(world / "checkpoint")
    monkeypatch.chdir(tmp_path)
    # What `make demo` has done before.
    done = ["fit", "--config", "configs/q_p1_bridge.yaml", "--config", "configs/size/demo.yaml"]
    assert len(COMMANDS) == 5
    for arguments in [done, *map(shlex.split, COMMANDS)]:
        assert cli.main(arguments) == 0, arguments
    assert (tmp_path / "reports" / "first" / "report.html").exists()
    assert (tmp_path / "probes" / "demo" / "probe.md").exists()
