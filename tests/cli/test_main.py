"""The command line, as real processes: what is printed, where, and how it ends."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
from command_line import HALF, Orc

from orchestrator.cli import prepare
from orchestrator.core import atomic
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process import Process
from orchestrator.results import claims, records
from orchestrator.results.records import RecordWriter
from orchestrator.slurm import ledger

SLOW = "sleep 0.3; " + HALF


@pytest.fixture
def orc(tmp_path: Path) -> Orc:
    return Orc(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Orc:
    """A finished sweep of three trials, to be read only."""
    orc = Orc(tmp_path_factory.mktemp("done"))
    orc("run", orc.write(name="sweep.yaml"))
    return orc


def left(folder: Path) -> list[str]:
    """Command lines of processes that name a folder below `folder`, its own sweeps' for one."""
    lines = [content(path).replace(b"\0", b" ").decode() for path in Path("/proc").glob("[0-9]*/cmdline")]
    return [line for line in lines if str(folder) in line]


def content(path: Path) -> bytes:
    """Of a file that may be gone at any moment."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def wait_until(holds: object, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    assert callable(holds)
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Running


def test_run_ends_with_the_best_trials_on_stdout_and_progress_on_stderr(orc: Orc) -> None:
    said = orc("run", orc.write(), "--top", "2")
    assert said.out.splitlines()[0] == "val_loss (minimize): 3 of 3 complete"
    assert [line.split()[:1] for line in said.out.splitlines()[-3:]] == [["#"], ["1"], ["2"]]
    assert "3 trials, in runs/" in said.err


def test_output_has_no_colour_and_no_animation_off_a_terminal(orc: Orc) -> None:
    orc.variables["FORCE_COLOR"] = "1"
    said = orc("run", orc.write())
    assert "\x1b" not in said.out + said.err
    assert "\r" not in said.out + said.err


def test_progress_is_shown_on_a_terminal_and_gone_at_the_end(orc: Orc) -> None:
    leader, follower = pty.openpty()
    orc.variables["TERM"] = "xterm"
    with orc.start("run", orc.write(command=["sh", "-c", SLOW]), stderr=follower) as process:
        os.close(follower)
        shown = b""
        while part := read(leader):
            shown += part
    os.close(leader)
    assert b"of 3 trials" in shown
    assert b"\x1b[2K" in shown
    assert process.returncode == 0


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def test_what_is_done_is_not_done_again(orc: Orc) -> None:
    first = orc("run", orc.write())
    began = time.monotonic()
    assert orc("run", "sweep.yaml").out == first.out
    assert time.monotonic() - began < 30
    assert len(list((orc.runs / orc.sweeps[0] / "records").iterdir())) == 1


@pytest.mark.parametrize("verb", [["resume"], ["run", "sweep.yaml"]])
@pytest.mark.parametrize("stale", [b"{}\n", None])
def test_a_summary_that_is_stale_is_written_anew(verb: list[str], stale: bytes | None, orc: Orc) -> None:
    orc("run", orc.write())
    summary = orc.runs / orc.sweeps[0] / "summary.json"
    right = summary.read_bytes()
    summary.unlink()
    if stale is not None:
        summary.write_bytes(stale)
    orc(*verb)
    assert summary.read_bytes() == right


def test_the_same_command_says_when_other_code_makes_it_another_sweep(orc: Orc) -> None:
    (orc.folder / "t.sh").write_text(HALF)
    assert "code" not in orc("run", orc.write(command=["sh", "t.sh"])).err
    (orc.folder / "result.txt").write_text("written by a trial")
    assert "code" not in orc("run", "sweep.yaml").err
    (before,) = orc.sweeps
    (orc.folder / "t.sh").write_text(f"{HALF}\n")
    (orc.folder / "more.py").touch()
    said = orc("run", "sweep.yaml").err
    assert f"the sweep file is that of {before}, but the code differs: added more.py, changed t.sh" in said
    assert len(orc.sweeps) == 2
    assert "code" not in orc("run", "sweep.yaml").err


def test_a_folder_that_is_half_made_is_no_sweep(orc: Orc) -> None:
    orc("run", orc.write())
    (whole,) = orc.sweeps
    shutil.copytree(orc.runs / whole, orc.runs / f".{whole}.0123456789ab")
    assert orc("status", "--json").json["sweep"] == whole


# Another machine


@pytest.fixture
def gone(orc: Orc) -> Orc:
    """A sweep of three trials, of which one is done, that a machine of another name has begun."""
    orc.write(launch={"lease_s": 1}, command=["sh", "-c", HALF])
    taken = prepare.read(orc.folder / "sweep.yaml", [], runs=orc.runs)
    paths = taken.store(orc.runs)
    part = ledger.SubmissionPart(what="local", num_workers=1)
    submission = ledger.Submission(token="0" * 32, epoch=0, on="local", host="gone", parts=(part,))
    process = Process(pid=1, start_time=1, boot_id="b", host="gone")
    ledger.append(paths, ledger.intent(submission, "local"))
    ledger.append(paths, ledger.submitted_process(submission.token, "local", process))
    writer = RecordWriter(paths, {"submission": submission.token, "job": None, "slots": 1, "host": "gone"})
    claims.Claims(paths, writer.writer).take(claims.Block(0, 0), 0)
    claims.Claims(paths, writer.writer).take(claims.Block(1, 1), 0)
    payload = {"value": 0.5, "step": None, "metrics": {"val_loss": 0.5}, "model": None}
    writer.append(records.outcome(trial=0, attempt=0, status=records.Status.COMPLETE, payload=payload, seconds=0.0))
    writer.append(records.start(trial=1, attempt=0))
    return orc


def test_a_sweep_whose_machine_is_gone_goes_on_after_a_lease(gone: Orc) -> None:
    said = gone("run", "sweep.yaml")
    assert "process 1 on gone may still be at work; waiting 1 s for a word of it" in said.err
    assert "3 of 3 complete" in said.out


def test_a_sweep_whose_machine_is_gone_is_resumed_at_once_when_forced(gone: Orc) -> None:
    assert "waiting" not in gone("resume", "--force").err
    wait_until(lambda: gone("status", "--json").json["trials"]["complete"] == 3)


@pytest.mark.parametrize("verb", ["run", "resume"])
def test_a_sweep_that_is_at_work_on_another_machine_is_left_to_it(verb: str, gone: Orc) -> None:
    (record,) = gone.runs.glob("*/records/*.jsonl")
    with gone.start(verb, *(["sweep.yaml"] if verb == "run" else [])) as process, record.open("ab") as file:

        def is_over() -> bool:
            file.write(atomic.checked({"kind": "beat"}))
            file.flush()
            return process.poll() is not None

        wait_until(is_over)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == {"run": 2, "resume": 4}[verb]
    assert "1 on gone" in said
    assert len(ledger.submissions(SweepPaths(record.parent.parent))) == 1


def test_status_says_what_it_can_not_see(gone: Orc) -> None:
    assert "can't be seen from here; `orc resume" in gone("status").out


def test_cancel_says_whom_it_does_not_reach(gone: Orc) -> None:
    said = gone("cancel").err
    assert "told to end: nothing" in said
    assert "not reached: process 1 on gone" in said


def test_resuming_beside_what_is_alive_says_that_it_did_nothing(orc: Orc) -> None:
    orc("submit", orc.write(command=["sh", "-c", "sleep 60"]), "--on", "local")
    assert "nothing new was handed over" in orc("resume", expect=4).err
    assert "told to end" in orc("cancel").err


def test_failed_trials_are_counted_named_and_exit_4(orc: Orc) -> None:
    said = orc("run", orc.write(command=["sh", "-c", f'test "$ORC_TRIAL" != 1 || exit 1; {HALF}']), expect=4)
    assert "2 of 3 complete, 1 failed" in said.out
    assert "1 trial failed: left with exit code 1 (first: trial 1)" in said.err
    assert f"orc resume --failed {orc.sweeps[0]}" in said.err


def test_failed_trials_run_again_when_asked(orc: Orc) -> None:
    orc("run", orc.write(command=["sh", "-c", f"test -e {orc.folder}/ready || exit 1; {HALF}"]), expect=4)
    (orc.folder / "ready").touch()
    assert "nothing is missing" in orc("resume").err
    orc("resume", "--failed")
    wait_until(lambda: orc("status", "--json").json["trials"]["complete"] == 3)


@pytest.mark.parametrize("group", [True, False], ids=["terminal", "kill"])
def test_ctrl_c_stops_the_workers_and_says_how_to_go_on(group: bool, orc: Orc) -> None:
    trials = {"x": {"values": list(range(40))}}
    process = orc.start("run", orc.write(command=["sh", "-c", SLOW], parameters=trials), start_new_session=True)
    wait_until(lambda: orc.sweeps and "start" in "".join(p.read_text() for p in orc.runs.glob("*/records/*")))
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "the same command goes on" in err
    assert "Traceback" not in err + out
    wait_until(lambda: not left(orc.runs))


def test_what_ctrl_c_stopped_goes_on(orc: Orc) -> None:
    process = orc.start("run", orc.write(command=["sh", "-c", SLOW]))
    wait_until(lambda: orc.sweeps and list(orc.runs.glob("*/records/*")))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert "3 of 3 complete" in orc("run", "sweep.yaml").out


def test_watching_a_submission_ends_as_run_does(orc: Orc) -> None:
    said = orc("submit", orc.write(), "--on", "local", "--watch")
    assert said.out.splitlines()[0] == orc.sweeps[0]
    assert "3 of 3 complete" in said.out


def test_submitting_prints_the_sweep_and_returns_at_once(orc: Orc) -> None:
    orc.write(command=["sh", "-c", "sleep 60"], parameters={"x": {"value": 0}})
    assert orc("submit", "sweep.yaml", "--on", "local").out.split() == orc.sweeps
    assert "already submitted" in orc("submit", "sweep.yaml", "--on", "local").err
    assert "told to end" in orc("cancel").err
    assert orc("status", "--json").json["trials"]["cancelled"] == 1
    wait_until(lambda: not left(orc.runs))


def test_init_gives_a_job_that_plans_at_once(orc: Orc) -> None:
    said = orc("init", "here and there")
    assert said.out.splitlines() == ["here and there/digits_mlp.py", "here and there/digits_mlp.yaml"]
    assert "orc run 'here and there/digits_mlp'.yaml" in said.err
    assert "1,000 trials (random), 100 blocks of 10" in orc("plan", "here and there/digits_mlp.yaml").out
    assert "left as it is" in orc("init", "here and there", expect=2).err


def test_plan_says_how_wide_a_trial_is(orc: Orc) -> None:
    assert ", 1 thread a trial" in orc("plan", orc.write()).out
    (orc.folder / "train.py").write_text("def train(trial, *, lr): pass\n")
    (orc.folder / "ranks.yaml").write_text("program: train.py\nmethod: grid\nparameters: {lr: {values: [1]}}\n")
    said = orc("plan", "ranks.yaml", "launch.ranks_per_node=4", "launch.cpus=2").out
    assert ", 4 ranks of 2 threads a trial" in said


def test_plan_says_which_packs_there_are(orc: Orc) -> None:
    (orc.folder / "train.py").write_text("def build(*, lr): pass\ndef train(trial, *, epochs): pass\n")
    (orc.folder / "packs.yaml").write_text(
        "program: train.py\nmethod: grid\nlaunch: {pack: 4}\n"
        "parameters: {lr: {values: [1, 2, 3]}, epochs: {values: [1, 2]}}\n"
    )
    said = orc("plan", "packs.yaml").out
    assert "6 trials (grid), 2 blocks of 4" in said
    assert "  packs of up to 4: 3 packs of 1 to 3 trials; trials of a pack have equal epochs\n" in said
    assert "packs of up to 4: 2 packs of 3 trials;" in orc("plan", "packs.yaml", "launch.trials_per_task=6").out
    (orc.folder / "train.py").write_text("from other import *\n")
    assert "launch.pack: 4 needs to know what train takes" in orc("plan", "packs.yaml", expect=2).err


def test_plan_writes_nothing(orc: Orc) -> None:
    orc.write()
    for options in ([], ["--json"], ["--scripts"]):
        orc("plan", "sweep.yaml", *options)
    assert [path.name for path in orc.folder.iterdir()] == ["sweep.yaml"]


def test_plan_shows_the_scripts_without_a_slurm(orc: Orc) -> None:
    orc.variables["PATH"] = "/nowhere"
    said = orc("plan", orc.write(slurm={"time": "00:10:00"}), "--scripts")
    assert said.out.count("#!/bin/bash") == 2
    assert said.out.count("#SBATCH --time=00:10:00") == 2


# Reading


def test_json_has_the_keys_that_are_promised(done: Orc) -> None:
    best = done("best", "--top", "2", "--json").json
    assert [one["index"] for one in best] == [0, 1]
    assert {"trial", "index", "value", "params", "seed", "attempts", "model"} <= best[0].keys()
    summary = done("summary", "--json").json
    numbers = {"schema", "planned", "missing", "count", "min", "max", "mean", "std", "sum", "quantiles"}
    assert numbers | {"diverged", "failed", "pruned", "top"} <= summary.keys()
    assert {"p05", "p25", "p50", "p75", "p95"} <= summary["quantiles"].keys()
    assert summary["top"][0] == {"index": 0, "value": 0.5, "params": {"x": 0}}


def test_status_as_json_has_the_keys_that_are_promised(done: Orc) -> None:
    status = done("status", "--json").json
    assert {"sweep", "dir", "trials", "retries", "disagreements", "jobs", "best"} <= status.keys()
    states = {"waiting", "running", "complete", "diverged", "pruned", "failed", "cancelled"}
    assert status["trials"] == dict.fromkeys(states, 0) | {"complete": 3}
    assert status["jobs"] == []


def test_plan_as_json_has_the_keys_that_are_promised(done: Orc) -> None:
    plan = done("plan", "sweep.yaml", "--json").json
    assert plan["sweep"] == done.sweeps[0]
    assert plan["trials"][2].keys() == {"trial", "index", "params", "seed"}


def test_summary_is_what_the_reducer_wrote(done: Orc) -> None:
    stored = orjson.loads((done.runs / done.sweeps[0] / "summary.json").read_bytes())
    assert done("summary", "--json").json == stored


@pytest.mark.parametrize("how", ["id", "name", "folder", "newest", "environment"])
def test_a_sweep_is_found(how: str, done: Orc, tmp_path: Path) -> None:
    (name,) = done.sweeps
    arguments = {"id": [name], "name": ["sweep"], "folder": [f"runs/{name}"]}.get(how, [])
    elsewhere = Orc(tmp_path, {"ORC_DIR": str(done.runs)})
    orc = elsewhere if how == "environment" else done
    assert name in orc("status", *arguments).out


@pytest.mark.parametrize("verb", ["status", "best", "summary", "resume", "cancel"])
def test_what_is_not_there_is_not_found(verb: str, orc: Orc) -> None:
    assert "no sweep here" in orc(verb, expect=3).err
    assert "no sweep called 'x' here" in orc(verb, "x", expect=3).err


def test_best_of_a_sweep_without_a_result_is_not_found(orc: Orc) -> None:
    orc("run", orc.write(command=["false"]), expect=4)
    assert "no trial is complete yet" in orc("best", expect=3).err
    assert orc("best", "--json", expect=3).json == []


def test_a_reader_that_leaves_early_is_no_error(done: Orc) -> None:
    orc = f"{sys.executable} -P -m orchestrator plan sweep.yaml run_cap=3 --json"
    ran = subprocess.run(
        ["bash", "-c", f"{orc} | head -c 1; echo ${{PIPESTATUS[0]}}"],
        cwd=done.folder,
        env=done.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["{0"] or ran.stdout.split() == ["{", "0"]
    assert ran.stderr == ""


# Logs


def test_logs_show_what_a_trial_printed_and_no_other(done: Orc) -> None:
    said = done("logs", "1").out
    assert "\ntrial 1\n" in said
    assert "trial 0\n" not in said
    assert "trial 2\n" not in said


def test_trials_side_by_side_have_logs_of_their_own(orc: Orc) -> None:
    script = "for i in 1 2 3; do echo $ORC_TRIAL; sleep 0.1; done; " + HALF
    orc("run", orc.write(command=["sh", "-c", script]), "--workers", "3")
    for trial in "012":
        assert f"\n{trial}\n{trial}\n{trial}\n" in orc("logs", trial).out


def test_logs_mark_every_attempt(orc: Orc) -> None:
    script = f'printf "unfinished line"; {HALF}; exit 3'
    orc("run", orc.write(command=["sh", "-c", script], launch={"retries": {"error": 2}}), expect=4)
    said = orc("logs", "0").out
    assert [line.partition(": ")[0].split()[-1] for line in said.splitlines() if ": start" in line] == ["0", "1", "2"]
    assert said.count("unfinished line") == 3


def test_following_ends_with_the_trial(orc: Orc) -> None:
    script = "for i in 1 2 3 4; do echo line $i; sleep 0.4; done; " + HALF
    orc("submit", orc.write(command=["sh", "-c", script], parameters={"x": {"value": 1}}), "--on", "local")
    wait_until(lambda: list(orc.runs.glob("*/logs/*.log")) and orc("logs", "0", expect=None).code == 0)
    said = orc("logs", "0", "-f").out
    assert [line for line in said.splitlines() if line.startswith("line")] == [f"line {i}" for i in (1, 2, 3, 4)]
    assert "complete after" in said


# Around


@pytest.mark.parametrize("arguments", [["--help"], ["run", "-h"], ["lab", "up", "--help"], ["--version"], ["schema"]])
def test_help_is_given(arguments: list[str], orc: Orc) -> None:
    assert orc(*arguments).out


def test_the_list_of_commands_cuts_no_sentence_off(orc: Orc) -> None:
    assert "..." not in orc("--help").out.partition("Commands:")[2]


def test_shells_complete_commands_and_sweeps(done: Orc) -> None:
    asked = Orc(done.folder, {"_ORC_COMPLETE": "bash_complete", "COMP_WORDS": "orc best s", "COMP_CWORD": "2"})
    assert f"plain,{done.sweeps[0]}" in asked().out.split()
    asked.variables.update(COMP_WORDS="orc su", COMP_CWORD="1")
    assert asked().out.split() == ["plain,submit", "plain,summary"]
