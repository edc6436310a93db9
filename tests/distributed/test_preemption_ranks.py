"""A signal that reaches one rank of two stops both, at the same optimiser step, with a resume file that both have written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fit"))

import tiny

from ttt_lit.experiment.record import RunRecord

pytestmark = pytest.mark.ranks

WORKER = Path(__file__).with_name("preemption_worker.py")


def test_one_rank_that_is_told_stops_all_of_them_together(tmp_path):
    world = tiny.make_world(tmp_path / "world")
    ranks = ["--trainer.devices=2", "--trainer.strategy=fsdp2"]
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(WORKER), *tiny.arguments(world, tmp_path / "runs", *ranks)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("stopped") == 2
    folder = tmp_path / "runs" / "tiny" / "default"
    assert RunRecord.read(folder).status == "interrupted"
    assert json.loads((folder / "checkpoints" / "last.json").read_text())["path"] == "resume-5.ckpt"
    assert RunRecord.read(folder).totals.tokens == 5 * 128
