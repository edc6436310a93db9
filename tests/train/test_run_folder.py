"""Whose a run's folder is: one process's, and one configuration's, in which what only changes the output has no part."""

import copy

import pytest
import yaml

from ttt_lit.train.lock import RunLock, holder
from ttt_lit.train.run_folder import claimed, differences, is_finished

CONFIG = {
    "run": {"id": "x", "root": "runs"},
    "data": {"seed": 0, "num_workers": 0, "verify": "full"},
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
        (changed("run", "verify", "size"), "run.verify"),
        (changed(*CALLBACKS, 1, "init_args", "window", 8), "trainer.callbacks"),
        (changed(*CALLBACKS, 2, "init_args", "optimizer", False), "trainer.callbacks"),
        (changed(*CALLBACKS, CONFIG["trainer"]["callbacks"][1:]), "trainer.callbacks"),
        (changed("trainer", "callbacks", None), "trainer.callbacks"),
    ],
)
def test_everything_else_does(config, where):
    assert differences(CONFIG, config) == differences(config, CONFIG) == [where]


def begin(folder):
    with claimed(folder, CONFIG):
        (folder / "record.json").write_text('{"status": "interrupted"}')


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
