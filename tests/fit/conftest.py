import logging

import pytest
import tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Corpus, tokenizer, shards and a dense checkpoint."""
    return tiny.make_world(tmp_path_factory.mktemp("world") / "world")


@pytest.fixture(autouse=True)
def _quiet():
    """Lightning's notes about devices are no part of what is tested."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
