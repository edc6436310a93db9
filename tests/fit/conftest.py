import logging

import pytest
import tiny
from fitting import Shapes, run

from ttt_lit.record.schema import RunRecord


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Corpus, tokenizer, shards and a dense checkpoint."""
    return tiny.make_world(tmp_path_factory.mktemp("world") / "world")


@pytest.fixture(scope="session")
def bridge(world, tmp_path_factory):
    """A finished run B1 → B2 → C: its parts, what its batches looked like, and its record."""
    shapes = Shapes()
    parts = run(world, tmp_path_factory.mktemp("bridge"), callbacks=[shapes])
    return parts, shapes, RunRecord.read(parts.run.folder)


@pytest.fixture(autouse=True)
def _quiet():
    """Lightning's notes about devices are no part of what is tested."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
