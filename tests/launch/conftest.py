"""The runs of a small matrix."""

import pytest

from ttt_lit.launch.matrix import expand
from ttt_lit.launch.matrix_file import parse_matrix


@pytest.fixture
def runs_of(tmp_path):
    """Entries of a matrix → its runs, with arms q_base, q_a, q_b, q_c below a folder of this test."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.yaml").write_text("run: {root: runs}\n")
    for arm in ("q_base", "q_a", "q_b", "q_c"):
        (tmp_path / "configs" / f"{arm}.yaml").write_text(f"run: {{experiment: {arm}}}\n")

    def make(*entries):
        matrix = parse_matrix({"name": "m", "runs": list(entries)}, "m.yaml")
        return expand(matrix, configs=tmp_path / "configs", root=str(tmp_path / "runs"))

    return make
