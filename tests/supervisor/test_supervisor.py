"""The supervisor, with real processes and real kills: nothing is lost, counts twice, or is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import sweeps
from sweeps import (
    HALF,
    OTHER,
    THIRD,
    TOKEN,
    counts,
    fold,
    left_running,
    make,
    records,
    run,
    started,
    summary,
    superseded,
    until,
)

from orchestrator.config.spec import Retries
from orchestrator.core.paths import SweepPaths
from orchestrator.results.records import Cause, Status

READS_NOTHING = f"exec {sys.executable} -c 'import ctypes; ctypes.string_at(0)'"
DIES_THIRD = f"[ $ORC_TRIAL = 2 ] && {READS_NOTHING}; {HALF}"
MIXED = f"""
case $((ORC_TRIAL % 10)) in
  3) exit 1 ;;
  6) echo '{{"val_loss": NaN}}' >> $ORC_REPORT ;;
  9) kill -ABRT $$ ;;
  *) {HALF} ;;
esac
"""
WAITS = f"""
touch "$ORC_SWEEP/logs/began-$ORC_TRIAL"
while [ ! -e "$ORC_SWEEP/logs/go" ]; do sleep 0.02; done
{HALF}
"""
"""A trial that says that it runs, and ends once it may."""


def began(paths: SweepPaths, trial: int) -> None:
    until((paths.logs / f"began-{trial}").exists)


def let_go(paths: SweepPaths) -> None:
    (paths.logs / "go").touch()


def undisturbed(tmp_path: Path, paths: SweepPaths, **options: str) -> bytes:
    """`summary.json` of the same sweep in another folder, run by one worker without faults."""
    other = SweepPaths(tmp_path / "undisturbed" / paths.id)
    for folder in other.folders:
        folder.mkdir(parents=True)
    other.plan.write_bytes(paths.plan.read_bytes())
    let_go(other)
    assert run(other, **options)[0] == 0  # type: ignore[arg-type]
    return summary(other)


def ends(paths: SweepPaths) -> list[tuple[int, int, str]]:
    return sorted((line["trial"], line["attempt"], line["cause"]) for line in records(paths, "end"))


def failure(paths: SweepPaths, trial: int) -> str:
    found = fold(paths)
    assert found.status(trial) is Status.FAILED
    return str(found.payload(trial)["error"])


# What a trial comes to


def test_every_trial_gets_one_outcome_and_nothing_is_left(tmp_path: Path) -> None:
    paths = make(tmp_path, trials=5)
    assert run(paths)[0] == 0
    assert counts(paths) == {"complete": 5}
    assert list(fold(paths).values) == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert [line["trial"] for line in records(paths, "outcome")] == list(range(5))
    assert left_running(paths) == []
    assert sweeps.names(paths.checkpoints) == []


def test_whoever_sees_the_last_outcome_writes_the_summary(tmp_path: Path) -> None:
    paths = make(tmp_path, trials=3)
    assert run(paths)[0] == 0
    written = paths.summary.read_bytes()
    assert json.loads(written)["missing"] == 0
    assert summary(paths) == written


def test_fault_37_a_trial_that_segfaults_every_time_costs_the_others_nothing(tmp_path: Path) -> None:
    paths = make(tmp_path, DIES_THIRD, trials=10, trials_per_task=10)
    assert run(paths)[0] == 0
    assert counts(paths) == {"complete": 9, "failed": 1}
    assert "SIGSEGV" in failure(paths, 2)
    assert ends(paths) == [(2, 0, "signal"), (2, 1, "signal")]  # one retry of a signal is the default


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("true", "no result: the job ended without a report of 'val_loss'"),
        ("echo '{\"loss\": 1}' >> $ORC_REPORT", "no result: the job never reported 'val_loss'; it reported loss"),
        ("echo rubbish >> $ORC_REPORT", "no result: the job ended without a report of 'val_loss'"),
        ("echo '[1]' >> $ORC_REPORT; echo '{\"val_loss\": \"low\"}' >> $ORC_REPORT", "no result"),
        (f"{HALF}; exit 3", "left with exit code 3"),
        ("/no/such/program", "left with exit code 127"),
    ],
)
def test_fault_34_a_trial_without_a_result_failed_and_says_why(tmp_path: Path, script: str, text: str) -> None:
    paths = make(tmp_path, script, trials=1)
    assert run(paths)[0] == 0
    assert text in failure(paths, 0)


def test_a_program_that_is_missing_is_named(tmp_path: Path) -> None:
    paths = make(tmp_path, trials=1, argv=("/no/such/program",))
    run(paths)
    assert failure(paths, 0) == "/no/such/program can't be started: No such file or directory"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_loss_that_is_not_finite_is_diverged_with_its_step(tmp_path: Path, value: str) -> None:
    script = f"""{HALF}; echo '{{"step": 7, "val_loss": {value}}}' >> $ORC_REPORT; {HALF}"""
    paths = make(tmp_path, script, trials=1)
    run(paths)
    payload = fold(paths).payload(0)
    assert fold(paths).status(0) is Status.DIVERGED
    assert (payload["step"], payload["metric"]) == (7, "val_loss")
    assert b'"min":null' in summary(paths)


LONG_NAMES = """
import json, os
trial = int(os.environ["ORC_TRIAL"])
name = ["a" * (17 << 20), "b" * 20_000, "c"][trial]
with open(os.environ["ORC_REPORT"], "a") as file:
    print(json.dumps({"loss" if trial == 1 else "val_loss": 0.5, name: 1}), file=file)
"""


def test_a_trial_that_reports_more_than_a_record_holds_failed_by_its_own_fault_and_costs_the_others_nothing(
    tmp_path: Path,
) -> None:
    paths = make(tmp_path, trials=3, argv=(sys.executable, "-c", LONG_NAMES))
    code, said = run(paths)
    assert code == 0
    assert counts(paths) == {"complete": 1, "failed": 2}
    assert failure(paths, 0).startswith("trial 0, attempt 0: its outcome takes 17.0 MiB, and a record holds 16 MiB at")
    assert "trial 0, attempt 0: its report takes 17.0 MiB" in said
    assert failure(paths, 1).startswith("no result: the job never reported 'val_loss'; it reported bbb")
    assert len(failure(paths, 1)) < 5000
    assert fold(paths).num_bad_lines == 0


def test_reports_are_kept_in_order_with_their_steps(tmp_path: Path) -> None:
    script = (
        'for i in 1 2 3; do echo "{\\"step\\": $i, \\"val_loss\\": 0.$i, \\"note\\": \\"x\\"}" >> $ORC_REPORT; done'
    )
    paths = make(tmp_path, script, trials=1)
    run(paths)
    assert [(line["step"], line["metrics"]) for line in records(paths, "report")] == [
        (1, {"val_loss": 0.1}),
        (2, {"val_loss": 0.2}),
        (3, {"val_loss": 0.3}),
    ]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1e999, "val_loss": 1}',
        '{"step": 99999999999999999999999, "val_loss": 1}',
        '{"step": "3; rm", "val_loss": 1}',
        '{"\\ud800": 1}',
        '{"val_loss": 1' + "0" * 400 + "}",
        "[" * 5000,
    ],
)
def test_a_hostile_report_costs_nothing_but_itself(tmp_path: Path, line: str) -> None:
    (tmp_path / "line").write_text(line + "\n")
    paths = make(tmp_path, f"cat {tmp_path}/line >> $ORC_REPORT; {HALF}", trials=2)
    code, said = run(paths)
    assert (code, counts(paths)) == (0, {"complete": 2})
    assert "not a report" in said


def test_a_last_report_needs_no_newline(tmp_path: Path) -> None:
    paths = make(tmp_path, "printf '{\"val_loss\": 4.5}' >> $ORC_REPORT", trials=1)
    run(paths)
    assert fold(paths).values[0] == 4.5


# Budgets


@pytest.mark.parametrize("budget", [0, 2])
def test_an_error_is_tried_again_within_its_budget(tmp_path: Path, budget: int) -> None:
    paths = make(tmp_path, "exit 1", trials=1, retries=Retries(error=budget))
    run(paths)
    assert counts(paths) == {"failed": 1}
    assert ends(paths) == [(0, attempt, "error") for attempt in range(budget + 1)]
    assert len(records(paths, "start")) == budget + 1


def test_a_retry_goes_on_from_the_checkpoint_of_the_attempt_before(tmp_path: Path) -> None:
    script = f"""
    n=$(cat "$ORC_CHECKPOINT/n" 2>/dev/null || echo 0); echo $((n + 1)) > "$ORC_CHECKPOINT/n"
    echo "$ORC_CHECKPOINT" >> "$ORC_SWEEP/logs/folders"
    [ $n -lt 2 ] && exit 1
    {HALF}
    """
    paths = make(tmp_path, script, trials=1, retries=Retries(error=2))
    run(paths)
    assert counts(paths) == {"complete": 1}
    folders = (paths.logs / "folders").read_text().split()
    assert folders == [str(paths.checkpoint(0) / f"attempt-{i}") for i in range(3)]


def test_exit_75_without_a_notice_is_tried_again(tmp_path: Path) -> None:
    script = f'[ -e "$ORC_CHECKPOINT/n" ] || {{ touch "$ORC_CHECKPOINT/n"; exit 75; }}; {HALF}'
    paths = make(tmp_path, script, trials=2)
    assert run(paths)[0] == 0
    assert counts(paths) == {"complete": 2}
    assert ends(paths) == [(0, 0, "unknown"), (1, 0, "unknown")]


def test_exit_75_without_a_notice_is_not_tried_for_ever(tmp_path: Path) -> None:
    paths = make(tmp_path, "exit 75", trials=1, retries=Retries(unknown=1))
    assert run(paths)[0] == 0
    assert ends(paths) == [(0, 0, "unknown"), (0, 1, "unknown")]
    assert failure(paths, 0) == "left with exit code 75, to go on later"


@pytest.mark.parametrize("victim", ["$$", "$PPID"])
def test_a_signal_without_a_name_is_charged_like_any_other(tmp_path: Path, victim: str) -> None:
    paths = make(tmp_path, f"[ $ORC_TRIAL = 0 ] && kill -40 {victim} && sleep 9; {HALF}", trials=2)
    assert run(paths)[0] == 0
    assert failure(paths, 0) == "killed by signal 40"
    assert counts(paths) == {"complete": 1, "failed": 1}


def test_a_trial_that_takes_its_worker_down_each_time_is_given_up(tmp_path: Path) -> None:
    """The program kills the supervisor itself, as one does that takes its whole machine down."""
    script = f"[ $ORC_TRIAL = 0 ] && kill -KILL $(cat $ORC_SWEEP/logs/pid) && sleep 20; {HALF}"
    paths = make(tmp_path, script, trials=2, retries=Retries(unknown=1))
    tokens = [TOKEN, OTHER, THIRD]
    for number, token in enumerate(tokens):
        superseded(paths, token, *tokens[:number])
        with started(paths, submission=token) as process:
            (paths.logs / "pid").write_text(str(process.pid))
            process.wait(60)
    assert counts(paths) == {"complete": 1, "failed": 1}
    assert failure(paths, 0) == "2 attempts ended by: unknown"
    until(lambda: not left_running(paths))


# Kills


def test_a_program_killed_from_outside_is_tried_again(tmp_path: Path) -> None:
    script = f'echo $$ > "$ORC_SWEEP/logs/pid.$$"; mv "$ORC_SWEEP/logs/pid.$$" "$ORC_SWEEP/logs/pid"; {WAITS}'
    paths = make(tmp_path, script, trials=2)
    with started(paths) as process:
        began(paths, 0)
        os.kill(int((paths.logs / "pid").read_text()), signal.SIGKILL)
        let_go(paths)
        assert process.wait(60) == 0
    assert counts(paths) == {"complete": 2}
    (line,) = records(paths, "end")
    assert (line["trial"], line["cause"], line["detail"]) == (0, "signal", "killed by SIGKILL")
    assert summary(paths) == undisturbed(tmp_path, paths)


def kill_while_it_runs(paths: SweepPaths, **options: object) -> None:
    with started(paths, **options) as process:
        began(paths, 0)
        process.kill()
        process.wait(60)
    until(lambda: not left_running(paths))
    let_go(paths)


def test_fault_10_a_killed_supervisor_leaves_no_process_behind(tmp_path: Path) -> None:
    paths = make(tmp_path, f"sleep 60 & trap '' TERM HUP; {WAITS}", trials=2)
    kill_while_it_runs(paths)  # it waits until there is none


def test_fault_10_a_worker_that_dies_leaves_no_process_behind(tmp_path: Path) -> None:
    """The program kills its parent, the worker; what it started itself must not stay either."""
    script = (
        f'[ $ORC_TRIAL = 0 ] && {{ sleep 60 & kill -KILL $PPID; sleep 60; }}; touch "$ORC_SWEEP/logs/next"; {WAITS}'
    )
    paths = make(tmp_path, script, trials=2)
    with started(paths) as process:
        until((paths.logs / "next").exists)
        until(lambda: len(left_running(paths)) <= 5)  # supervisor, preloaded parent, worker, shell, its sleep
        let_go(paths)
        assert process.wait(60) == 0
    assert "SIGKILL" in failure(paths, 0)
    assert counts(paths) == {"complete": 1, "failed": 1}
    until(lambda: not left_running(paths))


def test_a_second_submission_finishes_what_a_killed_one_left(tmp_path: Path) -> None:
    paths = make(tmp_path, WAITS, trials=4, trials_per_task=4)
    kill_while_it_runs(paths)
    superseded(paths, OTHER, TOKEN)
    assert run(paths, submission=OTHER)[0] == 0
    assert counts(paths) == {"complete": 4}
    assert fold(paths).attempts(0) == 2
    assert summary(paths) == undisturbed(tmp_path, paths)


def test_a_requeued_job_goes_on_at_once(tmp_path: Path) -> None:
    paths = make(tmp_path, WAITS, trials=4, trials_per_task=4)
    kill_while_it_runs(paths, env={"SLURM_JOB_ID": "77"})
    assert run(paths, env={"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"})[0] == 0
    assert counts(paths) == {"complete": 4}
    assert summary(paths) == undisturbed(tmp_path, paths)


def test_another_job_leaves_a_claim_alone_until_its_lease_is_over(tmp_path: Path) -> None:
    paths = make(tmp_path, WAITS, trials=4, trials_per_task=2)
    kill_while_it_runs(paths, env={"SLURM_JOB_ID": "77"})
    assert run(paths, "--worker", "1", env={"SLURM_JOB_ID": "78"})[0] == 0
    assert counts(paths) == {"complete": 2, "missing": 2}


def test_fault_22_a_worker_takes_over_after_the_lease(tmp_path: Path) -> None:
    script = f"[ $ORC_TRIAL -gt 1 ] && sleep 0.4; {WAITS}"
    paths = make(tmp_path, script, trials=6, trials_per_task=2, lease_s=0.6)
    kill_while_it_runs(paths)
    assert run(paths, "--worker", "1")[0] == 0
    assert counts(paths) == {"complete": 6}
    assert fold(paths).attempts(0) == 2


def test_a_finished_sweep_is_left_alone(tmp_path: Path) -> None:
    paths = make(tmp_path)
    run(paths)
    superseded(paths, OTHER, TOKEN)
    before = summary(paths)
    assert run(paths, submission=OTHER)[0] == 0
    assert len(records(paths, "start")) == 3
    assert summary(paths) == before


def test_failed_trials_run_again_when_a_submission_says_so(tmp_path: Path) -> None:
    script = f'[ $ORC_TRIAL = 1 ] && [ ! -e "$ORC_SWEEP/logs/go" ] && exit 1; {HALF}'
    paths = make(tmp_path, script)
    run(paths)
    assert counts(paths) == {"complete": 2, "failed": 1}
    let_go(paths)
    superseded(paths, OTHER, TOKEN, retry_failed=True)
    assert run(paths, submission=OTHER)[0] == 0
    assert counts(paths) == {"complete": 3}
    assert fold(paths).disagreements == []


def test_two_workers_that_die_at_once_cost_their_trials_alone(tmp_path: Path) -> None:
    paths = make(tmp_path, f'echo $PPID > "$ORC_SWEEP/logs/worker-$ORC_TRIAL"; {WAITS}', trials=4)
    with started(paths, "--slots", "2") as process:
        began(paths, 0)
        began(paths, 1)
        process.send_signal(signal.SIGSTOP)  # so that it learns of both at the same time
        workers = [int((paths.logs / f"worker-{trial}").read_text()) for trial in (0, 1)]
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
        let_go(paths)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    assert ends(paths) == [(0, 0, "signal"), (1, 0, "signal")]
    assert counts(paths) == {"complete": 4}


def test_fault_05_a_cancelled_submission_starts_nothing(tmp_path: Path) -> None:
    paths = make(tmp_path)
    paths.cancelled.write_text("0")
    assert run(paths)[0] == 75
    assert records(paths, "start") == []


# Notices


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_notice_ends_in_order_and_says_that_work_is_left(tmp_path: Path, number: signal.Signals) -> None:
    paths = make(tmp_path, WAITS, trials=3, trials_per_task=3)
    with started(paths) as process:
        began(paths, 0)
        process.send_signal(number)
        assert process.wait(60) == 75
    assert ends(paths) == [(trial, 0, "cancelled") for trial in range(3)]
    assert [line["signal"] for line in records(paths, "notice")] == [number.name]
    assert fold(paths).retries()[Cause.CANCELLED] == 1  # two had not begun
    assert fold(paths).running() == {}
    assert left_running(paths) == []
    let_go(paths)
    superseded(paths, OTHER, TOKEN)
    run(paths, submission=OTHER)
    assert summary(paths) == undisturbed(tmp_path, paths)


def test_a_program_has_time_to_save_after_a_notice(tmp_path: Path) -> None:
    save = "trap 'sleep 0.3; echo saved > \"$ORC_CHECKPOINT/state\"; exit 1' TERM"
    script = f'cp "$ORC_CHECKPOINT/state" "$ORC_SWEEP/logs/found" 2>/dev/null; {save}; {WAITS}'
    paths = make(tmp_path, script, trials=1)
    with started(paths) as process:
        began(paths, 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert ends(paths) == [(0, 0, "cancelled")]  # not an error of the trial, whatever its exit code
    let_go(paths)
    superseded(paths, OTHER, TOKEN)
    assert run(paths, submission=OTHER)[0] == 0
    assert counts(paths) == {"complete": 1}
    assert (paths.logs / "found").read_text() == "saved\n"


def test_fault_10_a_program_that_ignores_the_notice_is_killed(tmp_path: Path) -> None:
    paths = make(tmp_path, f"trap '' TERM; {WAITS}", trials=1)
    with started(paths) as process:
        began(paths, 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    until(lambda: not left_running(paths))
    assert ends(paths) == [(0, 0, "cancelled")]


def test_a_notice_with_one_slot_idle_still_says_that_work_is_left(tmp_path: Path) -> None:
    paths = make(tmp_path, f"[ $ORC_TRIAL = 0 ] || {{ {HALF}; exit 0; }}; trap '' TERM; {WAITS}", trials=2)
    with started(paths, "--slots", "2") as process:
        began(paths, 0)
        until(lambda: counts(paths).get("complete") == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert counts(paths) == {"complete": 1, "missing": 1}


def test_a_notice_that_comes_before_everything_is_ready_is_not_lost(tmp_path: Path) -> None:
    paths = make(tmp_path, WAITS, trials=1)
    with started(paths) as process:
        until(lambda: catches_term(process.pid))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert [line["signal"] for line in records(paths, "notice")] == ["SIGTERM"]


def catches_term(pid: int) -> bool:
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def test_a_notice_that_the_batch_script_got_is_passed_on(tmp_path: Path) -> None:
    paths = make(tmp_path, HALF, trials=1)
    assert (
        run(paths, env={"ORC_NOTICE": "TERM", "ORC_ACK": str(tmp_path / "ack"), "ORC_READY": str(tmp_path / "on")})[0]
        == 75
    )
    assert [line["signal"] for line in records(paths, "notice")] == ["TERM"]
    assert (tmp_path / "ack").exists()
    assert (tmp_path / "on").exists()


def test_an_acknowledgement_that_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    paths = make(tmp_path, WAITS, trials=1)
    with started(paths, env={"ORC_ACK": "/no/such/folder/ack"}) as process:
        began(paths, 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert ends(paths) == [(0, 0, "cancelled")]


class Controller:
    """A scontrol that says what a test wants of job 77, and notes what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {"SLURM_JOB_ID": "77", "SCENE": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}
        (folder / "scontrol").write_text(SCONTROL)
        (folder / "scontrol").chmod(0o755)

    def say(self, state: str, *, restarts: int = 0, preempted: bool = False, comment: str = f"orc:{TOKEN}:w") -> None:
        when = "2030-01-01T00:00:00" if preempted else "None"
        text = f"JobId=77 JobName=j JobState={state} Restarts={restarts} RunTime=00:00:01 TimeLimit=01:00:00"
        (self.folder / "new").write_text(f"{text} PreemptTime={when} Comment={comment}\n")
        (self.folder / "new").rename(self.folder / "job")

    def after_requeue(self, state: str) -> None:
        """What a requeue that works makes of the job."""
        self.say(state, restarts=1)
        (self.folder / "job").rename(self.folder / "requeued")

    @property
    def requeues(self) -> int:
        calls = self.folder / "calls"
        return calls.read_text().split().count("requeue") if calls.exists() else 0


SCONTROL = """#!/bin/sh
echo "$*" >> "$SCENE/calls"
case "$*" in
  *"show job"*) cat "$SCENE/job" ;;
  requeue*) [ -e "$SCENE/refuse" ] && { rm "$SCENE/refuse"; exit 1; }; mv "$SCENE/requeued" "$SCENE/job" ;;
esac
"""


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    folder = tmp_path / "controller"
    folder.mkdir()
    return Controller(folder)


def noticed(paths: SweepPaths, process: subprocess.Popen[str], number: int = 1) -> None:
    """Send the supervisor a notice, and wait until it has judged it."""
    process.send_signal(signal.SIGTERM)
    until(lambda: len(records(paths, "notice")) == number)


STUBBORN = f"trap '' TERM; {WAITS}"


def test_fault_02_a_preempted_job_finishes_what_runs_and_is_requeued_once(
    tmp_path: Path, controller: Controller
) -> None:
    controller.after_requeue("PENDING")
    controller.say("RUNNING", preempted=True)
    paths = make(tmp_path, STUBBORN, trials=2)
    with started(paths, env=controller.env) as process:
        began(paths, 0)
        noticed(paths, process)
        let_go(paths)
        assert process.wait(60) == 75
    assert controller.requeues == 1
    assert counts(paths) == {"complete": 1, "missing": 1}


@pytest.mark.parametrize("told", [True, False])
def test_fault_36_a_job_that_is_cancelled_while_it_finishes_is_not_requeued(
    tmp_path: Path, controller: Controller, told: bool
) -> None:
    controller.say("RUNNING", preempted=True)
    paths = make(tmp_path, STUBBORN, trials=2)
    with started(paths, env=controller.env) as process:
        began(paths, 0)
        noticed(paths, process)
        controller.say("COMPLETING")
        if told:
            noticed(paths, process, 2)
        let_go(paths)
        assert process.wait(60) == 75
    assert controller.requeues == 0


def test_a_requeue_that_fails_is_tried_again(tmp_path: Path, controller: Controller) -> None:
    controller.after_requeue("PENDING")
    controller.say("RUNNING", preempted=True)
    (controller.folder / "refuse").touch()
    paths = make(tmp_path, WAITS, trials=2)
    with started(paths, env=controller.env) as process:
        began(paths, 0)
        noticed(paths, process)
        assert process.wait(60) == 75
    assert controller.requeues == 2


def test_a_requeue_that_never_works_is_written_down(tmp_path: Path, controller: Controller) -> None:
    controller.say("RUNNING", preempted=True)
    paths = make(tmp_path, WAITS, trials=2, notice_s=1)
    with started(paths, env=controller.env) as process:
        began(paths, 0)
        noticed(paths, process)
        assert process.wait(60) == 75
    assert controller.requeues == 3
    assert records(paths, "notice")[-1]["action"] == "preempted: leaves without a requeue that Slurm confirms"
    assert fold(paths).charges(0)[Cause.UNKNOWN] == 0


SAVES = f"trap 'sleep 0.3; exit 143' TERM; {WAITS}"


@pytest.mark.parametrize("foreign", [True, False])
def test_without_an_answer_a_notice_is_not_charged_to_the_trial(
    tmp_path: Path, controller: Controller, foreign: bool
) -> None:
    """Neither when Slurm says nothing, nor when it speaks of a job that isn't ours."""
    if foreign:
        controller.say("RUNNING", preempted=True, comment="another's")
    paths = make(tmp_path, SAVES, trials=2, notice_s=1)
    with started(paths, env=controller.env) as process:
        began(paths, 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert ends(paths) == [(0, 0, "notice")]
    assert counts(paths) == {"missing": 2}
    assert controller.requeues == 0
    assert fold(paths).charges(0)[Cause.UNKNOWN] == 0


def test_without_an_answer_a_job_stays_until_one_comes(tmp_path: Path, controller: Controller) -> None:
    controller.after_requeue("PENDING")
    (controller.folder / "requeued").rename(controller.folder / "later")
    paths = make(tmp_path, SAVES, trials=2)
    with started(paths, env=controller.env) as process:
        began(paths, 0)
        noticed(paths, process)
        until(lambda: len((controller.folder / "calls").read_text().splitlines()) > 3)  # three tries are one question
        (controller.folder / "later").rename(controller.folder / "requeued")
        controller.say("RUNNING", preempted=True)
        assert process.wait(60) == 75
    assert controller.requeues == 1


# The same bytes


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    seen = {}
    for slots in (1, 2, 3):
        paths = make(tmp_path / str(slots), MIXED, trials=60, trials_per_task=4)
        assert run(paths, "--slots", str(slots))[0] == 0
        seen[slots] = summary(paths)
    assert counts(paths) == {"complete": 42, "diverged": 6, "failed": 12}
    assert seen[1] == seen[2] == seen[3]


def test_workers_side_by_side_run_every_trial_once(tmp_path: Path) -> None:
    paths = make(tmp_path, MIXED, trials=40, trials_per_task=2)
    with started(paths) as one, started(paths, "--worker", "1") as two, started(paths, "--worker", "2") as three:
        assert [process.wait(120) for process in (one, two, three)] == [0, 0, 0]
    assert counts(paths) == {"complete": 28, "diverged": 4, "failed": 8}
    outcomes = [line["trial"] for line in records(paths, "outcome")]
    assert sorted(outcomes) == list(range(40))
    assert len(sweeps.names(paths.records)) == 3


def test_fault_15_the_same_trial_run_twice_at_once_counts_once(tmp_path: Path) -> None:
    paths = make(tmp_path, WAITS, trials=1)
    superseded(paths, OTHER, TOKEN)  # wrongly: the first one is alive
    with started(paths) as one:
        began(paths, 0)
        (paths.logs / "began-0").unlink()
        with started(paths, submission=OTHER) as two:
            began(paths, 0)
            let_go(paths)
            assert [one.wait(60), two.wait(60)] == [0, 0]
    assert len(records(paths, "outcome")) == 2
    assert summary(paths) == undisturbed(tmp_path, paths)


# What a program finds


def test_a_program_finds_its_variables_and_parameters(tmp_path: Path) -> None:
    script = f"""
    env | grep -E '^(ORC_|MINE|OMP)' | sort > "$ORC_SWEEP/logs/env"; cp $ORC_PARAMS "$ORC_SWEEP/logs/params"
    [ -d "$ORC_CHECKPOINT" ] || exit 1; {HALF}
    """
    paths = make(tmp_path, script, trials=1, parameters={"x": {"values": ["a b", 2]}}, env={"MINE": "1"}, cpus=3)
    run(paths)
    found = dict(line.split("=", 1) for line in (paths.logs / "env").read_text().splitlines())
    assert (found["ORC_SWEEP"], found["MINE"], found["OMP_NUM_THREADS"]) == (str(paths.root), "1", "3")
    assert found.keys() >= {"ORC_TRIAL", "ORC_SEED", "ORC_PARAMS", "ORC_REPORT", "ORC_CHECKPOINT"}
    assert counts(paths) == {"complete": 2}


@pytest.mark.parametrize(("env", "seed"), [({}, "0"), ({"PYTHONHASHSEED": "7"}, "7")])
def test_texts_have_the_same_hash_in_every_run(tmp_path: Path, env: dict[str, str], seed: str) -> None:
    paths = make(tmp_path, f'echo "$PYTHONHASHSEED" > "$ORC_SWEEP/logs/seed"; {HALF}', trials=1, env=env)
    run(paths, env={"PYTHONHASHSEED": "random"})
    assert (paths.logs / "seed").read_text() == f"{seed}\n"


HOSTILE = [
    "a\nb",
    "$(touch HERE)",
    "`touch HERE`",
    "; touch HERE",
    "../x",
    "-x",
    "é☃",
    "${program}",
    "'\"\\",
    "a b\t",
    "",
]


def test_fault_28_hostile_values_are_carried_literally(tmp_path: Path) -> None:
    found = "[sys.argv, json.load(open(os.environ['ORC_PARAMS']))]"
    copy = f"import json, os, sys; json.dump({found}, open(sys.argv[1], 'a')); "
    report = "open(os.environ['ORC_REPORT'], 'a').write('{\"val_loss\": 1}')"
    paths = make(
        tmp_path,
        parameters={"x": {"values": list(HOSTILE)}},
        argv=(
            "${interpreter}",
            "-c",
            copy + report,
            f"{tmp_path}/seen-${{envvar:ORC_TRIAL}}",
            "${args_json}",
            "${args}",
        ),
    )
    code, said = run(paths, cwd=tmp_path)
    assert (code, counts(paths)) == (0, {"complete": len(HOSTILE)}), said
    seen = [json.loads((tmp_path / f"seen-{trial}").read_text()) for trial in range(len(HOSTILE))]
    for value, (argv, params) in zip(HOSTILE, seen, strict=True):
        assert params == {"x": value}
        assert json.loads(argv[2]) == {"x": value}
        assert argv[3:] == [f"--x={value}"]
    assert not list(tmp_path.rglob("HERE"))


def test_a_null_character_fails_its_trial_alone(tmp_path: Path) -> None:
    paths = make(tmp_path, parameters={"x": {"values": ["a\0b", "c"]}}, argv=("/bin/sh", "-c", HALF, "sh", "${args}"))
    assert run(paths)[0] == 0
    assert "null" in failure(paths, 0)
    assert fold(paths).status(1) is Status.COMPLETE


def test_trials_side_by_side_print_into_files_of_their_own(tmp_path: Path) -> None:
    paths = make(tmp_path, f"echo said by $ORC_TRIAL; {HALF}", trials=4)
    run(paths, "--slots", "2")
    texts = [paths.slot_log(TOKEN, 0, slot).read_text() for slot in (0, 1)]
    assert sorted(line for text in texts for line in text.splitlines() if line.startswith("said")) == [
        f"said by {trial}" for trial in range(4)
    ]
    assert all("=== trial " in text for text in texts)


# A disk that fills up


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_fault_18_a_full_disk_ends_the_work_by_name_and_it_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    paths = make(small_disk, HALF, trials=30, trials_per_task=3)
    fill = small_disk / "fill"
    with fill.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(fill, fill.stat().st_size - 5 * 4096)
    code, said = run(paths)
    assert code == 1
    assert "No space left on device" in said
    assert str(paths.root) in said
    assert "Traceback" not in said
    assert "failed" not in counts(paths)
    fill.unlink()
    superseded(paths, OTHER, TOKEN)
    assert run(paths, submission=OTHER)[0] == 0
    assert counts(paths) == {"complete": 30}
    assert summary(paths) == undisturbed(tmp_path, paths)


# Arguments and the plan


def test_a_folder_that_is_no_sweep_is_a_clear_error(tmp_path: Path) -> None:
    code, said = run(SweepPaths(tmp_path))
    assert code == 2
    assert "is not the folder of a sweep" in said
    assert "Traceback" not in said


def test_the_supervisor_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'pydantic', 'jinja2', 'pandas'}"
    modules = "orchestrator.supervisor.main, orchestrator.worker.command"
    program = f"import sys, {modules}; sys.exit(str({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stderr == "set()\n"


def test_a_worker_that_finds_nothing_to_do_never_imports_the_program(tmp_path: Path) -> None:
    paths = sweeps.folder(tmp_path, sweeps.spec(program="job.py", trials=1), "raise SystemExit('imported')")
    paths.claim(0, 0, 0).write_text("somebody else")
    code, said = run(paths)
    assert (code, said) == (0, "")
