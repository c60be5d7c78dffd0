"""A command of several ranks: torchrun's variables, a store that is there, one end for all."""

from __future__ import annotations

import inspect
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import sweeps
from torch.distributed.elastic.agent.server import local_elastic_agent

from orchestrator.config import load
from orchestrator.config.spec import Launch, Retries
from orchestrator.core.messages import AttemptEnded, Cause, Message, Outcome, RankDone, Status
from orchestrator.core.paths import SweepPaths
from orchestrator.distributed.rendezvous import LOOPBACK
from orchestrator.supervisor.rank_verdict import RankVerdict
from orchestrator.worker.command_ranks import variables

PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
state = Path(os.environ["ORC_CHECKPOINT"])

def report(**values):
    with open(os.environ["ORC_REPORT"], "a") as file:
        file.write(json.dumps(values) + "\\n")

def wait_for(name):
    until = time.monotonic() + 60
    while not (state / name).exists():
        assert time.monotonic() < until
        time.sleep(0.01)
"""


def sweep(runs: Path, script: str, *, ranks: int = 2, **options: Any) -> SweepPaths:
    argv = (sys.executable, "-c", PRELUDE + script)
    return sweeps.make(runs, argv=argv, trials=1, ranks_per_node=ranks, **options)


def ends(paths: SweepPaths) -> list[tuple[str, str]]:
    return [(line["cause"], line["detail"]) for line in sweeps.records(paths, "end")]


def verdict_of(num: int, clock: sweeps.Clock | None = None) -> RankVerdict:
    return RankVerdict(num, silent_s=30.0, clock=clock or sweeps.Clock(), in_agreement=False)


def heard(ranks: RankVerdict, rank: int, message: Message) -> None:
    assert list(ranks.hear(rank, message)) == []


# The variables


@pytest.mark.parametrize(("rank", "local", "group"), [(0, 0, 0), (3, 3, 0), (4, 0, 1), (7, 3, 1)])
def test_ranks_are_numbered_node_by_node(rank: int, local: int, group: int) -> None:
    launch = Launch(nodes=2, ranks_per_node=4)
    found = variables(rank, launch, num_here=4, attempt=1, run="r", address=("n1", 4711), given={})
    numbers = {name: int(found[name]) for name in found if name.endswith(("RANK", "WORLD_SIZE"))}
    assert numbers == {
        "RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": group, "ROLE_RANK": rank,
        "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4, "GROUP_WORLD_SIZE": 2, "ROLE_WORLD_SIZE": 8,
    }  # fmt: skip
    assert (found["MASTER_ADDR"], found["MASTER_PORT"], found["TORCHELASTIC_RESTART_COUNT"]) == ("n1", "4711", "1")


def test_they_are_those_of_torchrun() -> None:
    agent = inspect.getsource(local_elastic_agent.LocalElasticAgent._start_workers)
    (theirs,) = re.findall(r"worker_env = \{(.*?)\n {12}\}", agent, re.DOTALL)
    names = {"LOCAL_RANK", *re.findall(r'^ +"(\w+)":', theirs, re.MULTILINE)}
    given = {"GLOO_SOCKET_IFNAME": "lo"}
    ours = variables(0, Launch(ranks_per_node=2), num_here=2, attempt=0, run="r", address=(LOOPBACK, 1), given=given)
    assert ours.keys() == names


def test_gloo_is_kept_to_loopback_where_all_ranks_are_there_and_nobody_says_otherwise() -> None:
    launch = Launch(ranks_per_node=2)
    told: Any = {"num_here": 2, "attempt": 0, "run": "r"}
    assert variables(0, launch, address=(LOOPBACK, 1), given={}, **told)["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in variables(0, launch, address=("n1", 1), given={}, **told)
    assert "GLOO_SOCKET_IFNAME" not in variables(
        0, launch, address=(LOOPBACK, 1), given={"GLOO_SOCKET_IFNAME": "ib0"}, **told
    )


def test_a_command_may_have_ranks() -> None:
    text = "command: [x]\nmethod: grid\nparameters: {x: {value: 1}}\nlaunch: {ranks_per_node: 4}\n"
    assert load.parse(text).launch.num_ranks == 4


# How programs end


def test_a_program_may_go_on_long_after_the_others() -> None:
    clock = sweeps.Clock()
    ranks = verdict_of(3, clock)
    heard(ranks, 1, RankDone())
    heard(ranks, 2, AttemptEnded(cause=Cause.PREEMPTED, detail="later"))
    clock.now = 1e6
    assert ranks.check() == set()


def test_once_none_runs_all_that_ran_them_go(tmp_path: Path) -> None:
    clock = sweeps.Clock()
    ranks = verdict_of(2, clock)
    heard(ranks, 1, RankDone())
    heard(ranks, 0, Outcome(status=Status.COMPLETE, payload={"value": 1.0}))
    assert (ranks.due_s, ranks.check()) == (0.0, {0, 1})
    for rank in (0, 1):
        ranks.exited(rank, signal.SIGKILL.value)
    assert ranks.verdict == Outcome(status=Status.COMPLETE, payload={"value": 1.0})


def test_an_outcome_counts_only_if_every_program_left_with_0() -> None:
    ranks = verdict_of(2)
    heard(ranks, 0, Outcome(status=Status.COMPLETE, payload={"value": 1.0}))
    heard(ranks, 1, AttemptEnded(cause=Cause.ERROR, detail="left with exit code 3"))
    for rank in (0, 1):
        ranks.exited(rank, 0)
    assert ranks.verdict == AttemptEnded(cause=Cause.ERROR, detail="rank 1: left with exit code 3")


@pytest.mark.parametrize(
    ("said", "charged"),
    [
        ([(1, "error", "a"), (0, "error", "b")], "rank 1: a"),
        ([(0, "error", "a"), (1, "signal", "b")], "rank 1: b"),
        ([(0, "preempted", "a"), (1, "error", "b")], "rank 1: b"),
        ([(1, "preempted", "a"), (0, "preempted", "a")], "a"),
    ],
)
def test_the_first_that_failed_is_charged_a_killed_one_before_all(
    said: list[tuple[int, str, str]], charged: str
) -> None:
    ranks = verdict_of(2)
    for rank, end, detail in said:
        heard(ranks, rank, AttemptEnded(cause=Cause(end), detail=detail))
        ranks.exited(rank, 0)
    assert isinstance(ranks.verdict, AttemptEnded)
    assert ranks.verdict.detail == charged


@pytest.mark.parametrize(("noticed", "killed"), [(False, {0}), (True, set())])
def test_who_fails_ends_the_others_but_not_after_a_notice_when_they_may_be_saving(
    noticed: bool, killed: set[int]
) -> None:
    clock = sweeps.Clock()
    ranks = verdict_of(2, clock)
    heard(ranks, 1, AttemptEnded(cause=Cause.ERROR, detail="no", noticed=noticed))
    ranks.exited(1, 0)
    clock.now = 5.0
    assert ranks.check() == killed


# With real processes


def test_the_store_is_there_until_the_last_rank_has_ended_and_the_first_one_s_reports_count(tmp_path: Path) -> None:
    script = """
import socket
print("rank", rank, "of", os.environ["WORLD_SIZE"], flush=True)
report(val_loss=1.5 + rank)
if rank == 0:
    (state / "pid.new").write_text(str(os.getpid()))
    (state / "pid.new").rename(state / "pid")
    sys.exit()
wait_for("pid")
first = Path("/proc") / (state / "pid").read_text()
while first.exists():
    time.sleep(0.01)
socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=60).close()
"""
    paths = sweep(tmp_path, script)
    code, said = sweeps.run(paths)
    (found,) = sweeps.records(paths, "outcome")
    assert (code, found["payload"].get("value")) == (0, 1.5), said
    assert "rank 0 of 2" in said
    (log,) = paths.logs.glob("rank-*.1.log")
    assert "rank 1 of 2" in log.read_text()


def test_a_rank_that_dies_ends_the_others_and_is_named(tmp_path: Path) -> None:
    death = "os.kill(os.getpid(), signal.SIGKILL)"
    paths = sweep(tmp_path, f"{death} if rank == 1 else time.sleep(600)", retries=Retries(signal=0))
    sweeps.run(paths)
    assert ends(paths) == [("signal", "rank 1: killed by SIGKILL")]


def test_a_notice_reaches_every_rank_they_save_into_one_folder_and_go_on_later(tmp_path: Path) -> None:
    script = """
saved = sorted(path.name for path in state.glob("saved-*"))
if saved:
    report(val_loss=len(saved))
    sys.exit()
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
(state / f"begun-{rank}").touch()
wait_for("begun-0"), wait_for("begun-1")
while not stopped:
    time.sleep(0.01)
(state / f"saved-{rank}").touch()
sys.exit(75)
"""
    paths = sweep(tmp_path, script)
    with sweeps.started(paths) as process:
        sweeps.until(lambda: len(list(paths.checkpoint(0).glob("attempt-0/begun-*"))) == 2, limit_s=120.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(4 * sweeps.LIMIT_S) == 75
    assert sweeps.names(paths.checkpoint(0) / "attempt-0") == ["begun-0", "begun-1", "saved-0", "saved-1"]
    sweeps.superseded(paths, sweeps.OTHER, sweeps.TOKEN)
    code, said = sweeps.run(paths, submission=sweeps.OTHER)
    (found,) = sweeps.records(paths, "outcome")
    assert (code, found["payload"].get("value")) == (0, 2.0), said


def test_a_program_that_cannot_be_started_fails_the_trial(tmp_path: Path) -> None:
    paths = sweeps.make(tmp_path, argv=("./nothing-here",), trials=1, ranks_per_node=2)
    sweeps.run(paths)
    assert "./nothing-here can't be started: No such file" in str(sweeps.fold(paths).payload(0).get("error"))
