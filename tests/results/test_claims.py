"""Claims: exclusive among real processes, and honoured while their holder shows signs of life."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeps import Clock

from orchestrator.core.paths import SweepPaths
from orchestrator.results.claims import Block, Claims, WriterWatch


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    found = SweepPaths(tmp_path)
    found.claims.mkdir()
    found.records.mkdir()
    return found


@given(st.integers(0, 200), st.integers(1, 50))
def test_blocks_hold_every_trial_once(num_trials: int, size: int) -> None:
    blocks = Block.all(num_trials, size)
    assert [trial for block in blocks for trial in block.trials] == list(range(num_trials))
    assert all(len(block.trials) == size for block in blocks[:-1])


def test_a_block_is_claimed_once_an_epoch(paths: SweepPaths) -> None:
    ours, theirs, block = Claims(paths, "ours"), Claims(paths, "theirs"), Block(0, 9)
    assert ours.take(block, 0)
    assert not theirs.take(block, 0)
    assert theirs.take(block, 1)
    assert (ours.holder(block, 0), ours.holder(block, 1)) == ("ours", "theirs")
    assert ours.newest() == {(0, 9): 1}


def test_the_listing_ignores_what_is_no_claim(paths: SweepPaths) -> None:
    Claims(paths, "ours").take(Block(10, 19), 2)
    for name in (".0-9.0.abcdef", "notes", "0-9", "a-b.0", "0-9.x", "-.0"):
        (paths.claims / name).touch()
    assert Claims(paths, "ours").newest() == {(10, 19): 2}


def test_the_holder_of_a_claim_that_is_not_visible_is_nobody(paths: SweepPaths) -> None:
    assert Claims(paths, "ours").holder(Block(0, 9), 0) == ""


RACE = """
import sys, time
from pathlib import Path
from orchestrator.results.claims import Block, Claims
from orchestrator.core.paths import SweepPaths
paths, writer = SweepPaths(Path(sys.argv[1])), sys.argv[2]
claims = Claims(paths, writer)
print("ready", flush=True)
sys.stdin.readline()
print(*[block.first for block in Block.all(200, 1) if claims.take(block, 0)])
"""


def test_no_block_has_two_owners_when_processes_race(paths: SweepPaths) -> None:
    argv = [sys.executable, "-c", RACE, str(paths.root)]
    racers = [
        subprocess.Popen([*argv, f"w{i}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for i in range(4)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = {f"w{i}": list(map(int, racer.communicate(timeout=60)[0].split())) for i, racer in enumerate(racers)}
    assert sorted(block for blocks in won.values() for block in blocks) == list(range(200))
    assert all(paths.claim(i, i, 0).read_text() == writer for writer, blocks in won.items() for i in blocks)
    assert len(list(paths.claims.iterdir())) == 200


# Silence


def test_silence_counts_from_the_first_look(paths: SweepPaths) -> None:
    clock = Clock()
    growth = WriterWatch(paths, 10.0, clock=clock)
    paths.record("w").write_bytes(b"1")
    clock.now = 1000.0
    assert not growth.silent("w")
    clock.now = 1009.9
    assert not growth.silent("w")
    clock.now = 1010.0
    assert growth.silent("w")


def test_growth_starts_the_time_anew(paths: SweepPaths) -> None:
    clock = Clock()
    growth = WriterWatch(paths, 10.0, clock=clock)
    paths.record("w").write_bytes(b"1")
    growth.silent("w")
    paths.record("w").write_bytes(b"12")
    clock.now = 10.0
    assert not growth.silent("w")
    clock.now = 20.0
    assert growth.silent("w")


def test_a_writer_that_was_never_seen_gets_its_lease_too(paths: SweepPaths) -> None:
    clock = Clock()
    growth = WriterWatch(paths, 10.0, clock=clock)
    assert not growth.silent("nobody")
    clock.now = 10.0
    assert growth.silent("nobody")


def test_a_look_starts_the_time_of_every_writer(paths: SweepPaths) -> None:
    clock = Clock()
    growth = WriterWatch(paths, 10.0, clock=clock)
    one, other = "a" * 32, "b" * 32
    paths.record(one).touch()
    growth.look()
    clock.now = 10.0
    assert growth.silent(one)
    assert not growth.silent(other)


def test_a_look_passes_over_what_is_no_record_file(paths: SweepPaths) -> None:
    clock, odd = Clock(), ("notes", "A" * 32, "a" * 31)
    growth = WriterWatch(paths, 10.0, clock=clock)
    for name in odd:
        paths.record(name).touch()
    paths.record("c" * 32).symlink_to(paths.record("notes"))
    paths.record("d" * 32).mkdir()
    growth.look()
    clock.now = 10.0
    assert not any(growth.silent(name) for name in (*odd, "c" * 32, "d" * 32)), "their time begins only now"


def test_a_file_time_means_nothing(paths: SweepPaths) -> None:
    clock = Clock()
    growth = WriterWatch(paths, 10.0, clock=clock)
    paths.record("w").touch()
    os.utime(paths.record("w"), (0, 0))
    assert not growth.silent("w")
    clock.now = 10.0
    os.utime(paths.record("w"), (2**31, 2**31))
    assert growth.silent("w")
