"""The run record: what is written comes back, and nothing else gets in."""

import dataclasses
import json
import math
import os
import re
from typing import get_args

import pytest

from ttt_lit.model import spec
from ttt_lit.record import schema as record_module
from ttt_lit.record.codec import NotFinite
from ttt_lit.record.schema import Model, RunRecord


def test_write_and_read_back_a_full_record(tmp_path, make_record):
    written = make_record()
    written.write(tmp_path / "deep" / "record.json")
    assert RunRecord.read(tmp_path / "deep" / "record.json") == written
    assert RunRecord.read(tmp_path / "deep") == written
    assert os.listdir(tmp_path / "deep") == ["record.json"]


def test_a_run_that_has_only_begun_is_a_record_too():
    begun = RunRecord(
        run_id="r", experiment="e", model=Model(family="qwen2", num_parameters=1, num_layers=1, ttt_layers=[])
    )
    assert RunRecord.from_dict(json.loads(json.dumps(begun.to_dict()))) == begun


def test_a_record_that_is_older_than_the_ceiling_and_the_damage_is_read_and_no_other_field_may_be_missing(make_record):
    whole = make_record()
    assert whole.ceiling
    assert whole.imported
    assert whole.stages[1].damage
    old = json.loads(json.dumps(whole.to_dict()))
    del old["ceiling"], old["imported"]
    for each in old["stages"]:
        del each["damage"]
    read = RunRecord.from_dict(old)
    assert (read.ceiling, read.imported, [each.damage for each in read.stages]) == ([], [], [[], []])
    without = json.loads(json.dumps(whole.to_dict()))
    del without["ceiling"][0]["digest"]
    assert RunRecord.from_dict(without).ceiling[0].digest == ""
    for name in old:
        with pytest.raises(ValueError, match="schema_version|misses fields"):
            RunRecord.from_dict({key: value for key, value in old.items() if key != name})


def test_a_failed_write_leaves_the_old_record(tmp_path, make_record):
    path = tmp_path / "record.json"
    make_record().write(path)
    before = path.read_bytes()
    broken = make_record()
    broken.stages[0].train_loss_mean = math.nan
    with pytest.raises(ValueError, match=r"record\.stages\[0\]\.train_loss_mean: got nan"):
        broken.write(path)
    assert path.read_bytes() == before


def test_nan_is_null_and_only_in_a_diverged_run(tmp_path, make_record):
    diverged = make_record()
    diverged.status, diverged.reason = "diverged", "stage C, step 12: the loss is nan"
    diverged.stages[1].transition.after = math.nan
    diverged.stages[1].train_loss_last_tenth = math.inf
    diverged.write(tmp_path / "record.json")
    assert "NaN" not in (tmp_path / "record.json").read_text()
    again = RunRecord.read(tmp_path)
    assert math.isnan(again.stages[1].transition.after)
    assert again.stages[1].train_loss_last_tenth is None

    data = diverged.to_dict() | {"status": "finished", "reason": None}
    with pytest.raises(ValueError, match=r"record\.stages\[1\]\.transition\.after: got None, expected a number"):
        RunRecord.from_dict(data)


def test_a_number_that_only_a_diverged_run_may_have_is_an_error_that_says_which(make_record):
    record = make_record()
    record.stages[1].validations[0].documents[0].deciles[3] = math.inf
    with pytest.raises(NotFinite) as error:
        record.to_dict()
    assert (error.value.where, error.value.value) == (
        "record.stages[1].validations[0].documents[0].deciles[3]",
        math.inf,
    )
    record.status, record.reason = "diverged", "it is inf"
    assert record.to_dict()["stages"][1]["validations"][0]["documents"][0]["deciles"][3] is None


def _broken(record, change):
    data = json.loads(json.dumps(record.to_dict()))
    change(data)
    return data


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(schema_version=1), "schema_version: got 1, expected 2"),
        (lambda d: d.pop("schema_version"), "schema_version: got None"),
        (lambda d: d.update(colour="red"), "record: got unknown fields ['colour']"),
        (lambda d: d["stages"][1].pop("mode"), "record.stages[1]: got unknown fields [] and misses fields ['mode']"),
        (lambda d: d["stages"][0].update(mode="off"), "record.stages[0].mode: got 'off', expected one of"),
        (lambda d: d["stages"][0].update(context="256"), "record.stages[0].context: got '256'"),
        (lambda d: d["stages"][0].update(context=True), "record.stages[0].context: got True"),
        (lambda d: d["stages"][0].update(windows=[1.5]), "record.stages[0].windows[0]: got 1.5"),
        (lambda d: d["totals"]["gpu_seconds"].update(compute="3"), "record.totals.gpu_seconds.compute: got '3'"),
        (lambda d: d.update(status="done"), "record.status: got 'done'"),
        (lambda d: d.update(status="failed"), "record.reason: got None with status 'failed'"),
        (lambda d: d.update(reason="because"), "expected no reason"),
        (lambda d: d.update(stages={}), "record.stages: got {}, expected a list"),
        (lambda d: d.update(git=None), "record.git: got None, expected an object"),
    ],
)
def test_reading_is_strict_and_names_the_field(tmp_path, change, message, make_record):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(_broken(make_record(), change)))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        RunRecord.read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema_version": NaN}'])
def test_broken_files_are_one_line_errors_that_name_the_file(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a readable run record") as error:
        RunRecord.read(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "record.json"))):
        RunRecord.read(tmp_path)


def test_the_record_knows_every_mode_of_the_method():
    """It imports nothing of the model, so the list stands twice."""
    assert get_args(record_module.Mode) == get_args(spec.Mode)


def test_the_headline_is_read_from_the_last_stage(make_record):
    record = make_record()
    assert record.final() == record.stages[-1].validations[0]
    record.headline = "on"
    assert record.final() == record.stages[-1].validations[1]
    assert record.final("off") == record.stages[-1].validations[0]
    record.stages[-1].validations = []
    assert record.final() is None


def test_who_trained_a_checkpoint_is_the_run_and_all_before_it(make_record):
    record = make_record()
    *before, own = record.trained_by()
    assert before == [dataclasses.asdict(parent) for parent in record.parents]
    assert own == {"name": record.name, "stage": "C", "gpu_seconds": 300.0, "tokens": 491_520}
    record.status, record.reason = "interrupted", "stopped"
    with pytest.raises(ValueError, match="its status is interrupted, so what its weights have cost is not known"):
        record.trained_by()
