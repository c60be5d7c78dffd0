"""Faults that Slurm makes, on a real one: preemption, time limits, cancels, requeues, drained nodes, slow prologues.

Tests that displace what runs on a node have that node to themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from invariants import Memory, check
from on_lab import Slurm
from on_lab_sweeps import STEPS, WINDOW, Bench, build

from orchestrator.slurm.lab import LabOptions

FORMS = ("exec", "trap", "srun")
OPTIONS = LabOptions(nodes=14, cpus=16, grace_time_s=5, kill_wait_s=5)
SHARED = "n8"
"""Where tests run that displace nothing."""
Steps = Callable[..., Bench]


@pytest.fixture
def steps(tmp_path: Path, slurm_of: Callable[[LabOptions], Slurm]) -> Iterator[Steps]:
    """Makes a sweep of trials that take steps, save after each, and stay at the third until they are let go."""
    made: list[Bench] = []

    def make(node: str = SHARED, *, time: int = 10, more: str = "", **options: object) -> Bench:
        where = f"time: {time}, nodelist: {node}{more}"
        made.append(build(tmp_path, slurm_of(OPTIONS), program=STEPS, options=where, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for bench in made:
        bench.let_go()
        bench.run("cancel")  # where a test failed in the middle


def restarts(bench: Bench, sweep: str, worker: int = 0) -> str:
    return bench.slurm.show(bench.worker(sweep, worker))["Restarts"]


# 2, 3, 35: preemption


@pytest.mark.parametrize(("node", "at_term"), [("n0", "save"), ("n1", "ignore")])
def test_fault_02_a_preempted_sweep_is_requeued_once_whether_its_program_saved_or_was_killed(
    steps: Steps, node: str, at_term: str
) -> None:
    bench = steps(node, trials=2, block=2, at_term=at_term)
    sweep = bench.submit()
    memory = Memory(bench.paths(sweep))
    bench.wait_for_step()
    memory.look()
    bench.urgent(node)
    bench.slurm.wait_for(lambda: len(bench.began_from()) == 2, 60)
    memory.look()
    bench.finish(sweep)
    assert bench.began_from() == [0, 3]
    assert restarts(bench, sweep) == "1"
    assert any("preempted" in notice["action"] for notice in bench.notices(sweep))


def test_fault_03_a_preemption_without_grace_costs_what_was_not_saved_and_no_more(steps: Steps) -> None:
    bench = steps("n2", more=", partition: abrupt", trials=1, block=1, at_term="ignore")
    partition = ("PartitionName=abrupt", "Nodes=n2", "PriorityTier=1", "PreemptMode=REQUEUE", "GraceTime=0")
    bench.slurm.run("scontrol", "create", *partition, "State=UP")
    sweep = bench.submit()
    bench.wait_for_step()
    bench.urgent("n2")
    bench.slurm.wait_for(lambda: len(bench.began_from()) == 2, 60)
    bench.finish(sweep)
    assert bench.began_from() == [0, 3]
    assert (bench.folder / "marks" / "0.steps").read_text().split() == list("123456")
    best = json.loads(bench.orc("best", "--json", sweep))
    assert best[0]["attempts"] == 2
    assert "from step 3" in bench.orc("logs", "0", sweep)


def test_fault_35_a_program_that_leaves_inside_the_grace_time_still_finishes_its_trial(steps: Steps) -> None:
    bench = steps("n3", trials=1, block=1, at_term="leave")
    sweep = bench.submit()
    bench.wait_for_step()
    bench.urgent("n3")
    bench.slurm.wait_for(lambda: len(bench.began_from()) == 2, 60)
    bench.finish(sweep)
    assert (bench.began_from(), restarts(bench, sweep)) == ([0, 3], "1")


# 4, 7, 42: the time limit, announced by hand


@pytest.mark.usefixtures("unannounced")
def test_fault_04_a_trial_that_meets_its_time_limit_too_often_has_timed_out_by_number(steps: Steps) -> None:
    bench = steps(**WINDOW, trials=2, block=1, at_term="leave", launch="retries: {timeout: 1}")
    sweep = bench.submit()
    worker = bench.worker(sweep)
    bench.wait_for_step(trial=1)  # it stays with the other worker, whose time is not over
    for attempt in range(2):
        bench.slurm.wait_for(lambda attempt=attempt: has_begun(bench, attempt + 1), 120)
        bench.slurm.run("scancel", "--batch", "--signal", "TERM", worker)
    bench.slurm.wait_for(lambda: bench.trials(sweep)["failed"] == 1, 120)
    said = bench.orc("status", sweep)
    assert "timed out 2 times" in said
    assert "orc resume --failed --set slurm.time=" in said
    bench.let_go()
    bench.slurm.wait_for(lambda: bench.trials(sweep)["complete"] == 1 and not bench.jobs(sweep), 120)
    assert json.loads(bench.summary_file(sweep).read_bytes())["failed"] == 1
    check(bench.paths(sweep), jobs=bench.all_jobs(sweep), says=["1 complete", "1 failed", "2 timeout"])
    bench.orc("resume", "--failed", "--set", "slurm.time=20", sweep)
    bench.slurm.wait_for(lambda: bench.trials(sweep)["complete"] == 2, 120)
    bench.finish(sweep)
    assert bench.began_from()[:2] == [0, 3]


def has_begun(bench: Bench, times: int, trial: int = 0) -> bool:
    """Whether a trial has begun so many times, and is where it stays."""
    return (bench.folder / "marks" / f"{trial}.at-3").exists() and len(bench.began_from(trial)) >= times


@pytest.mark.usefixtures("unannounced")
@pytest.mark.parametrize("form", FORMS)
def test_fault_07_several_notices_at_once_make_one_restart(steps: Steps, form: str) -> None:
    bench = steps(**WINDOW, trials=1, block=1, at_term="hold", form=form)
    sweep = bench.submit()
    bench.wait_for_step()
    worker = bench.worker(sweep)
    for name in ("TERM", "USR1", "TERM"):
        bench.slurm.run("scancel", "--batch", "--signal", name, worker)
    if form == "srun":
        bench.slurm.run("scancel", "--signal", "USR1", worker)
    bench.slurm.wait_for((bench.folder / "marks" / "0.saving").exists)
    (bench.folder / "saved").touch()
    bench.slurm.wait_for(lambda: len(bench.began_from()) == 2, 120)
    bench.finish(sweep)
    assert restarts(bench, sweep) == "1"
    assert bench.began_from() == [0, 3]
    assert len((bench.folder / "marks" / "0.notices").read_text().splitlines()) == 1  # one save


SLOW = '[ -e {0}/heard ] || until [ -n "${{ORC_NOTICE:-}}" ]; do touch {0}/begun; sleep 0.05; done; touch {0}/heard'
"""A prologue that takes, in its first run, until the notice has come."""


@pytest.mark.usefixtures("unannounced")
@pytest.mark.parametrize("form", FORMS)
def test_fault_42_a_notice_during_a_slow_prologue_is_kept_and_the_job_resumes(
    steps: Steps, tmp_path: Path, form: str
) -> None:
    bench = steps(**WINDOW, trials=1, block=1, form=form, launch=f"setup: {json.dumps(SLOW.format(tmp_path))}")
    bench.let_go()
    sweep = bench.submit()
    bench.slurm.wait_for((bench.folder / "begun").exists, 120)
    bench.slurm.run("scancel", "--batch", "--signal", "TERM", bench.worker(sweep))
    bench.finish(sweep, limit_s=150)
    assert (bench.folder / "heard").exists()
    assert bench.notices(sweep)[0]["action"] == "timeout: finish or stop, then requeue"
    assert bench.began_from() == [0]  # nothing is begun by a job that has been told to go
    assert restarts(bench, sweep) == "1"


# 5, 36: cancels


@pytest.mark.parametrize("form", FORMS)
def test_fault_05_a_cancel_is_shown_is_not_resubmitted_and_resume_goes_on(steps: Steps, form: str) -> None:
    bench = steps(trials=2, block=1, form=form)
    sweep = bench.submit()
    bench.wait_for_step()
    bench.orc("cancel", sweep)
    bench.slurm.wait_for(lambda: not bench.jobs(sweep))
    assert "orc resume" in bench.orc("status", sweep)
    assert "cancelled" in bench.run("submit", "sweep.yaml").stderr
    assert bench.run("submit", "sweep.yaml").returncode == 2
    assert bench.jobs(sweep) == []
    check(bench.paths(sweep), jobs=bench.all_jobs(sweep), says=["cancelled", "orc resume"])
    bench.orc("resume", sweep)
    bench.finish(sweep)
    assert bench.began_from() == [0, 3]


@pytest.mark.parametrize(("form", "node"), [("exec", "n4"), ("trap", "n5"), ("srun", "n6")])
def test_fault_36_a_job_that_is_cancelled_while_it_saves_never_runs_again(steps: Steps, form: str, node: str) -> None:
    bench = steps(node, trials=2, block=2, at_term="save", form=form)
    sweep = bench.submit()
    bench.wait_for_step()
    bench.urgent(node)
    bench.slurm.wait_for((bench.folder / "marks" / "0.saving").exists)
    bench.slurm.run("scancel", bench.worker(sweep))
    bench.slurm.wait_for(lambda: not bench.jobs(sweep), 60)
    assert bench.slurm.job_state(bench.worker(sweep)) == "CANCELLED"
    assert bench.began_from() == [0]
    check(bench.paths(sweep), jobs=bench.all_jobs(sweep), says=["orc resume"])
    bench.orc("resume", sweep)
    bench.finish(sweep)
    assert bench.began_from() == [0, 3]


# 6, 32: a requeue of all


def test_fault_06_a_requeue_of_the_whole_array_resumes_what_was_at_work_and_repeats_nothing(steps: Steps) -> None:
    bench = steps(trials=3, block=1)
    (bench.folder / "trial.py").write_text(STEPS.replace('params["stay"]', '(3 if index != "0" else 9)'))
    sweep = bench.submit()
    bench.slurm.wait_for(lambda: bench.trials(sweep)["complete"] == 1, 60)
    bench.wait_for_step(trial=1)
    bench.wait_for_step(trial=2)
    array = bench.worker(sweep).partition("_")[0]
    bench.slurm.run("scontrol", "requeue", array)
    bench.slurm.wait_for(lambda: len(bench.began_from(1)) == len(bench.began_from(2)) == 2, 60)
    bench.finish(sweep)
    assert [bench.began_from(trial) for trial in range(3)] == [[0], [0, 3], [0, 3]]


def test_fault_32_the_logs_of_every_attempt_are_kept_and_marked(steps: Steps) -> None:
    bench = steps(trials=1, block=1)
    sweep = bench.submit()
    for attempt in range(2):
        bench.slurm.wait_for(lambda attempt=attempt: has_begun(bench, attempt + 1), 60)
        bench.slurm.run("scontrol", "requeue", bench.worker(sweep))
        bench.slurm.wait_for(lambda attempt=attempt: len(bench.began_from()) == attempt + 2, 60)
    bench.finish(sweep)
    said = bench.orc("logs", "0", sweep)
    places = [said.index(f"attempt {attempt}: start") for attempt in range(3)]
    assert places == sorted(places)
    for attempt, step in enumerate(bench.began_from()):  # each goes on where the one before it has saved
        assert said[places[attempt] :].index(f"from step {step}") < said[places[attempt] :].index("attempt", 30)


# 10: children that ignore every signal


def test_fault_10_a_loader_that_ignores_term_is_gone_with_its_job(steps: Steps) -> None:
    bench = steps(trials=2, block=2)
    deaf = (
        "import os, signal, time\nif os.fork() == 0:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n    time.sleep(300)\n    os._exit(0)\n"
    )
    (bench.folder / "trial.py").write_text(deaf + STEPS)
    sweep = bench.submit()
    bench.wait_for_step()
    bench.slurm.run("scancel", bench.worker(sweep))
    bench.slurm.wait_for(lambda: not bench.jobs(sweep), 60)
    check(bench.paths(sweep), jobs=bench.all_jobs(sweep), says=["orc resume"])
    bench.orc("resume", sweep)
    bench.finish(sweep)


# 12: a node that is drained


def test_fault_12_what_runs_on_a_node_that_is_drained_finishes_and_status_says_why_the_rest_waits(
    steps: Steps,
) -> None:
    bench = steps("n7", trials=5, block=1, more=", cpus-per-task: 8")
    sweep = bench.submit()
    bench.wait_for_step(trial=0)
    bench.wait_for_step(trial=1)
    bench.slurm.run("scontrol", "update", "NodeName=n7", "State=DRAIN", "Reason=repair")
    try:
        bench.slurm.wait_for(lambda: "n7: drained or down" in bench.orc("status", sweep))
        bench.let_go()
        bench.slurm.wait_for(lambda: bench.trials(sweep)["complete"] == 5, 60)
        assert (bench.began_from(0), bench.began_from(1)) == ([0], [0])
    finally:
        bench.slurm.run("scontrol", "update", "NodeName=n7", "State=RESUME")
    bench.finish(sweep)


# 28: hostile values and names

HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "a\nb",
    "a\n#SBATCH --exclusive",
    "; touch pwned",
    "--x",
    "../..",
    "é☃",
    "'\"",
]


def test_fault_28_hostile_values_reach_the_program_literally_by_way_of_slurm(
    tmp_path: Path, slurm_of: Callable[[LabOptions], Slurm]
) -> None:
    bench = build(tmp_path, slurm_of(OPTIONS))
    script = 'printf "%s" "$1" > "seen.$ORC_TRIAL"; echo "{\\"val_loss\\": $ORC_TRIAL.5}" >> $ORC_REPORT'
    spec = {
        "command": ["sh", "-c", script, "sh", "${args_no_hyphens}"],
        "name": "hostile",
        "method": "grid",
        "parameters": {"x": {"values": HOSTILE}},
        "env": {"EVIL": "$(touch pwned) `touch pwned` '\" \\"},
        "launch": {"trials_per_task": 3},
        "slurm": {"time": 10, "nodelist": SHARED},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True))
    sweep = bench.submit()
    bench.finish(sweep)
    assert [(tmp_path / f"seen.{trial}").read_text() for trial in range(len(HOSTILE))] == [f"x={v}" for v in HOSTILE]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("name", ["a\ntouch pwned", "$(touch pwned)", "`id`", "../up", "-x", "é", "a b", ""])
def test_fault_28_a_hostile_name_is_refused_before_anything_is_made(
    tmp_path: Path, slurm_of: Callable[[LabOptions], Slurm], name: str
) -> None:
    bench = build(tmp_path, slurm_of(OPTIONS))
    text = yaml.safe_load((tmp_path / "sweep.yaml").read_text()) | {"name": name}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(text, allow_unicode=True))
    said = bench.run("submit", "sweep.yaml")
    assert said.returncode == 2
    assert "sweep.yaml:" in said.stderr
    assert "name" in said.stderr
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.rglob("pwned"))
