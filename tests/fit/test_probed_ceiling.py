"""A run that is given a probe carries its ceiling, and is refused before anything starts where the probe is of something else."""

import json

import pytest
import tiny
from fitting import run

import cli
from ttt_lit.checkpoint.store import load_checkpoint
from ttt_lit.identity import hash_file
from ttt_lit.record.measured import Ceiling
from ttt_lit.record.schema import RunRecord

ROW = {"window": 16, "stride": 4, "nats": 0.05, "low": 0.03, "high": 0.07, "blocks": 4, "documents": 3, "seconds": 1.0}
PARAMETERS = tiny.tiny_spec().num_parameters()
ONLY_C = ("--model.stages.B1=null", "--model.stages.B2=null")


@pytest.fixture
def digest(world):
    return load_checkpoint(world / "checkpoint").weights_hash


@pytest.fixture
def probe(world, tmp_path, digest):
    """A function that writes a probe of the tiny world's checkpoint and long data, with changes."""

    def write(**changes):
        whole = {
            "schema_version": 1,
            "checkpoint": {"name": "dense", "digest": digest, "family": "qwen2", "num_parameters": PARAMETERS},
            "data": {"manifest": hash_file(world / "long" / "manifest.json"), "context": tiny.LONG},
            "ceiling": [ROW | {"window": 8, "low": None, "high": None}, ROW],
        }
        for part in ("data", "checkpoint"):
            whole[part] |= changes.pop(part, {})
        path = tmp_path / "probe.json"
        path.write_text(json.dumps(whole | changes))
        return f"--model.validation.probe={path}"

    return write


def test_the_record_carries_every_ceiling_of_the_probe(world, tmp_path, probe, digest):
    record = RunRecord.read(run(world, tmp_path / "runs", probe(), *ONLY_C, steps=2).run.folder)
    known = {"window": 16, "stride": 4, "nats": 0.05, "blocks": 4, "documents": 3}
    known |= {"checkpoint": f"dense ({digest[:12]})", "digest": digest}
    assert record.ceiling == [
        Ceiling(**known | {"window": 8, "low": None, "high": None}),
        Ceiling(**known, low=0.03, high=0.07),
    ]
    assert record.data.long == hash_file(world / "long" / "manifest.json")


def test_a_last_stage_that_sees_everything_needs_no_window(world, tmp_path, probe):
    dense = '--model.stages.C={"enabled": true, "attention": "dense"}'
    given = probe(ceiling=[ROW | {"window": 8}])
    record = RunRecord.read(run(world, tmp_path / "runs", given, *ONLY_C, dense, steps=2).run.folder)
    assert [each.window for each in record.ceiling] == [8]


def test_a_run_that_goes_on_from_a_converted_one_takes_the_probe_of_the_imported_model(world, tmp_path, probe, digest):
    folder = run(world, tmp_path / "runs", *ONLY_C, steps=2).run.folder
    assert load_checkpoint(folder / "checkpoints" / "C").weights_hash != digest
    start = f"--model.start.init_from={folder}/checkpoints/C"
    record = RunRecord.read(run(world, tmp_path / "more", probe(), *ONLY_C, start, steps=2).run.folder)
    assert {each.digest for each in record.ceiling} == {digest}
    assert digest in record.start.models


def test_what_a_run_has_narrowed_is_not_probed_as_if_imported(world, tmp_path, capsys):
    """Its windows would be opened again, and the loss of weights that were trained without them taken for the imported model's."""
    stages = (
        '--model.stages.B1={"enabled": true, "share": null}',
        "--model.stages.B2=null",
        "--model.stages.C=null",
        "--model.ttt=null",
    )
    folder = run(world, tmp_path / "runs", *stages, steps=2).run.folder
    given = [
        "--checkpoint",
        f"{folder}/checkpoints/B1",
        "--data",
        str(world / "long"),
        "--output",
        str(tmp_path / "probe"),
    ]
    assert cli.main(["probe", *given]) == 1
    assert "or narrowed windows; a probe says what a conversion will do" in capsys.readouterr().err
    assert not (tmp_path / "probe" / "probe.json").exists()


def test_random_weights_take_the_probe_of_any_model_of_their_shape_and_no_other(world, tmp_path, probe, capsys):
    scratch = (*ONLY_C, "--model.start.init=scratch")
    other = {"digest": "0123456789abcdef" * 4}
    record = RunRecord.read(run(world, tmp_path / "runs", probe(checkpoint=other), *scratch, steps=2).run.folder)
    assert {each.checkpoint for each in record.ceiling} == {"dense (0123456789ab)"}
    given = probe(checkpoint=other | {"num_parameters": 1})
    assert cli.main(["fit", *tiny.arguments(world, tmp_path / "no", given, *scratch)]) == 1
    assert f"num_parameters: got 1, expected {PARAMETERS} as in this run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": {"manifest": "another"}}, "manifest of the long data: got another, expected "),
        ({"data": {"context": 64}}, "context: got 64, expected 32"),
        ({"schema_version": 2}, "schema_version: got 2, expected 1"),
        ({"checkpoint": {"digest": "ab" * 32}}, f"digest of the checkpoint: got {'ab' * 32}, expected "),
        ({"ceiling": [ROW | {"window": 8}]}, "got a ceiling for windows [8], expected one for 16"),
        ({"ceiling": []}, "got a ceiling for windows [], expected one for 16"),
        ({"ceiling": [{"window": 16}]}, "not a probe.json (KeyError"),
        ({"checkpoint": {"digest": None}}, "not a probe.json (TypeError"),
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
