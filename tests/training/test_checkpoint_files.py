"""Checkpoint files: whole and verified, or refused with the reason; the newest good one counts."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killpoints import kill_everywhere
from sweeps import names, no_room_after

from orchestrator.core import atomic
from orchestrator.errors import OrcError
from orchestrator.training.checkpoint import files as checkpoint
from orchestrator.training.checkpoint.files import CheckpointError, Checkpoints, Gone, Identity, Refused, read
from orchestrator.training.checkpoint.serialization import encode, pack

ME, OTHER, THIRD = "1" * 32, "2" * 32, "3" * 32
IDENTITY = Identity(sweep="s-1", trial=3, world_size=2)


def state(number: int = 0, size: int = 4) -> dict[str, Any]:
    return {"number": number, "weights": torch.full((size,), float(number))}


def folder(tmp_path: Path, writer: str = ME, said: list[str] | None = None, **more: Any) -> Checkpoints:
    return Checkpoints(tmp_path / "3", IDENTITY, writer, say=[].append if said is None else said.append, **more)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, pack(state(step)))


def number_of(found: checkpoint.Checkpoint | None) -> int | None:
    return None if found is None else found.state["number"]  # type: ignore[index]


def forged(body: bytes, version: int = 1) -> bytes:
    """A file around `body` whose header is right."""
    return b"orc-checkpoint %d %d %b\n" % (version, len(body), hashlib.sha256(body).hexdigest().encode()) + body


def about(**changes: Any) -> dict[str, str]:
    told = {"identity": {"sweep": "s-1", "trial": 3, "world_size": 2}, "step": 5, "writer": ME, "versions": {}}
    return {"orchestrator": orjson.dumps({**told, **changes}).decode()}


# Saving and finding


def test_what_is_saved_is_found(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    assert checkpoints.newest() is None
    path = checkpoints.save(7, pack(state(7)))
    assert path == tmp_path / "3" / f"000000000007-{ME}.ckpt"
    found = folder(tmp_path, OTHER).newest()
    assert found is not None
    assert (found.step, found.writer, found.identity) == (7, ME, IDENTITY)
    assert torch.equal(found.state["weights"], torch.full((4,), 7.0))  # type: ignore[index]
    assert found.versions["torch"] == torch.__version__
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("size", [0, 1, 2**18 - 1, 2**18, 2**18 + 1])
def test_sizes_around_a_piece_are_whole(tmp_path: Path, size: int) -> None:
    folder(tmp_path).save(1, pack(state(1, size)))
    found = folder(tmp_path).newest()
    assert found is not None
    assert found.state["weights"].numel() == size  # type: ignore[index]


def test_the_highest_step_counts_and_no_clock_does(tmp_path: Path) -> None:
    save(folder(tmp_path), 999_999_999_999)
    save(folder(tmp_path, OTHER), 1_000_000_000_000, 5)
    for age, path in enumerate(folder(tmp_path).files()):
        os.utime(path, (1e9 - age, 1e9 + age))
    assert number_of(folder(tmp_path).newest()) == 1_000_000_000_000


def test_of_one_step_the_greater_writer_counts_everywhere(tmp_path: Path) -> None:
    for writer in (OTHER, THIRD, ME):
        save(folder(tmp_path, writer), 5)
    found = folder(tmp_path).newest()
    assert found is not None
    assert found.writer == THIRD


def test_two_are_kept_and_one_step_may_be_saved_twice(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 1, 2, 3, 3)
    assert [path.name[:12] for path in checkpoints.files()] == ["000000000003", "000000000002"]
    assert names(tmp_path / "3") == sorted(path.name for path in checkpoints.files())


def test_an_older_one_stays_until_the_newer_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = folder(tmp_path, keep=1)
    save(checkpoints, 1)
    there: list[list[str]] = []
    real = atomic.sync_folder
    monkeypatch.setattr(atomic, "sync_folder", lambda path: there.append(names(path)) or real(path))
    save(checkpoints, 2)
    assert [len(found) for found in there] == [2]
    assert len(checkpoints.files()) == 1


def test_two_live_copies_of_a_trial_leave_each_other_what_they_need(tmp_path: Path) -> None:
    ahead, behind = folder(tmp_path, OTHER), folder(tmp_path)
    save(behind, 10, 20)
    save(ahead, 100, 110)
    save(behind, 30, 40)
    assert {30, 40, 100, 110} >= {int(path.name[:12]) for path in behind.files()} >= {40, 100, 110}
    assert number_of(folder(tmp_path, THIRD).newest()) == 110


def test_one_that_was_refused_keeps_no_good_one_out(tmp_path: Path) -> None:
    save(folder(tmp_path, OTHER), 10, 20)
    folder(tmp_path).files()[0].write_bytes(b"")
    again = folder(tmp_path)
    assert number_of(again.newest()) == 10
    save(again, 15)
    assert number_of(folder(tmp_path).newest()) == 15
    save(again, 25, 35)
    assert [int(path.name[:12]) for path in again.files()] == [35, 25]


def test_what_dead_writers_left_half_written_goes_when_that_is_safe(tmp_path: Path) -> None:
    save(folder(tmp_path), 1)
    lefts = {writer: tmp_path / "3" / f".{9:012d}-{writer}.ckpt.{'a' * 12}" for writer in (OTHER, THIRD)}
    foreign = tmp_path / "3" / f".notes.txt.{'b' * 12}"
    for path in (*lefts.values(), foreign):
        path.write_bytes(b"half")
    checkpoints = folder(tmp_path, is_gone=lambda writer: writer == OTHER)
    save(checkpoints, 2)
    assert [path.exists() for path in lefts.values()] == [False, True]
    save(checkpoints, 10, 11)
    assert [path.exists() for path in lefts.values()] == [False, False]
    assert foreign.exists()


# When it can't be written


def test_a_folder_that_has_vanished_says_that_the_trial_is_finished(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 1)
    shutil.rmtree(tmp_path / "3")
    with pytest.raises(Gone, match="someone else has finished this trial"):
        save(checkpoints, 2)
    assert not (tmp_path / "3").exists()


def test_one_that_goes_while_it_is_written_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    checkpoints = folder(tmp_path, said=said)
    save(checkpoints, 1)

    def gone(*_: object, **__: object) -> None:
        raise OrcError("can't be written") from FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr(atomic, "write_lines", gone)
    assert checkpoints.save(2, pack(state())) is None
    assert "another copy of this trial is ahead" in said[0]


def test_fault_18_a_full_disk_leaves_the_old_checkpoint_and_names_the_path(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 1, 2)
    before = {path: path.read_bytes() for path in checkpoints.files()}
    for room in (0, 100, 40_000, 2_000_000):
        with (
            no_room_after(room),
            pytest.raises(OrcError, match=rf"/3/000000000003-{ME}\.ckpt: can't be written: File too"),
        ):
            checkpoints.save(3, pack(state(3, 10**6)))
        assert {path: path.read_bytes() for path in (tmp_path / "3").iterdir()} == before
    save(checkpoints, 3)
    assert number_of(folder(tmp_path).newest()) == 3


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "3").write_text("in the way")
    with pytest.raises(CheckpointError, match="/3: can't be made: File exists"):
        save(folder(tmp_path), 1)


# Faults


def damaged(data: bytes) -> dict[str, bytes]:
    """`data` with every damage that a disk does: a bit, the end, all of it, a part, a part of zeros, too much."""
    positions = [*range(110), *range(110, len(data), 7), len(data) - 1]
    flips = {f"bit of {at}": data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :] for at in positions}
    cuts = {f"cut at {at}": data[:at] for at in range(0, len(data), 13)}
    holes = {f"hole at {at}": data[:at] + data[at + 8 :] for at in range(0, len(data), 31)}
    zeros = {"zeros": data[:-64] + bytes(64), "all zeros": bytes(len(data)), "more": data + b"\0"}
    return flips | cuts | holes | zeros


def test_fault_19_a_corrupt_newest_checkpoint_is_passed_over_and_that_is_said(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    checkpoints.save(1, pack(state(1)))
    path = checkpoints.save(2, pack({"number": 2, "weights": torch.randn(9)}))
    assert path is not None
    for damage, data in damaged(path.read_bytes()).items():
        path.write_bytes(data)
        said: list[str] = []
        found = folder(tmp_path, OTHER, said).newest()
        assert (number_of(found), len(said)) == (1, 1), damage
        assert str(path) in said[0]
        assert "refused" in said[0]


def test_when_all_are_corrupt_there_is_none(tmp_path: Path) -> None:
    save(folder(tmp_path), 1, 2)
    for path in folder(tmp_path).files():
        path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    assert folder(tmp_path, said=said).newest() is None
    assert len(said) == 2


SAVES = """
import sys, torch
from pathlib import Path
from orchestrator.training.checkpoint.files import Checkpoints, Identity
from orchestrator.training.checkpoint.serialization import pack
identity = Identity(sweep="s-1", trial=3, world_size=2)
torch.set_num_threads(1)
weights = torch.empty(200_000)
for attempt, line in enumerate(sys.stdin):
    seconds, first = line.split()
    import os, signal
    child = os.fork()
    if child == 0:
        checkpoints = Checkpoints(Path(sys.argv[1]), identity, f"{attempt:032x}")
        step = int(first)
        while True:
            step += 1
            checkpoints.save(step, pack({"number": step, "weights": weights.fill_(step)}))
            os.write(1, b"%d\\n" % step)
    import time
    time.sleep(float(seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def test_fault_20_killed_while_saving_the_newest_complete_checkpoint_is_used(tmp_path: Path) -> None:
    # One process that forks the ones to be killed: torch is imported once.
    argv = [sys.executable, "-c", SAVES, str(tmp_path / "3")]
    chance, newest, killed_in = random.Random(4), 0, 0
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(25):
            process.stdin.write(f"{chance.uniform(0.002, 0.05)} {newest}\n")
            process.stdin.flush()
            told = list(iter(process.stdout.readline, "dead\n"))
            newest = int(told[-1]) if told else newest
            found = folder(tmp_path).newest()
            assert found is not None or not newest
            at = number_of(found) or 0
            assert at in (newest, newest + 1)  # durable before it could be told
            assert found is None or bool((found.state["weights"] == at).all())  # type: ignore[index]
            killed_in += bool((tmp_path / "3").exists() and atomic.temporaries(tmp_path / "3"))
            newest = at
        process.stdin.close()
    assert killed_in
    save(folder(tmp_path, is_gone=lambda writer: True), newest + 1)
    assert names(tmp_path / "3") == sorted(path.name for path in folder(tmp_path).files())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("first", [True, False])
def test_fault_16_a_kill_at_any_call_of_a_save_leaves_the_old_or_the_new(tmp_path: Path, *, first: bool) -> None:
    before = 0 if first else 2
    for kill in kill_everywhere(lambda: save(folder(tmp_path, keep=1), 3)):
        shutil.rmtree(tmp_path / "3", ignore_errors=True)
        save(folder(tmp_path, OTHER), *range(1, before + 1))
        kill()
        said: list[str] = []
        assert (number_of(folder(tmp_path, said=said).newest()) or 0) in (before, 3)
        assert said == []
    assert number_of(folder(tmp_path).newest()) == 3
    assert kill.number >= 8


class Bomb:
    """Unpickled, it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_fault_29_a_malicious_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    payload = pickle.dumps(Bomb(mark))
    torch.save({"net": Bomb(mark)}, tmp_path / "saved.pt")
    safetensors = b"".join(encode(pack({"net": payload}), {**about(), "extra": payload.hex()}))
    files = [
        payload,
        (tmp_path / "saved.pt").read_bytes(),
        forged(payload),
        forged((tmp_path / "saved.pt").read_bytes()),
    ]
    save(folder(tmp_path), 1)
    for data in (*files, forged(safetensors)[:-1]):
        (tmp_path / "3" / f"{5:012d}-{ME}.ckpt").write_bytes(data)
        said: list[str] = []
        assert number_of(folder(tmp_path, said=said).newest()) == 1
        assert len(said) == 1
    # Bytes of a pickle inside a good file are bytes.
    (tmp_path / "3" / f"{5:012d}-{ME}.ckpt").write_bytes(forged(safetensors))
    found = folder(tmp_path).newest()
    assert found is not None
    assert found.state == {"net": payload}
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists()


@pytest.mark.parametrize(
    ("body", "version", "reason"),
    [
        (b"x", 2, "it is of version 2 of the format, and this is version 1"),
        (b"x", 1, "its body is no state of ours"),
        ((2**40).to_bytes(8, "little") + b"{}", 1, "its body is no state of ours"),
        (b"".join(encode(pack(1), {})), 1, "'orchestrator'"),
        (b"".join(encode(pack(1), about(step="5"))), 1, "it doesn't say which step it is of"),
        (b"".join(encode(pack(1), about(identity=[]))), 1, "it doesn't say whose it is"),
        (b"".join(encode(pack(1), about(identity={"sweep": "s-1", "shell": "rm"}))), 1, "shell"),
        (b"".join(encode(pack(1), about(step=6))), 1, f"it was written as 000000000006-{ME}.ckpt"),
        (b"".join(encode(pack(1), about(writer="../../x"))), 1, "it was written as"),
        (b"".join(encode(pack(1), about(identity={"sweep": "s-2", "trial": 3}))), 1, "of sweep 's-2', not of 's-1'"),
        (b"".join(encode(pack(1), about(identity={"sweep": "s-1", "trial": 4}))), 1, "of trial 4, not of trial 3"),
    ],
)
def test_a_file_of_another_kind_or_of_others_is_refused(tmp_path: Path, body: bytes, version: int, reason: str) -> None:
    save(folder(tmp_path), 1)
    (tmp_path / "3" / f"{5:012d}-{ME}.ckpt").write_bytes(forged(body, version))
    said: list[str] = []
    assert number_of(folder(tmp_path, said=said).newest()) == 1
    assert reason in said[0]


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    save(folder(tmp_path), 1)
    good = folder(tmp_path).files()[0]
    path = [tmp_path / "3" / f"{5 + i:012d}-{ME}.ckpt" for i in range(4)]
    path[0].mkdir()
    os.mkfifo(path[1])
    path[2].symlink_to(good)
    path[3].symlink_to("/dev/zero")
    said: list[str] = []
    checkpoints = folder(tmp_path, said=said)
    assert number_of(checkpoints.newest()) == 1
    assert [line.rpartition(": ")[2] for line in said] == ["it is a symbolic link"] * 2 + ["it is no regular file"] * 2
    save(checkpoints, 20, 30)
    assert good.name not in names(tmp_path / "3")


def test_a_size_that_is_only_claimed_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"orc-checkpoint 1 99999999999999999 " + b"0" * 64 + b"\nx")
    with pytest.raises(Refused, match=r"it has 101 bytes, and should have 100000000000000099"):
        read(path)


@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused_with_a_reason(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    for file in (data, forged(data)):
        path.write_bytes(file)
        with pytest.raises(Refused):
            read(path)


def test_another_number_of_ranks_is_refused_with_the_remedy(tmp_path: Path) -> None:
    save(folder(tmp_path), 1)
    alone = Checkpoints(tmp_path / "3", Identity(sweep="s-1", trial=3), ME)
    with pytest.raises(CheckpointError, match=r"is of 2 ranks and can't be resumed with 1.*: resume with 2 ranks"):
        alone.newest()
    alone.save(1, pack(state(8)))
    assert number_of(alone.newest()) == 8


def test_other_versions_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder(tmp_path), 1)
    monkeypatch.setattr(checkpoint, "versions", lambda: {"torch": "99.0"})
    said: list[str] = []
    assert number_of(folder(tmp_path, said=said).newest()) == 1
    assert f"was written with torch {torch.__version__}, this is 99.0" in said[0]


def test_one_that_goes_between_listing_and_reading_is_looked_for_again(tmp_path: Path) -> None:
    save(folder(tmp_path), 1)
    checkpoints, other = folder(tmp_path, OTHER), folder(tmp_path)
    stale = [checkpoints.files(), None]
    other.save(5, pack(state(5)))
    other.save(6, pack(state(6)))
    listing = checkpoints.files
    checkpoints.files = lambda: stale.pop(0) or listing()  # type: ignore[method-assign]
    assert number_of(checkpoints.newest()) == 6
