"""A signal that reaches one rank of two stops both, at the same optimiser step, with a resume file that both have written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fit"))

import tiny

from ttt_lit.record.schema import RunRecord

pytestmark = pytest.mark.ranks

WORKER = Path(__file__).with_name("preemption_worker.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make_world(tmp_path_factory.mktemp("world") / "world")


@pytest.mark.parametrize("number, last_words", [("TERM", "stopped"), ("USR2", "left after the job was put back")])
def test_one_rank_that_is_told_stops_all_of_them_together(world, tmp_path, number, last_words):
    """Warned, rank 0 puts the job back although only rank 1 heard of it, and rank 1 stays until that is done."""
    ranks = ["--trainer.devices=2", "--trainer.strategy=fsdp2"]
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=2"]
    arguments = [number, str(tmp_path / "requeued"), *tiny.arguments(world, tmp_path / "runs", *ranks)]
    done = subprocess.run(
        [*launcher, str(WORKER), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(last_words) == 2, done.stdout
    folder = tmp_path / "runs" / "tiny" / "default"
    assert RunRecord.read(folder).status == "interrupted"
    assert json.loads((folder / "checkpoints" / "last.json").read_text())["path"] == "resume-5.ckpt"
    assert RunRecord.read(folder).totals.tokens == 5 * 128
