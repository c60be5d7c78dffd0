"""Trials on several nodes: supervisors as Slurm would start them, one a node, and what becomes of them."""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import sweeps
from sweeps import OTHER, TOKEN, folder, left_running, records, spec, superseded, until

from orchestrator.config.spec import CheckpointOptions
from orchestrator.core import atomic
from orchestrator.core.channel import Channel
from orchestrator.core.messages import (
    FromWorker,
    Heartbeat,
    ImportDone,
    KillWorker,
    RankStarted,
    Reported,
    StartWorker,
    TellWorker,
    ToWorker,
    WorkerId,
)
from orchestrator.core.paths import SweepPaths
from orchestrator.distributed.rendezvous import interface_towards
from orchestrator.errors import OrcError
from orchestrator.results import resumption
from orchestrator.supervisor.node_handshake import addresses, call
from orchestrator.supervisor.remote_nodes import NodeLost, RemoteNodes

JOB = """
import os, pathlib, time
import torch
import orchestrator as orc

NODE = os.environ.get("SLURM_PROCID", "0")
{begin}

def build(*, x):
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1))
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))

def losses(net, batch):
    inputs, targets = batch
    return (net(inputs)[:, 0] - targets) ** 2

def train(trial):
    trial.build(build)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(21, 6, generator=generator), torch.randn(21, generator=generator)
    for epoch in trial.epochs(3):
        for batch in trial.batches(data, 5):
            trial.step(losses, batch)
            logs = pathlib.Path(os.environ["LOGS"])
            if trial.attempt == 0 and trial.num_steps == 7 and "STAYS" in os.environ:
                (logs / f"here.{{trial.group.rank}}.new").write_text(str(os.getpid()))
                (logs / f"here.{{trial.group.rank}}.new").rename(logs / f"here.{{trial.group.rank}}")
                while not (logs / "go").exists():
                    time.sleep(0.01)
        trial.validate(losses, data)
"""


def pair(runs: Path, begin: str = "", trials: int = 1, **options: int) -> SweepPaths:
    """A sweep whose trials train on two nodes."""
    of = spec(program="train.py", trials=trials, nodes=2, **options)
    return folder(runs, replace(of, checkpoint=CheckpointOptions(every="1h")), JOB.format(begin=begin))


def seat(paths: SweepPaths, node: int, **more: str) -> dict[str, str]:
    """Slurm's variables of a node's process."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    return {"SLURM_PROCID": str(node), **step, "LOGS": str(paths.logs), **more}


@contextmanager
def nodes(paths: SweepPaths, submission: str = TOKEN, **more: str) -> Iterator[list[subprocess.Popen[str]]]:
    """A supervisor for each node of a job."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(sweeps.started(paths, submission=submission, env=seat(paths, node, **more)))
            for node in (0, 1)
        ]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=4 * sweeps.LIMIT_S)
    return process.returncode, said


def stays(paths: SweepPaths, rank: int) -> int:
    """The process of a rank, once it is where it stays."""
    until((paths.logs / f"here.{rank}").exists)
    return int((paths.logs / f"here.{rank}").read_text())


def nothing_is_left(paths: SweepPaths) -> None:
    until(lambda: not left_running(paths))
    assert not list(paths.root.glob(".rendezvous-*"))


def alone(tmp_path: Path, **options: int) -> bytes:
    """The summary and the model of the same sweep on one machine."""
    paths = pair(tmp_path / "alone", **options)
    assert sweeps.run(paths, env={"LOGS": str(paths.logs)})[0] == 0
    return results(paths)


def results(paths: SweepPaths) -> bytes:
    models = b"".join(path.name.encode() + path.read_bytes() for path in sorted(paths.models.iterdir()))
    return sweeps.summary(paths) + models


def test_two_nodes_give_the_bytes_of_as_many_ranks_on_one(tmp_path: Path) -> None:
    paths = pair(tmp_path / "runs", trials=2, ranks_per_node=2)
    with nodes(paths) as (first, second):
        assert ended(first)[0] == 0
        assert ended(second) == (0, "")
    assert results(paths) == alone(tmp_path, trials=2, ranks_per_node=2)
    nothing_is_left(paths)


def test_a_job_to_copy_trains_on_two_nodes_as_it_is(tmp_path: Path) -> None:
    """The same file as for one process, for ranks on one machine, and for packs."""
    job, found = (Path(__file__).parents[2] / "jobs/digits_mlp.py").read_text(), []
    of = spec(program="digits_mlp.py", trials=1, parameters={"lr": {"value": 0.1}, "epochs": {"value": 2}}, nodes=2)
    for where in ("nodes", "alone"):
        paths = folder(tmp_path / where, of, job)
        if where == "nodes":
            with nodes(paths) as both:
                assert [ended(one)[0] for one in both] == [0, 0]
        else:
            assert sweeps.run(paths)[0] == 0
        found.append(results(paths))
        nothing_is_left(paths)
    assert found[0] == found[1]


def own_address() -> str:
    """Of this machine in its network; loopback where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.connect(("192.0.2.254", 9))
        return str(sock.getsockname()[0])
    return "127.0.0.1"


def test_nodes_that_reach_each_other_by_a_network_use_that_one(tmp_path: Path) -> None:
    paths = pair(tmp_path / "runs")
    with nodes(paths, SLURM_LAUNCH_NODE_IPADDR=own_address()) as both:
        assert [ended(one)[0] for one in both] == [0, 0]
    assert results(paths) == alone(tmp_path)
    nothing_is_left(paths)


def test_the_interface_towards_a_machine_is_the_one_with_our_address_there() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards(own_address()) in [name for _, name in socket.if_nameindex()]
    assert interface_towards("no.such.host.invalid") is None


def test_where_nothing_is_left_to_do_all_nodes_leave(tmp_path: Path) -> None:
    paths = pair(tmp_path)
    with nodes(paths) as both:
        assert [ended(one)[0] for one in both] == [0, 0]
    superseded(paths, OTHER, TOKEN)
    with nodes(paths, OTHER) as both:
        assert [ended(one) for one in both] == [(0, ""), (0, "")]
    assert len(records(paths, "start")) == 1
    nothing_is_left(paths)


def test_fault_01_a_notice_at_the_first_node_has_all_ranks_save_at_one_step(tmp_path: Path) -> None:
    paths = pair(tmp_path / "runs")
    with nodes(paths, STAYS="1") as (first, second):
        for rank in (0, 1):
            stays(paths, rank)
        second.send_signal(signal.SIGTERM)  # Slurm tells all nodes; it is the first one that decides
        first.send_signal(signal.SIGTERM)
        until(lambda: records(paths, "notice"))
        (paths.logs / "go").touch()
        assert ended(first)[0] == 75
        assert ended(second)[0] == 0
    superseded(paths, OTHER, TOKEN)
    with nodes(paths, OTHER) as both:
        assert [ended(one)[0] for one in both] == [0, 0]
    (resumed,) = resumption.read(paths).resumptions
    assert (resumed.lost, resumed.step >= 7) == (0, True)
    assert results(paths) == alone(tmp_path)
    nothing_is_left(paths)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_is_lost_ends_the_job_and_what_it_did_goes_on_later(tmp_path: Path, lost: int) -> None:
    paths = pair(tmp_path / "runs")
    with nodes(paths, STAYS="1") as both:
        for rank in (0, 1):
            stays(paths, rank)
        both[lost].kill()
        code, said = ended(both[1 - lost])
    assert (code, "of this job is gone, and its ranks with it" in said) == ((0, False), (75, True))[lost]
    if lost:
        (end,) = records(paths, "end")
        assert (end["cause"], "node 1 (" in end["detail"], end.get("begun", True)) == ("unknown", True, True)
    nothing_is_left(paths)
    superseded(paths, OTHER, TOKEN)
    with nodes(paths, OTHER) as again:
        assert [ended(one)[0] for one in again] == [0, 0]
    assert results(paths) == alone(tmp_path)
    nothing_is_left(paths)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_fault_08_09_a_rank_on_another_node_is_named(tmp_path: Path, number: signal.Signals) -> None:
    paths = pair(tmp_path / "runs", silent_s=1)
    with nodes(paths, STAYS="1") as both:
        os.kill(stays(paths, 1), number)
        assert [ended(one)[0] for one in both] == [0, 0]
    (end,) = records(paths, "end")
    assert end["cause"] == "signal"
    assert end["detail"].startswith("rank 1: killed by SIGKILL" if number == signal.SIGKILL else "rank 1 (pid ")
    assert results(paths) == alone(tmp_path, silent_s=1)
    nothing_is_left(paths)


def test_a_program_that_can_t_be_imported_on_another_node_is_said_to_be_broken_there(tmp_path: Path) -> None:
    paths = pair(tmp_path, begin='assert NODE == "0", "no data here"')
    with nodes(paths) as (first, second):
        code, said = ended(first)
        assert ended(second)[0] == 0
    assert code == 2
    assert "on node 1 (" in said
    assert "AssertionError: no data here" in said
    assert "Traceback" not in said.partition("orchestrator:")[2]
    nothing_is_left(paths)


def test_a_step_of_another_size_than_the_sweep_s_is_refused(tmp_path: Path) -> None:
    paths = pair(tmp_path)
    code, said = sweeps.run(paths, env=seat(paths, 0, SLURM_STEP_NUM_TASKS="3"))
    assert (code, "this job step has 3 tasks, and launch.nodes is 2" in said) == (2, True)


def test_a_program_that_knows_nothing_of_us_has_torchruns_variables_on_every_node(tmp_path: Path) -> None:
    script = """
import json, os
import torch.distributed as dist
dist.init_process_group("gloo")
mine = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "SLURM_PROCID")}
found = [None] * dist.get_world_size()
dist.all_gather_object(found, mine)
if dist.get_rank() == 0:
    with open(os.environ["ORC_REPORT"], "a") as report:
        report.write(json.dumps({"val_loss": 1.0}) + "\\n")
    print(json.dumps([list(one.values()) for one in found]))
dist.destroy_process_group()
"""
    paths = sweeps.make(tmp_path, argv=(sys.executable, "-c", script), trials=1, nodes=2, ranks_per_node=2)
    with nodes(paths) as (first, second):
        code, said = ended(first)
        assert ended(second)[0] == 0
    assert code == 0, said
    assert '[["0", "0", "0", "0"], ["1", "1", "0", "0"], ["2", "0", "1", "1"], ["3", "1", "1", "1"]]' in said
    assert sweeps.counts(paths) == {"complete": 1}
    nothing_is_left(paths)


def test_two_trials_side_by_side_don_t_meet(tmp_path: Path) -> None:
    """Fault 26: of one job, at the same time, on the same nodes."""
    paths = pair(tmp_path / "runs", trials=4)
    with ExitStack() as stack:
        both = [stack.enter_context(sweeps.started(paths, "--slots", "2", env=seat(paths, node))) for node in (0, 1)]
        assert [ended(one)[0] for one in both] == [0, 0]
    assert results(paths) == alone(tmp_path, trials=4)
    nothing_is_left(paths)


# The connection


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@contextmanager
def listening(place: Path, num_nodes: int = 2, **options: Any) -> Iterator[RemoteNodes]:
    nodes = RemoteNodes(place, num_nodes=num_nodes, ranks_per_node=1, **options)
    nodes.open([socket.gethostname(), "127.0.0.1"])
    try:
        yield nodes
    finally:
        nodes.stop(grace_s=0.1, late_s=0.0)


def during(nodes: RemoteNodes, act: Callable[[], Channel | None]) -> Channel | OSError | OrcError | None:
    """What `act` comes to while the first node listens."""
    found: list[Channel | OSError | OrcError | None] = []

    def run() -> None:
        try:
            found.append(act())
        except (OSError, OrcError) as error:
            found.append(error)

    thread = Thread(target=run)
    thread.start()
    until(lambda: list(nodes.poll()) or not thread.is_alive())
    return found[0]


def port(place: Path) -> int:
    line = atomic.unchecked((place / "nodes").read_bytes().rstrip())
    assert line is not None
    return int(str(line["port"]))


def hello(key: str, node: int) -> bytes:
    import hmac

    proof = hmac.digest(key.encode(), f"other {node} salt".encode(), "sha256").hex()
    return atomic.checked({"node": node, "salt": "salt", "host": "x", "proof": proof})


@pytest.mark.parametrize(
    "words",
    [b"", b"GET / HTTP/1.0\r\n\r\n", b"x" * 100_000, b'{"node":1}\n', hello("0" * 64, 1), hello("é", 1) * 2],
)
def test_fault_26_a_stranger_is_hung_up_on_and_the_node_still_gets_in(place: Path, words: bytes) -> None:
    with listening(place) as nodes:

        def intrude() -> None:
            with socket.create_connection(("127.0.0.1", port(place))) as sock:
                sock.sendall(words)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(100):
                    raise AssertionError("a stranger was answered")

        assert not isinstance(during(nodes, intrude), OrcError)
        assert not nodes.ready
        joined(place, nodes).close()


def test_words_to_a_far_worker_and_from_it_arrive_in_order(place: Path) -> None:
    with listening(place) as nodes:
        line = during(nodes, lambda: call(place, 1, within_s=30))
        assert isinstance(line, Channel)
        nodes.send(WorkerId(0, 1), RankStarted(pid=3))
        nodes.tell("leave")
        nodes.kill(WorkerId(0, 1))
        said: list[object] = []
        until(lambda: said.extend(line.receive()) or len(said) == 4)
        assert said == [
            StartWorker(slot=0, rank=1), ToWorker(slot=0, rank=1, body=RankStarted(pid=3)),
            TellWorker(slot=0, rank=1, action="leave"), KillWorker(slot=0, rank=1),
        ]  # fmt: skip
        said_there = [FromWorker(slot=0, rank=1, body=Reported(step=number, metrics={})) for number in range(3)]
        for message in said_there:
            line.send(message)
        heard: list[object] = []
        until(lambda: heard.extend(nodes.poll()) or len(heard) == 3)
        assert heard == said_there
        line.close()


def joined(place: Path, nodes: RemoteNodes, node: int = 1) -> Channel:
    """The line of a node that has come and is ready."""
    line = during(nodes, lambda: call(place, node, within_s=30))
    assert isinstance(line, Channel)
    line.send(ImportDone())
    until(lambda: list(nodes.poll()) or f" {node}" not in nodes.missing().partition(":")[2])
    return line


def test_a_node_that_was_not_answered_in_time_comes_again(place: Path) -> None:
    with listening(place) as nodes:
        first = during(nodes, lambda: call(place, 1, within_s=30))
        assert isinstance(first, Channel)
        again = joined(place, nodes)
        assert nodes.ready
        first.close()
        assert not list(nodes.poll())
        again.close()


def test_who_is_hung_up_on_in_the_same_look_is_not_heard(place: Path) -> None:
    """A stranger's words and the last node's first come at once; so do a late answer and the node's second call."""
    with listening(place, num_nodes=3) as nodes, ExitStack() as stack:
        other = joined(place, nodes, 2)
        line = during(nodes, lambda: call(place, 1, within_s=30))
        assert isinstance(line, Channel)
        strangers = [stack.enter_context(socket.create_connection(("127.0.0.1", port(place)))) for _ in range(3)]
        for _ in strangers:
            list(nodes.poll())
        line.send(ImportDone())
        for one in strangers:
            one.sendall(b"words")
        stack.enter_context(socket.create_connection(("127.0.0.1", port(place))))
        until(lambda: list(nodes.poll()) or nodes.ready)
        assert list(nodes.poll()) == []
        line.close()
        other.close()


def test_a_node_that_hangs_up_before_it_is_ready_is_waited_for(place: Path) -> None:
    with listening(place) as nodes:
        line = during(nodes, lambda: call(place, 1, within_s=30))
        assert isinstance(line, Channel)
        line.close()
        until(lambda: list(nodes.poll()) or "not ready: 1" in nodes.missing())
        joined(place, nodes).close()


def test_a_node_that_gives_no_sign_of_life_is_lost(place: Path) -> None:
    clock = sweeps.Clock()
    with listening(place, silent_s=60.0, clock=clock) as nodes:
        line = joined(place, nodes)
        for _ in range(5):
            clock.now += 10_000.0  # this process was suspended, so who knows whether there was one
            nodes.check()
        line.send(Heartbeat())
        until(lambda: list(nodes.poll()) or not select.select([nodes], [], [], 0)[0])
        for _ in range(12):
            clock.now += 5.0
            nodes.check()
        clock.now += 5.0
        with pytest.raises(NodeLost, match=r"^node 1 \(.+\) of this job has given no sign of life for 65 s$"):
            nodes.check()
        line.close()


def test_a_node_that_comes_after_all_is_over_leaves(place: Path) -> None:
    folder = place / "meeting"
    folder.mkdir(mode=0o700)
    with listening(folder):
        pass
    assert call(folder, 1, within_s=30) is None


def test_strangers_that_say_nothing_are_turned_out_when_there_are_many(place: Path) -> None:
    with listening(place) as nodes, ExitStack() as stack:
        address = ("127.0.0.1", port(place))
        for _ in range(100):
            stack.enter_context(socket.create_connection(address))
            list(nodes.poll())
        joined(place, nodes).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


def test_a_node_comes_once_and_only_if_it_is_of_the_job(place: Path) -> None:
    with listening(place, num_nodes=3) as nodes:
        line = joined(place, nodes)
        for node in (1, 0, 3):
            refused = during(nodes, lambda node=node: call(place, node, within_s=0.2))  # type: ignore[misc]
            assert isinstance(refused, OrcError)
            assert f"node {node} of this job can't reach its first node within 0 s" in str(refused)
        line.close()


def test_what_an_earlier_run_has_published_is_passed_over(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        number = gone.getsockname()[1]
    atomic.write(
        place / "nodes", atomic.checked({"hosts": ["127.0.0.1"], "port": number, "key": secrets.token_hex(32)})
    )
    found: list[Channel] = []
    caller = Thread(target=lambda: found.append(call(place, 1, within_s=60)))
    caller.start()
    with listening(place) as nodes:
        until(lambda: list(nodes.poll()) or not caller.is_alive())
        assert found
        found[0].close()


@pytest.mark.parametrize("what", ["mode", "link", "text"])
def test_a_file_that_others_could_have_written_is_not_trusted(place: Path, what: str) -> None:
    file = place / "nodes"
    if what == "link":
        (place / "other").write_bytes(atomic.checked({"hosts": ["127.0.0.1"], "port": 1, "key": "k"}))
        file.symlink_to(place / "other")
    else:
        atomic.write(file, b"{}\n" if what == "text" else atomic.checked({"hosts": [], "port": 1, "key": "k"}))
        file.chmod(0o644 if what == "mode" else 0o600)
    with pytest.raises(OrcError, match="node 1 of this job can't reach its first node"):
        call(place, 1, within_s=0.0)


def test_the_first_node_is_known_by_what_srun_says_and_by_its_names() -> None:
    given = {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7", "SLURMD_NODENAME": "n7"}
    assert addresses(given) == ["10.0.0.7", "n7", socket.gethostname()]
    assert addresses({}) == [socket.gethostname()]
