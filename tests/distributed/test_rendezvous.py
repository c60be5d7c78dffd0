"""Ranks meet those of their own work and nobody else; and they part, leaving nothing behind."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crew import LIMIT_S, call, crew, together
from sweeps import names, until

from orchestrator.core import atomic
from orchestrator.distributed.rendezvous import LOOPBACK, Foreign, RankContext, RendezvousFailed, RendezvousRequest, met

WAIT_S = 2.0
"""How long ranks wait for those that never come; enough to start all that do."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of this user alone."""
    folder = tmp_path / "place"
    folder.mkdir(mode=0o700)
    return folder


def total(party: RankContext) -> tuple[int, int]:
    """The sum of all ranks, by both groups."""
    found = []
    for group in (party.main, party.group.process_group):
        one = torch.tensor([party.rank])
        dist.all_reduce(one, group=group)
        found.append(int(one))
    return found[0], found[1]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_meet_and_leave_no_file(place: Path, world_size: int) -> None:
    expected = sum(range(world_size))
    assert together(place, world_size, total) == [(expected, expected)] * world_size
    assert names(place) == []


def test_one_alone_needs_nobody(tmp_path: Path) -> None:
    with met(call(tmp_path / "nowhere", 0, 1)) as party:
        assert (party.rank, party.world_size, party.main, party.roll) == (0, 1, None, None)


def listening(party: RankContext) -> list[str]:
    """The addresses, as the kernel writes them, at which this process listens."""
    own = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_socket()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]


def test_on_one_machine_nothing_listens_to_the_network(place: Path) -> None:
    found = together(place, 2, listening)
    assert {address for rank in found for address in rank} == {"0100007F"}


def environment(party: RankContext) -> str | None:
    return os.environ.get("GLOO_SOCKET_IFNAME")


def test_the_environment_is_as_it_was(place: Path) -> None:
    assert together(place, 2, environment) == [os.environ.get("GLOO_SOCKET_IFNAME")] * 2


@pytest.mark.parametrize(
    "left", [b"", b"{}\n", atomic.checked({"host": LOOPBACK, "port": 1, "nonce": "ab", "whose": "x"})]
)
def test_what_something_else_left_there_misleads_nobody(place: Path, left: bytes) -> None:
    file = call(place, 0, 2).file
    file.write_bytes(left)
    file.chmod(0o600)
    assert together(place, 2, total) == [(1, 1), (1, 1)]


def test_who_does_not_come_is_named(place: Path) -> None:
    with crew([call(place, rank, 4, join_s=WAIT_S) for rank in (0, 2)], total) as ranks:
        for rank, found in zip((0, 2), [one.end() for one in ranks], strict=True):
            assert found.startswith(f"RendezvousFailed: rank {rank} (pid ")
            assert found.endswith("of 4 ranks, not all came within 2 s; missing: 1, 3")
    assert names(place) == []


def test_without_rank_0_the_others_say_what_they_wait_for(place: Path) -> None:
    with crew([call(place, 1, 2, join_s=0.2)], total) as ranks:
        found = ranks[0].end()
    assert "rank 1 of 2: trial 3, attempt 0, of small-1a2b: rank 0 has not said within 0.2 s where to meet" in found
    assert str(call(place, 1, 2).file) in found


def test_a_rank_that_was_started_twice_is_refused_once(place: Path) -> None:
    calls = [call(place, rank, 3, join_s=WAIT_S) for rank in (0, 1, 1)]
    with crew(calls, total) as ranks:
        found = [rank.end() for rank in ranks]
    assert sum("another process has come as rank 1 already" in text for text in found) == 1
    assert sum("missing: 2" in text for text in found) == 2


# Whom to trust


@pytest.mark.parametrize("mode", [0o770, 0o701, 0o777])
def test_ranks_meet_where_nobody_else_can_enter(place: Path, mode: int) -> None:
    place.chmod(mode)
    with pytest.raises(RendezvousFailed, match=rf"{place}: .* mode {mode:04o}"), met(call(place, 0, 2)):
        pass


def test_a_folder_that_is_not_there_or_is_a_link_is_refused(place: Path) -> None:
    link = place / "link"
    link.symlink_to(place)
    for folder in (place / "none", link):
        with pytest.raises(RendezvousFailed, match=f"^{folder}: "), met(call(folder, 0, 2)):
            pass


def test_a_file_that_others_may_write_is_not_believed(place: Path) -> None:
    mine = call(place, 1, 2, join_s=1.0)
    mine.file.write_bytes(b"{}\n")
    mine.file.chmod(0o620)
    with pytest.raises(RendezvousFailed, match="is not a file of this user alone"), met(mine):
        pass


def test_the_file_is_its_owners_alone_while_it_is_there(place: Path) -> None:
    mine = call(place, 0, 2, join_s=WAIT_S)
    with crew([mine], total) as ranks:
        until(mine.file.exists)
        about = mine.file.stat()
        assert (about.st_mode & 0o777, about.st_uid) == (0o600, os.geteuid())
        ranks[0].end()


# Fault 26


def forged(to: RendezvousRequest, theirs: dict[str, Any], **changed: Any) -> None:
    """Have the ranks of `to` find what another job wrote, with changes."""
    to.file.write_bytes(atomic.checked({**theirs, "whose": to.whose, **changed}))
    to.file.chmod(0o600)


def published(by: RendezvousRequest) -> dict[str, Any]:
    until(by.file.exists)
    found = atomic.unchecked(by.file.read_bytes().removesuffix(b"\n"))
    assert found is not None
    return found


def test_fault_26_a_rank_that_was_given_another_job_s_port_is_refused_and_that_job_goes_on(place: Path) -> None:
    ours = [call(place, rank, 2) for rank in range(2)]
    theirs = call(place, 1, 2, whose="trial 9, attempt 0, of other-77", join_s=WAIT_S)
    with crew(ours[:1], total) as first:
        forged(theirs, published(ours[0]), nonce="0" * 32)
        with crew([theirs], total) as led_astray:
            found = led_astray[0].end()
        assert found.startswith(
            f"{Foreign.__name__}: rank 1 of 2: trial 9, attempt 0, of other-77: who answers at 127.0"
        )
        with crew(ours[1:], total) as second:
            assert [second[0].end(), first[0].end()] == [(1, 1), (1, 1)]


def test_fault_26_a_rank_of_other_work_that_knows_the_nonce_is_found_by_comparison(place: Path) -> None:
    ours = call(place, 0, 2)
    theirs = call(place, 1, 2, whose="trial 9, attempt 0, of other-77")
    with crew([ours], total) as first:
        forged(theirs, published(ours))
        with crew([theirs], total) as second:
            found = [first[0].end(), second[0].end()]
    for text in found:
        assert text.startswith(f"{Foreign.__name__}: ranks of different work have met, and part: rank 0 is of trial 3")
        assert "rank 1 is of trial 9, attempt 0, of other-77" in text


def intrude(port: int) -> str:
    """As rank 1 of a program that asks a store by its port alone, as `env://` does."""
    found = dist.TCPStore(LOOPBACK, port, 2, is_master=False, timeout=timedelta(seconds=1), wait_for_workers=False)
    try:
        dist.init_process_group("gloo", store=found, rank=1, world_size=2, timeout=timedelta(seconds=1))
    except (RuntimeError, dist.DistError):
        return "never met"
    return "met"


def intruder(party: RankContext, port: int) -> str:
    return intrude(port)


def test_fault_26_a_program_of_another_kind_meets_nobody(place: Path) -> None:
    ours = [call(place, rank, 2) for rank in range(2)]
    with crew(ours[:1], total) as first:
        port = published(ours[0])["port"]
        with crew([call(place, 0, 1)], intruder, port) as other:
            assert other[0].end() == "never met"
        with crew(ours[1:], total) as second:
            assert [second[0].end(), first[0].end()] == [(1, 1), (1, 1)]


def test_fault_26_two_trials_that_share_a_folder_do_not_meet(place: Path) -> None:
    calls = [
        call(place, rank, 2, whose=whose) for rank in range(2) for whose in ("trial 1 of job 7", "trial 2 of job 7")
    ]
    with crew(calls, total) as ranks:
        assert [rank.end() for rank in ranks] == [(1, 1)] * 4
    assert names(place) == []


def test_a_port_where_nobody_answers_ends_in_time(place: Path) -> None:
    mine = call(place, 1, 2, join_s=1.0)
    with socket.create_server((LOOPBACK, 0)) as silent:
        forged(mine, {"host": LOOPBACK, "port": silent.getsockname()[1], "nonce": "0" * 32})
        began = time.monotonic()
        with crew([mine], total) as ranks:
            assert ranks[0].end().startswith("RendezvousFailed: rank 1 of 2: trial 3")
        assert time.monotonic() - began < LIMIT_S / 2
