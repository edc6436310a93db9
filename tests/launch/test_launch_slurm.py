"""The launcher on a cluster: jobs run ``fit``, are found again, and end in what their records say."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import submitit
from helpers.launching import FAKE, ROOT, ends, start_of, starts

from ttt_lit.launch import slurm
from ttt_lit.launch.loop import launch
from ttt_lit.launch.matrix_file import SlurmSettings
from ttt_lit.train.lock import RunLock

SETTINGS = SlurmSettings(partition="gpu", nodes=2, gpus_per_node=4, mem_gb=0)


ENTRY = "helpers.fake_fit:main"


class LocalCluster(slurm.SlurmBackend):
    """submitit's own executor for processes of this machine, in place of SLURM's."""

    jobs = {}

    def submit(self, folder, parameters, job):
        executor = submitit.AutoExecutor(folder=folder, cluster="local")
        executor.update_parameters(timeout_min=1)
        self.parameters, submitted = parameters, executor.submit(job)
        self.jobs[submitted.job_id] = submitted
        return submitted

    def find(self, folder, job_id):
        return self.jobs[job_id]


@pytest.fixture
def cluster(monkeypatch):
    """A launcher's backend; a later one is another. The folder of fake_fit can be imported by jobs, and GPUs are none."""
    monkeypatch.setenv("PYTHONPATH", f"{FAKE.parents[1]}:{ROOT}")
    monkeypatch.setattr(LocalCluster, "jobs", {})
    return lambda: LocalCluster(SETTINGS, ENTRY)


def test_jobs_run_fit_and_their_records_say_how_they_ended(tmp_path, runs_of, cluster):
    backend = cluster()
    child = {"arms": ["q_a"], "set": start_of(tmp_path, "q_b/m")}
    runs = runs_of({"arms": ["q_b"]}, child, ends("diverged", "q_c"))
    board = launch(runs, backend, lambda board: None, slots=None, poll_seconds=0.05)
    assert board.states == {"q_b/m": "finished", "q_a/m": "finished", "q_c/m": "diverged"}
    arguments = starts(runs[0])[0]["arguments"]
    assert arguments[-8:-6] == ["--trainer.devices", "4"]
    assert arguments[-6:-4] == ["--trainer.num_nodes", "2"]
    assert json.loads(arguments[-3])[0]["init_args"] == {"auto_requeue": False}
    assert arguments[-2:] == ["--trainer.strategy", "fsdp2"]
    assert backend.parameters["tasks_per_node"] == 4
    assert backend.parameters["slurm_mem"] == "0"


def test_a_later_launcher_finds_the_jobs_again(runs_of, cluster):
    (run,) = runs_of(ends("waits", "q_a"))
    cluster().start(run, run.arguments)

    def view(board):
        assert board.states[run.name] in ("queued", "running", "finished")
        (run.folder / "go").touch()

    later = cluster()
    assert launch([run], later, view, slots=None, poll_seconds=0.05).is_finished
    assert len(starts(run)) == 1
    assert len(later.jobs) == 1


class Ended(slurm.SlurmBackend):
    """A cluster whose jobs have ended when they are looked at; ``how``: experiment → what happens until then, with the run's folder."""

    def __init__(self, **how):
        super().__init__(SETTINGS, ENTRY)
        self.how = how

    def submit(self, folder, parameters, job):
        (folder / "7_0_log.err").write_text("slurmstepd: error: out of memory\n")
        does = self.how[parameters["name"].split("-")[0]]
        return SimpleNamespace(job_id="7", done=lambda: does(folder.parent) or True)


def nothing(folder):
    return None


def recording(status):
    def write(folder):
        (folder / "record.json").write_text(json.dumps({"status": status, "reason": f"it was {status}"}))

    return write


def raising(error):
    def fail(*_):
        raise error

    return fail


def on(backend, runs, view=lambda board: None):
    return launch(runs, backend, view, slots=None, poll_seconds=0.01)


def test_a_job_that_the_cluster_refuses_or_loses_fails_alone(runs_of, monkeypatch):
    runs = runs_of({"arms": ["q_a"]}, {"arms": ["q_b"]}, {"arms": ["q_c"]})
    backend = Ended(q_b=raising(RuntimeError("sacct is gone")), q_c=recording("finished"))
    submit = backend.submit

    def submit_but(folder, parameters, job):
        if parameters["name"] == "q_a-m":
            raise RuntimeError("sbatch: invalid partition")  # as submitit's FailedSubmissionError
        return submit(folder, parameters, job)

    monkeypatch.setattr(backend, "submit", submit_but)
    board = on(backend, runs)
    assert board.states == {"q_a/m": "failed", "q_b/m": "failed", "q_c/m": "finished"}
    assert not (runs[0].folder / "slurm.json").exists()  # nothing was submitted, so the same command tries again
    assert board.reasons["q_a/m"] == "the cluster could not submit the job of q_a/m: sbatch: invalid partition"
    assert board.reasons["q_b/m"] == "the cluster could not look at the job of q_b/m: sacct is gone"


def finishing(run, lock, seen, after):
    """A view that notes the run's states and, when there are ``after``, ends the process that trains it elsewhere."""

    def view(board):
        seen.append(board.states[run.name])
        if len(seen) == after:
            recording("finished")(run.folder)
            lock.release()

    return view


def test_a_job_that_lost_the_race_for_its_run_does_not_make_it_a_failure(tmp_path, runs_of):
    """Two launchers submit a run at the same moment: the one whose job is refused watches the one that won, and goes on after it."""
    run, child = runs_of({"arms": ["q_a"]}, {"arms": ["q_b"], "set": start_of(tmp_path, "q_a/m")})
    lock, seen = RunLock(run.folder), []
    backend = Ended(q_a=lambda folder: None if seen else lock.acquire(), q_b=recording("finished"))
    assert on(backend, [run, child], finishing(run, lock, seen, 4)).is_finished
    assert seen[1:4] == ["running"] * 3


def test_a_job_that_a_dead_launcher_submitted_is_watched_once_it_trains(runs_of):
    (run,) = runs_of({"arms": ["q_a"]})
    lock, seen = RunLock(run.folder), []
    lock.acquire()
    (run.folder / "slurm.json").write_text('{"job_id": null, "submitting": "q_a-m"}')
    assert on(Ended(), [run], finishing(run, lock, seen, 2)).is_finished
    assert seen[0] == "running"


def test_a_launcher_that_dies_while_it_submits_causes_no_second_job(runs_of, monkeypatch):
    (run,) = runs_of({"arms": ["q_a"]})
    dies, later = Ended(), Ended(q_a=recording("finished"))
    monkeypatch.setattr(dies, "submit", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        on(dies, [run])
    assert re.search(r"slurm\.json: .*squeue --name q_a-m", on(later, [run]).reasons[run.name])
    (run.folder / "slurm.json").write_text("{}")
    assert "slurm.json: job_id is missing" in on(Ended(), [run]).reasons[run.name]
    (run.folder / "slurm.json").unlink()
    assert on(Ended(q_a=recording("finished")), [run]).is_finished


@pytest.mark.parametrize(
    "before, during, state, reason",
    [
        ("interrupted", None, "failed", "ended before it began to train: slurmstepd: error: out of memory"),
        ("failed", "running", "failed", "ended, and the record still says running: slurmstepd: error: out of memory"),
        (None, "failed", "failed", "it was failed"),
        ("failed", "interrupted", "interrupted", "it was interrupted"),
    ],
)
def test_a_record_from_before_a_job_says_nothing_about_it(runs_of, before, during, state, reason):
    (run,) = runs_of({"arms": ["q_a"]})
    run.folder.mkdir(parents=True)
    if before is not None:
        recording(before)(run.folder)
        os.utime(run.folder / "record.json", (1, 1))
    board = on(Ended(q_a=nothing if during is None else recording(during)), [run])
    assert (board.states[run.name], board.reasons[run.name]) == (state, reason)


def test_a_preempted_job_makes_the_same_call_again():
    job = slurm.FitJob("helpers.fake_fit:main", ["--run.id", "x"])
    again = job.checkpoint()
    assert again.function is job
    assert (again.args, again.kwargs) == ((), {})
