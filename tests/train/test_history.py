"""What a run has seen survives its resume files, those of older versions included."""

import json

from helpers.demo_record import demo

from ttt_lit.record.measured import Transition
from ttt_lit.train.history import History, StageHistory


def history():
    record = demo()
    done = record.stages[1]
    stage = StageHistory(
        transition=done.transition, losses=[3.5, 3.2], gpu_seconds=[1.0, 2.0], norm_sums=[0.1], norm_range=[0.0, 0.1, 0.1],
        validations=done.validations, damage=done.damage, peak_gib=1.5,
    )  # fmt: skip
    return History(stages={"C": stage}, evaluations=record.evaluations, imported={"short": [3.6, 3.5]})


def test_a_history_comes_back_from_plain_data():
    before, after = history(), History()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after == before


def test_the_proof_of_an_older_resume_file_loses_what_no_record_holds():
    state, after = history().state_dict(), History()
    older = {
        "before": 3.5,
        "after": 3.6,
        "preserves": False,
        "changed": ("queries see other keys",),
        "tolerance": 1e-5,
        "jump": 0.1,
    }
    state["stages"]["C"]["transition"] = older
    del state["stages"]["C"]["damage"], state["imported"]
    after.load_state_dict(state)
    assert after.stages["C"].transition == Transition(kind="", preserves=False, before=3.5, after=3.6, tolerance=1e-5)
