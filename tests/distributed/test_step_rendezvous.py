"""Ranks meet those of their own step, and nobody else; what several of them reduce is what one process writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sweeps import clean_environment, names
from test_reduction import NUM, by_one, line, written

from orchestrator.core import atomic
from orchestrator.core.atomic import JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.core.slurm_env import StepTask
from orchestrator.distributed.rendezvous import RendezvousRequest
from orchestrator.results.records import Status

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}

# Imports torch once and forks the ranks of each case: each rank says in a line what became of it.
RANKS = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import torch
from orchestrator.core.slurm_env import StepTask
from orchestrator.distributed import rendezvous, step
from orchestrator.errors import OrcError
from orchestrator.core.paths import SweepPaths
rendezvous._CONNECT_S = 1.0

def meet(case, rank, world, timeout_s):
    seat = StepTask(rank=rank, world_size=world, num_nodes=1, name="7-0-0")
    if case == "misled" and rank == 1:
        read = rendezvous._read
        rendezvous._read = lambda call: (found := read(call)) and replace(found, nonce="0" * 32)
    if case == "impostor" and rank == 1:
        compare = rendezvous._compare
        rendezvous._compare = lambda group, nonce, whose: compare(group, "0" * 32, whose)
    try:
        with step.joined(SweepPaths(Path(sys.argv[1], case)), seat, timeout_s=timeout_s) as group:
            return {"sum": sum(map(int, group.all_gather(torch.tensor([rank]))))}
    except OrcError as error:
        return {"error": str(error)}

children = []
for case, (here, world, timeout_s) in json.loads(sys.argv[2]).items():
    for rank in range(here):
        if not (child := os.fork()):
            found = {"case": case, "rank": rank, **meet(case, rank, world, timeout_s)}
            os.write(1, json.dumps(found).encode() + b"\\n")
            os._exit(0)
        children.append(child)
for child in children:
    os.waitpid(child, 0)
"""

LEFT: dict[str, JsonObject | bytes] = {
    "empty": b"",
    "torn": b"{",
    "of a dead port": {"host": "127.0.0.1", "port": 1, "nonce": "ab"},
}
"""What an earlier run of the same name may have left."""
MEET: dict[str, tuple[int, int, float]] = {"alone": (1, 1, 60), "three": (3, 3, 60)} | dict.fromkeys(LEFT, (2, 2, 60.0))
PART: dict[str, tuple[int, int, float]] = {"misled": (2, 2, 5), "impostor": (2, 2, 5), "absent": (1, 2, 5)}
"""Ranks that there are, that are expected, and their limit in seconds, where it goes well and where it doesn't."""


def leave(paths: SweepPaths, data: JsonObject | bytes) -> None:
    """Have the ranks find this where rank 0 writes where they meet."""
    call = RendezvousRequest(folder=paths.rendezvous("7-0-0"), whose=f"step 7-0-0 of {paths.id}", rank=0, world_size=2)
    call.folder.mkdir(mode=0o700)
    call.file.write_bytes(data if isinstance(data, bytes) else atomic.checked({**data, "whose": call.whose}))
    call.file.chmod(0o600)


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    """What the ranks of each case came to."""
    folder = tmp_path_factory.mktemp("met")
    for case in MEET | PART:
        (folder / case).mkdir()
    for case, data in LEFT.items():
        leave(SweepPaths(folder / case), data)
    argv = [sys.executable, "-P", "-c", RANKS, str(folder), json.dumps(MEET | PART)]
    done = subprocess.run(argv, env=clean_environment(), capture_output=True, text=True, timeout=120, check=True)
    assert [names(folder / case) for case in MEET | PART] == [[] for _ in MEET | PART], "no file is left"
    found: dict[str, list[dict[str, object]]] = {case: [] for case in MEET | PART}
    for each in map(json.loads, done.stdout.splitlines()):
        found[each.pop("case")].append(each)
    return found


@pytest.mark.parametrize("case", MEET)
def test_all_ranks_meet_whatever_an_earlier_run_has_left(case: str, met: dict[str, list[dict[str, object]]]) -> None:
    world = MEET[case][1]
    found = sorted((each["rank"], each.get("sum", each)) for each in met[case])
    assert found == [(rank, world * (world - 1) // 2) for rank in range(world)]


@pytest.mark.parametrize("case", PART)
def test_ranks_that_are_not_of_one_step_end_with_an_error(case: str, met: dict[str, list[dict[str, object]]]) -> None:
    texts = {each["rank"]: str(each.get("error")) for each in met[case]}
    assert len(texts) == PART[case][0]
    assert all(f"rank {rank} of 2: the ranks did not meet within 5 s" in text for rank, text in texts.items())
    assert all("a process of another job" in text for text in texts.values()) == (case == "impostor")


def test_a_seat_is_read_from_slurm_s_variables() -> None:
    env = STEP | {"SLURM_PROCID": "3", "SLURM_RESTART_COUNT": "2"}
    assert StepTask.of(env) == StepTask(rank=3, world_size=4, num_nodes=1, name="7-2-0")
    assert StepTask.of({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) == StepTask(
        rank=0, world_size=1, num_nodes=1, name="alone"
    )
    assert replace(StepTask.of(env), rank=0) == StepTask.of({**env, "SLURM_PROCID": "0"})


# The reducer of several ranks


def ranks(paths: SweepPaths, world: int, **more: str) -> tuple[list[int], list[str]]:
    """Exit codes of the ranks, and what they said."""
    argv = [
        sys.executable,
        "-P",
        "-m",
        "orchestrator.worker.reducer_ranks",
        "--dir",
        str(paths.root),
        "--submission",
        "s" * 32,
    ]
    env = {**clean_environment(), **STEP, "SLURM_STEP_NUM_TASKS": str(world), "OMP_NUM_THREADS": "1", **more}
    each = [
        subprocess.Popen(argv, env={**env, "SLURM_PROCID": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    said = [one.communicate(timeout=120)[1] for one in each]
    return [one.returncode for one in each], said


def test_four_ranks_write_the_bytes_of_one_process_and_the_first_says_what_failed(tmp_path: Path) -> None:
    lines = [line(trial, value) for trial in range(1, NUM) for value in (0.1 * trial, 0.1 * trial)]
    failed = line(0, status=Status.FAILED)
    paths = written(tmp_path, [lines[:9], [failed, *lines[9:]], [line(3, 7.0, attempt=1), line(4, 1e300)]])
    expected = by_one(paths)
    codes, said = ranks(paths, 4)
    assert paths.summary.read_bytes() == expected
    assert codes == [4, 0, 0, 0]
    assert f"orc status {paths.id}" in said[0]
    assert said[1:] == [""] * 3


def test_without_torch_one_rank_does_it_all(tmp_path: Path) -> None:
    paths = written(tmp_path, [[line(trial) for trial in range(NUM)], [], []])
    expected = by_one(paths)
    (tmp_path / "site").mkdir()
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a)"
    (tmp_path / "site" / "sitecustomize.py").write_text(hide)
    assert ranks(paths, 2, PYTHONPATH=str(tmp_path / "site"))[0] == [0, 0]
    assert paths.summary.read_bytes() == expected
