"""Whose a run's folder is: one process's, and one configuration's, in which what only changes the output has no part."""

import copy
import dataclasses
from typing import get_args

import pytest
import yaml
from helpers.demo_record import demo

from ttt_lit.record.schema import Status
from ttt_lit.train.lock import RunLock, holder
from ttt_lit.train.run_folder import begun_config, claimed, differences, has_ended, is_finished

CONFIG = {
    "run": {"id": "x", "root": "runs"},
    "data": {"seed": 0, "num_workers": 0, "verify": "full"},
    "model": {"stages": {"A": {"enabled": False, "lr": 1e-3}, "C": {"enabled": True, "lr": 3e-4}}},
    "trainer": {
        "precision": "32-true",
        "enable_progress_bar": True,
        "callbacks": [
            {"class_path": "callbacks.step_log.StepLog", "init_args": {"every_steps": 1}},
            {"class_path": "callbacks.divergence_guard.DivergenceGuard", "init_args": {"window": 32}},
            {
                "class_path": "callbacks.stage_checkpoint.StageCheckpoint",
                "init_args": {"every_seconds": 600.0, "optimizer": True},
            },
            {"class_path": "callbacks.run_record.RunRecorder"},
            {"class_path": "callbacks.heartbeat.Heartbeat", "init_args": {"every_seconds": 5.0}},
            {"class_path": "callbacks.progress.StageProgressBar", "init_args": {"refresh_rate": None}},
        ],
    },
}


def changed(*path_and_value):
    """``CONFIG`` with one value changed; a callback is named by its place."""
    *path, last, value = path_and_value
    config = copy.deepcopy(CONFIG)
    inner = config
    for key in path:
        inner = inner[key]
    inner[last] = value
    return config


CALLBACKS = ("trainer", "callbacks")


@pytest.mark.parametrize(
    "config",
    [
        changed("trainer", "enable_progress_bar", False),
        changed("run", "root", "/elsewhere/runs"),
        changed("data", "num_workers", 4),
        changed("data", "verify", "size"),
        changed("model", "stages", "A", "lr", 2e-3),
        changed("model", "stages", "A", None),
        changed(*CALLBACKS, 0, "init_args", "every_steps", 10),
        changed(*CALLBACKS, 2, "init_args", "every_seconds", 60.0),
        changed(*CALLBACKS, 4, "init_args", "every_seconds", 1.0),
        changed(*CALLBACKS, 5, "init_args", "refresh_rate", 10),
        changed(*CALLBACKS, CONFIG["trainer"]["callbacks"][:5]),
        changed(*CALLBACKS, 3, {"class_path": "callbacks.run_record.RunRecorder", "init_args": {}}),
    ],
)
def test_what_trains_nothing_makes_no_other_run(config):
    assert differences(CONFIG, config) == differences(config, CONFIG) == []


@pytest.mark.parametrize(
    "config, where",
    [
        (changed("data", "seed", 1), "data.seed"),
        (changed("trainer", "precision", "bf16-mixed"), "trainer.precision"),
        (changed("model", "stages", "C", "lr", 2e-3), "model.stages.C.lr"),
        (changed("model", "stages", "A", "enabled", True), "model.stages.A"),
        (changed("run", "verify", "size"), "run.verify"),
        (changed(*CALLBACKS, 1, "init_args", "window", 8), "trainer.callbacks"),
        (changed(*CALLBACKS, 2, "init_args", "optimizer", False), "trainer.callbacks"),
        (changed(*CALLBACKS, CONFIG["trainer"]["callbacks"][1:]), "trainer.callbacks"),
        (changed("trainer", "callbacks", None), "trainer.callbacks"),
    ],
)
def test_everything_else_does(config, where):
    assert differences(CONFIG, config) == differences(config, CONFIG) == [where]


def write(folder, status):
    reason = None if status in ("running", "finished") else "loss is nan"
    dataclasses.replace(demo(), status=status, reason=reason).write(folder / "record.json")


def begin(folder):
    with claimed(folder, CONFIG):
        write(folder, "interrupted")


def test_a_run_that_has_begun_keeps_its_first_configuration(tmp_path):
    folder = tmp_path / "run"
    begin(folder)
    with claimed(folder, changed("data", "num_workers", 4)):
        assert holder(folder) is not None
    with (
        pytest.raises(ValueError, match=r"another configuration \(data.seed differ\); compare with .*run/config.yaml"),
        claimed(folder, changed("data", "seed", 1)),
    ):
        pass
    assert yaml.safe_load((folder / "config.yaml").read_text()) == CONFIG
    assert holder(folder) is None
    assert not is_finished(folder)


def test_a_record_of_another_version_is_as_good(tmp_path):
    (tmp_path / "record.json").write_text('{"schema_version": 1, "status": "finished", "reason": null}')
    assert is_finished(tmp_path)


@pytest.mark.parametrize("content", [b'{"status": "fini', b"\xff\xfe", b"{}", b"[]"])
def test_a_damaged_record_is_one_line_that_says_what_to_do(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"record\.json: .*--run\.id.*remove") as caught:
        is_finished(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", get_args(Status))
def test_every_status_of_a_record_is_known(tmp_path, status):
    write(tmp_path, status)
    if status == "diverged":
        with pytest.raises(ValueError, match=r"this run diverged \(loss is nan\)"):
            is_finished(tmp_path)
    else:
        assert is_finished(tmp_path) == (status == "finished")
    assert has_ended(tmp_path) == (status in ("finished", "diverged"))


def test_a_text_that_looks_like_a_number_is_a_text_again(tmp_path):
    """YAML of one kind writes 1e3 without quotes, and that of another reads a number."""
    config = changed("run", "id", "1e3")
    with claimed(tmp_path / "run", config):
        write(tmp_path / "run", "interrupted")
    assert begun_config(tmp_path / "run") == config
    with claimed(tmp_path / "run", config):
        pass


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.yaml", b"", r"config\.yaml: damaged, got NoneType, expected the run's settings"),
        ("config.yaml", b"- 1", r"config\.yaml: damaged, got list"),
        ("config.yaml", b"data: {seed: 0", r"config\.yaml: damaged, got ParserError"),
        ("checkpoints/last.json", b"{", r"last\.json: damaged, expected .*\"path\": NAME.* another run\.id"),
        ("checkpoints/last.json", b"{}", r"last\.json: damaged"),
        ("checkpoints/last.json", b"[1]", r"last\.json: damaged"),
    ],
)
def test_a_damaged_file_of_a_begun_run_is_one_line_and_the_file_stays(tmp_path, name, content, message):
    folder = tmp_path / "run"
    begin(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    if name != "config.yaml":  # a run without a record has begun if it can go on
        (folder / "record.json").unlink()
    with pytest.raises(ValueError, match=message) as caught, claimed(folder, CONFIG):
        pass
    assert "\n" not in str(caught.value)
    assert (folder / name).read_bytes() == content


def test_one_that_has_not_may_change_it(tmp_path):
    other = changed("data", "seed", 1)
    for config in (CONFIG, other):
        with claimed(tmp_path, config):
            pass
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == other


def refuse(folder, config=CONFIG):
    with pytest.raises(OSError, match="no data"), claimed(folder, config):  # noqa: PT012
        (folder / "events.out.tfevents.2").touch()
        (folder / "hparams.yaml").touch()
        raise OSError("no data")


def test_a_refused_continuation_leaves_the_run_as_it_was(tmp_path):
    begin(tmp_path)
    (tmp_path / "events.out.tfevents.1").touch()
    refuse(tmp_path, changed("data", "num_workers", 4))
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "record.json", "events.out.tfevents.1"}


def test_a_refused_start_gives_an_older_configuration_back(tmp_path):
    (tmp_path / "config.yaml").write_text("was: there")
    refuse(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "was: there"


def test_a_lock_removes_only_folders_that_it_made(tmp_path):
    lock = RunLock(tmp_path / "runs" / "q" / "x")
    lock.acquire()
    (tmp_path / "runs" / "other").mkdir()
    lock.release()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
