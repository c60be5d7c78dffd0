"""Faults of workers on one machine, with real processes and real kills; afterwards all invariants hold."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sweeps
from invariants import Memory, check, processes_of
from late import Late
from sweeps import HALF, OTHER, TOKEN, counts, records, started, superseded, until

from orchestrator.config.plan import PlanFile
from orchestrator.config.spec import Retries
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import TrialsFailed
from orchestrator.results import reducer
from orchestrator.results.records import RecordWriter, Status, outcome
from orchestrator.sweep import Sweep

WAITS = f"""
touch "$ORC_SWEEP/logs/began-$ORC_TRIAL"
while [ ! -e "$ORC_SWEEP/logs/go" ]; do sleep 0.02; done
{HALF}
"""
SKEWED = Path(__file__).parent / "skewed"


def began(paths: SweepPaths, trial: int) -> None:
    until((paths.logs / f"began-{trial}").exists)


def let_go(paths: SweepPaths) -> None:
    (paths.logs / "go").touch()


def done(trial: int, **payload: Json) -> JsonObject:
    return outcome(
        trial=trial, attempt=0, status=Status.COMPLETE, payload={"value": trial + 0.5, **payload}, seconds=0.1
    )


def put(paths: SweepPaths, *lines: JsonObject) -> None:
    writer = RecordWriter(paths, {"submission": TOKEN, "host": "n1"})
    writer.append(*lines)
    writer.close()


def undisturbed(paths: SweepPaths, tmp_path: Path) -> bytes:
    """`summary.json` of the same plan, from records that nothing has happened to."""
    calm = SweepPaths(tmp_path / "calm" / paths.id)
    for folder in calm.folders:
        folder.mkdir(parents=True, exist_ok=True)
    calm.plan.write_bytes(paths.plan.read_bytes())
    put(calm, *map(done, range(PlanFile.open(calm.plan).num_trials)))
    return sweeps.summary(calm)


def stop_all(paths: SweepPaths) -> list[int]:
    """SIGSTOP to every process of a sweep; gives their ids."""
    pids = sweeps.left_running(paths)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    return pids


def go_on(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# 2, 3, 35: the end of an attempt, as far as a program's own checkpoint goes

SAVES_EACH_STEP = """
n=$(cat "$ORC_CHECKPOINT/n" 2>/dev/null || echo 0)
echo "from $n" >> "$ORC_SWEEP/logs/trace"
while [ $n -lt 6 ]; do
  n=$((n + 1)); echo $n > "$ORC_CHECKPOINT/new"; mv "$ORC_CHECKPOINT/new" "$ORC_CHECKPOINT/n"
  echo "{\\"step\\": $n, \\"val_loss\\": $ORC_TRIAL.5}" >> $ORC_REPORT
  while [ $n -ge 3 ] && [ ! -e "$ORC_SWEEP/logs/go" ]; do touch "$ORC_SWEEP/logs/began-$ORC_TRIAL"; sleep 0.02; done
done
"""
"""A program of six steps that saves after each, and waits after the third."""


def test_fault_03_a_kill_without_notice_loses_at_most_what_was_not_saved(tmp_path: Path) -> None:
    paths = sweeps.make(tmp_path, SAVES_EACH_STEP, trials=1)
    memory = Memory(paths)
    job = {"SLURM_JOB_ID": "77"}
    with started(paths, env=job) as process:
        began(paths, 0)
        memory.look()
        process.kill()
        process.wait(60)
    until(lambda: not processes_of(paths))
    let_go(paths)
    assert sweeps.run(paths, env={**job, "SLURM_RESTART_COUNT": "1"})[0] == 0
    assert (paths.logs / "trace").read_text().splitlines() == ["from 0", "from 3"]
    assert max(line["step"] for line in records(paths, "report")) == 6
    check(paths, undisturbed=undisturbed(paths, tmp_path), memory=memory, exit_codes=[0])


# 10: children


DEAF_CHILD = f"""
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    time.sleep(100)
os.execv("/bin/sh", ["sh", "-c", {WAITS!r}])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_fault_10_a_loader_that_ignores_every_signal_ends_with_its_worker(
    tmp_path: Path, number: signal.Signals
) -> None:
    paths = sweeps.make(tmp_path, argv=(sys.executable, "-c", DEAF_CHILD), trials=2)
    with started(paths) as process:
        began(paths, 0)
        assert len(processes_of(paths)) >= 5  # supervisor, preloaded parent, worker, program, its loader
        process.send_signal(number)
        code = process.wait(60)
    check(paths, exit_codes=[code])
    let_go(paths)
    superseded(paths, OTHER, TOKEN)
    assert sweeps.run(paths, submission=OTHER)[0] == 0
    check(paths, undisturbed=undisturbed(paths, tmp_path), exit_codes=[0])


# 21: what others have written is not visible yet


def with_models(tmp_path: Path, num_trials: int) -> SweepPaths:
    """A finished sweep of three writers, whose trials have models; the best two are kept."""
    paths = sweeps.make(tmp_path / "real", trials=num_trials, top=2)
    for first in range(3):
        lines = []
        for trial in range(first, num_trials, 3):
            weights = b"weights of %d" % trial
            sha = hashlib.sha256(weights).hexdigest()
            lines.append(done(trial, model=sha))
            paths.model(trial, sha).write_bytes(weights)
        put(paths, *lines)
    return paths


def reveal_something(view: Late, random: random.Random) -> None:
    name, hidden = random.choice(sorted(view.hidden().items()))
    mine = view.paths.root / name
    visible = mine.stat().st_size if mine.exists() else 0
    size = visible + random.randint(0, hidden)
    view.reveal(name, size, zeros=random.choice([0, 0, random.randint(0, size)]) if "records" in name else 0)


@pytest.mark.parametrize("seed", range(12))
def test_fault_21_whatever_is_visible_the_best_is_the_best_of_it_and_no_model_that_ranks_is_lost(
    tmp_path: Path, seed: int
) -> None:
    rng, num_trials = random.Random(seed), 9
    real = with_models(tmp_path, num_trials)
    view = Late(real, tmp_path / "view")
    for _ in range(30):
        if view.hidden():
            reveal_something(view, rng)
        sweep = Sweep(view.paths)
        complete = sweep.fold.trials(Status.COMPLETE)
        assert [one.index for one in sweep.best(2)] == complete[:2]
        for one in sweep.best(num_trials):
            assert one.model is None or f"{one.index}-" in one.model.name
        expected = 0 if len(complete) == num_trials else TrialsFailed.exit_code
        assert reducer.reduce(view.paths, wait_s=0.0, alone=False) == expected
        assert json.loads(view.paths.summary.read_bytes())["missing"] == num_trials - len(complete)
        check(view.paths, says=["not visible yet"] if sweep.fold.num_bad_lines else [], ended=False)
        for path in view.paths.models.iterdir():  # what the view has deleted is deleted for everyone
            assert (real.models / path.name).exists()
    view.reveal_all()
    assert reducer.reduce(view.paths, wait_s=0.0, alone=True) == 0
    assert [int(name.partition("-")[0]) for name in sweeps.names(view.paths.models)] == [0, 1]
    put_back = sweeps.summary(real)
    check(view.paths, undisturbed=put_back)


def test_fault_21_a_reducer_waits_for_what_becomes_visible(tmp_path: Path) -> None:
    real = with_models(tmp_path, 6)
    view = Late(real, tmp_path / "view")
    names = iter(sorted(view.hidden()))
    assert reducer.reduce(view.paths, wait_s=60.0, sleep=lambda _: view.reveal(next(names))) == 0
    view.reveal_all()
    check(view.paths, undisturbed=sweeps.summary(real), exit_codes=[0], ended=False)


def test_fault_21_workers_that_do_not_see_each_other_s_records_do_no_harm(tmp_path: Path) -> None:
    """Each has a view of its own, takes the other for dead, and runs its trials again: more work, the same bytes."""
    real = sweeps.make(tmp_path / "real", WAITS, trials=4, trials_per_task=2, lease_s=0.5)
    late = Late(real, tmp_path / "late")
    let_go(late.paths)
    with started(real) as one:
        began(real, 0)
        assert sweeps.run(late.paths, "--worker", "1")[0] == 0
        let_go(real)
        assert one.wait(60) == 0
    assert Sweep(late.paths).summary()["missing"] in (0, 2)  # it took over what it saw no sign of, or left it
    late.reveal_all()
    for path in late.paths.records.iterdir():
        (real.records / path.name).write_bytes(path.read_bytes())
    found = sweeps.summary(late.paths)
    assert found == sweeps.summary(real) == undisturbed(real, tmp_path)
    check(real, undisturbed=found)


# 22: a holder that dies, or sleeps


def test_fault_22_a_holder_that_sleeps_is_taken_over_and_its_late_commit_does_no_harm(tmp_path: Path) -> None:
    # A worker never waits for a lease, so that no allocation does; it takes over what is due when it needs more to do.
    slowly = f"[ $ORC_TRIAL -gt 1 ] && sleep 0.4; {WAITS}"
    paths = sweeps.make(tmp_path, slowly, trials=6, trials_per_task=2, lease_s=0.6)
    memory = Memory(paths)
    with started(paths) as sleeper:
        began(paths, 0)
        asleep = stop_all(paths)
        try:
            let_go(paths)
            assert sweeps.run(paths, "--worker", "1")[0] == 0
            assert counts(paths) == {"complete": 6}
            before = sweeps.summary(paths)
            memory.look()
        finally:
            go_on(asleep)
        assert sleeper.wait(60) == 0
    assert len(records(paths, "outcome")) > 6  # the late commit is there, and counts for nothing
    assert sweeps.summary(paths) == before
    check(paths, undisturbed=undisturbed(paths, tmp_path), memory=memory)


# 23: clocks


def skewed(seconds: int) -> dict[str, str]:
    return {"PYTHONPATH": str(SKEWED), "SKEW_S": str(seconds)}


def test_fault_23_clocks_that_are_minutes_apart_change_nothing(tmp_path: Path) -> None:
    paths = sweeps.make(tmp_path, WAITS, trials=4, trials_per_task=2, lease_s=60.0)
    with (
        started(paths, env=skewed(-300)) as slow,
        started(paths, "--worker", "1", env=skewed(300)) as fast,
    ):
        began(paths, 0)
        began(paths, 2)
        assert sweeps.run(paths, "--worker", "2", env=skewed(86400))[0] == 0  # it finds nothing that is nobody's
        let_go(paths)
        assert [slow.wait(60), fast.wait(60)] == [0, 0]
    assert sorted(line["trial"] for line in records(paths, "outcome")) == list(range(4))  # nobody was taken for dead
    check(paths, undisturbed=undisturbed(paths, tmp_path))


def test_fault_23_the_skew_is_real(tmp_path: Path) -> None:
    seen = {seconds: run_python("import time; print(time.time())", env=skewed(seconds)) for seconds in (-300, 300)}
    assert 590 < float(seen[300]) - float(seen[-300]) < 660


def run_python(program: str, *, env: dict[str, str]) -> str:
    import subprocess

    argv = [sys.executable, "-P", "-c", program]
    return subprocess.run(argv, env=sweeps.clean_environment() | env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("shift_s", [-300, 300, -(10**8)])
def test_fault_23_times_of_files_decide_nothing(tmp_path: Path, shift_s: int) -> None:
    paths = sweeps.make(tmp_path, WAITS, trials=4, trials_per_task=2)
    with started(paths) as process:
        began(paths, 0)
        process.kill()
        process.wait(60)
    until(lambda: not processes_of(paths))
    for path in paths.root.rglob("*"):
        moment = path.stat().st_mtime + shift_s * (1 if hash(path.name) % 2 else -1)
        os.utime(path, (moment, moment))
    let_go(paths)
    superseded(paths, OTHER, TOKEN)
    assert sweeps.run(paths, submission=OTHER)[0] == 0
    sweeps.summary(paths)
    check(paths, undisturbed=undisturbed(paths, tmp_path))


WALL_CLOCKS = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}
NOTED_ONLY = {"handover.py"}
"""It writes down when a job was submitted, for people."""


def test_fault_23_only_what_is_written_for_people_reads_a_wall_clock() -> None:
    package = Path(reducer.__file__).parents[1]
    asked = {
        path.name
        for path in package.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in WALL_CLOCKS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("time", "datetime", "date")
    }
    assert asked <= NOTED_ONLY


# 33: memory


@pytest.fixture
def little_memory() -> Iterator[Callable[[], None]]:
    """Puts a process, with all that it starts, into a control group of 100 MB, as Slurm does with `--mem`."""
    base = next(it for it in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if it.exists())
    group = Path(tempfile.gettempdir()) / "none"
    try:
        group = Path(tempfile.mkdtemp(prefix="orc-test-", dir=base))
        limit = next(it for name in ("memory.max", "memory.limit_in_bytes") if (it := group / name).exists())
        limit.write_text(str(100 * 2**20))
    except (OSError, StopIteration):
        with suppress(OSError):
            group.rmdir()
        pytest.skip("only root, with a control group for memory that it may change, can limit memory")
    yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


ALLOCATES = """
import os, pathlib
if os.environ["ORC_TRIAL"] == "1" and not pathlib.Path(os.environ["ORC_SWEEP"], "logs", "go").exists():
    block = bytearray(400_000_000)
    block[::4096] = bytes([1]) * len(block[::4096])
with open(os.environ["ORC_REPORT"], "a") as report:
    report.write('{"val_loss": %s.5}' % os.environ["ORC_TRIAL"])
"""


def test_fault_33_a_trial_that_runs_out_of_memory_is_failed_by_that_name_with_the_remedy(
    tmp_path: Path, little_memory: Callable[[], None]
) -> None:
    paths = sweeps.make(tmp_path, argv=(sys.executable, "-c", ALLOCATES), trials=3)
    assert sweeps.run(paths, preexec_fn=little_memory)[0] == 0
    assert counts(paths) == {"complete": 2, "failed": 1}
    assert sweeps.fold(paths).payload(1)["cause"] == "out of memory"
    check(paths, says=["killed by SIGKILL: out of memory", "orc resume --failed --set slurm.mem="])
    let_go(paths)  # and with more of it, it would have gone through
    superseded(paths, OTHER, TOKEN, retry_failed=True)
    assert sweeps.run(paths, submission=OTHER)[0] == 0
    sweeps.summary(paths)
    check(paths, undisturbed=undisturbed(paths, tmp_path))


# 34, 35, 37: how a program leaves


@pytest.mark.parametrize("ending", ["true", "exit 0", "echo '{\"other\": 1}' >> $ORC_REPORT"])
def test_fault_34_exit_0_without_a_result_is_never_complete(tmp_path: Path, ending: str) -> None:
    paths = sweeps.make(tmp_path, f"[ $ORC_TRIAL = 1 ] && {{ {ending}; exit 0; }}; {HALF}", trials=3)
    code, _ = sweeps.run(paths)
    assert counts(paths) == {"complete": 2, "failed": 1}
    assert reducer.reduce(paths, wait_s=0.0) == TrialsFailed.exit_code
    check(paths, says=["1 failed", "no result", "orc logs 1", "orc resume --failed"], exit_codes=[])
    assert code == 0  # the worker has done its work; the sweep is not called done, see above


@pytest.mark.parametrize("code", [0, 1, 75, 143])
def test_fault_35_a_program_that_leaves_at_the_notice_goes_on_later_whatever_its_exit_code(
    tmp_path: Path, code: int
) -> None:
    paths = sweeps.make(tmp_path, f"trap 'exit {code}' TERM; {WAITS}", trials=2)
    with started(paths, env=controller(tmp_path, "PreemptTime=2030-01-01T00:00:00")) as process:
        began(paths, 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    check(paths, exit_codes=[75])
    assert counts(paths) == {"missing": 2}
    let_go(paths)
    assert sweeps.run(paths, env={"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"})[0] == 0
    check(paths, undisturbed=undisturbed(paths, tmp_path), exit_codes=[0])


def controller(folder: Path, facts: str) -> dict[str, str]:
    """The environment of job 77 under a controller that says `facts` of it until it was told to requeue it."""
    (folder / "scontrol").write_text(f"""#!/bin/sh
    case "$*" in *requeue*) touch {folder}/requeued; exit 0 ;; esac
    state=RUNNING n=${{SLURM_RESTART_COUNT:-0}}
    [ -e {folder}/requeued ] && state=PENDING n=$((n + 1))
    echo "JobId=77 JobState=$state Restarts=$n {facts} Comment=orc:{TOKEN}:w"
    """)
    (folder / "scontrol").chmod(0o755)
    return {"SLURM_JOB_ID": "77", "PATH": f"{folder}:{os.environ['PATH']}"}


def test_fault_37_a_program_that_segfaults_every_time_third_of_ten_is_named_and_the_nine_complete(
    tmp_path: Path,
) -> None:
    crash = f"exec {sys.executable} -c 'import ctypes; ctypes.string_at(0)'"
    paths = sweeps.make(tmp_path, f"[ $ORC_TRIAL = 2 ] && {crash}; {HALF}", trials=10, trials_per_task=10)
    sweeps.run(paths)
    assert counts(paths) == {"complete": 9, "failed": 1}
    check(paths, says=["9 complete", "1 failed", "SIGSEGV", "trial 2", "orc logs 2"])


def test_fault_04_a_trial_that_meets_its_time_limit_too_often_has_timed_out_by_number(tmp_path: Path) -> None:
    paths = sweeps.make(tmp_path, WAITS, trials=1, retries=Retries(timeout=1))
    env = controller(tmp_path, "RunTime=00:00:59 TimeLimit=00:01:00")
    for restarts in range(2):
        (paths.logs / "began-0").unlink(missing_ok=True)
        (tmp_path / "requeued").unlink(missing_ok=True)
        with started(paths, env=env | {"SLURM_RESTART_COUNT": str(restarts)}) as process:
            began(paths, 0)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75
        check(paths, exit_codes=[75])
    code, _ = sweeps.run(paths, env=env | {"SLURM_RESTART_COUNT": "2"})
    assert counts(paths) == {"failed": 1}
    assert len([line for line in records(paths, "end") if line["cause"] == "timeout"]) == 2
    assert reducer.reduce(paths, wait_s=0.0) == TrialsFailed.exit_code
    check(paths, says=["timed out 2 times", "orc resume --failed"], exit_codes=[])
    assert code == 0  # with the trial failed, nothing is left to come back for
