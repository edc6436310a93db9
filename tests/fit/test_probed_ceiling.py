"""A run that is given a probe carries its ceiling, and is refused before anything starts where the probe is of something else."""

import json

import pytest
import tiny
from fitting import run

import cli
from ttt_lit.experiment.record import Ceiling, RunRecord
from ttt_lit.identity import hash_file

ROW = {"window": 16, "stride": 4, "nats": 0.05, "low": 0.03, "high": 0.07, "blocks": 4, "documents": 3, "seconds": 1.0}


@pytest.fixture
def probe(world, tmp_path):
    """A function that writes a probe of the tiny world's checkpoint and long data, with changes."""

    def write(**changes):
        whole = {
            "schema_version": 1,
            "checkpoint": {"name": "dense", "digest": "0123456789abcdef" * 4, "family": "qwen2", "num_parameters": 1},
            "data": {"manifest": hash_file(world / "long" / "manifest.json"), "context": tiny.LONG},
            "ceiling": [ROW | {"window": 8, "low": None, "high": None}, ROW],
        }
        whole["data"] |= changes.pop("data", {})
        path = tmp_path / "probe.json"
        path.write_text(json.dumps(whole | changes))
        return f"--model.validation.probe={path}"

    return write


def test_the_record_carries_every_ceiling_of_the_probe(world, tmp_path, probe):
    stages = [f"--model.stages.{name}=null" for name in ("B1", "B2")]
    record = RunRecord.read(run(world, tmp_path / "runs", probe(), *stages, steps=2).run.folder)
    known = {"window": 16, "stride": 4, "nats": 0.05, "blocks": 4, "documents": 3, "checkpoint": "dense (0123456789ab)"}
    assert record.ceiling == [
        Ceiling(**known | {"window": 8, "low": None, "high": None}),
        Ceiling(**known, low=0.03, high=0.07),
    ]
    assert record.data.long == hash_file(world / "long" / "manifest.json")


def test_a_last_stage_that_sees_everything_needs_no_window(world, tmp_path, probe):
    dense = '--model.stages.C={"enabled": true, "attention": "dense"}'
    given = probe(ceiling=[ROW | {"window": 8}])
    record = RunRecord.read(
        run(
            world, tmp_path / "runs", given, "--model.stages.B1=null", "--model.stages.B2=null", dense, steps=2
        ).run.folder
    )
    assert [each.window for each in record.ceiling] == [8]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": {"manifest": "another"}}, "manifest of the long data: got another, expected "),
        ({"data": {"context": 64}}, "context: got 64, expected 32"),
        ({"schema_version": 2}, "schema_version: got 2, expected 1"),
        ({"ceiling": [ROW | {"window": 8}]}, "got a ceiling for windows [8], expected one for 16"),
        ({"ceiling": []}, "got a ceiling for windows [], expected one for 16"),
        ({"ceiling": [{"window": 16}]}, "not a probe.json (KeyError"),
        ({"checkpoint": None}, "not a probe.json (TypeError"),
    ],
)
def test_a_probe_of_something_else_is_refused_in_one_line(world, tmp_path, probe, capsys, changes, message):
    assert cli.main(["fit", *tiny.arguments(world, tmp_path / "runs", probe(**changes))]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "python cli.py probe" in line
    assert not list((tmp_path / "runs").rglob("record.json"))


def test_a_missing_probe_names_the_command(world, tmp_path, capsys):
    given = f"--model.validation.probe={tmp_path}/none.json"
    assert cli.main(["fit", *tiny.arguments(world, tmp_path / "runs", given)]) == 1
    assert f"{tmp_path}/none.json does not exist; make it with python cli.py probe" in capsys.readouterr().err
