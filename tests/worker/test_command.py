"""Commands: W&B's macros as arguments, never as shell text; code from the snapshot; checkpoints whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import sweeps
from hypothesis import given
from hypothesis import strategies as st
from sweeps import HALF

from orchestrator.config import snapshot
from orchestrator.config.spec import Metric
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import ProgramError
from orchestrator.worker import command
from orchestrator.worker.command import checkpoint_folder, expand, flat, from_snapshot, snapshot_first
from orchestrator.worker.command_reports import forget, joined, new_file, said_before

PARAMS: JsonObject = {"lr": 0.1, "name": "a b", "fast": True, "slow": False, "opt": {"beta": [1, 2], "eps": None}}
FILE = Path("/scratch/params.json")


def expanded(*command: str, params: JsonObject = PARAMS) -> list[str]:
    return expand(command, params, params_file=FILE, environment={"MINE": "${args_json}"})


@pytest.mark.parametrize(
    ("macro", "found"),
    [
        (
            "${args}",
            ["--lr=0.1", "--name=a b", "--fast=true", "--slow=false", "--opt.beta=[1, 2]", "--opt.eps=null"],
        ),
        ("${args_no_hyphens}", ["lr=0.1", "name=a b", "fast=true", "slow=false", "opt.beta=[1, 2]", "opt.eps=null"]),
        ("${args_no_boolean_flags}", ["--lr=0.1", "--name=a b", "--fast", "--opt.beta=[1, 2]", "--opt.eps=null"]),
        ("${args_json_file}", [str(FILE)]),
        ("--config=${args_json_file}", [f"--config={FILE}"]),
        ("${interpreter}", [sys.executable]),
        ("${env}", ["/usr/bin/env"]),
        ("${unknown}", ["${unknown}"]),
        ("plain", ["plain"]),
    ],
)
def test_macros(macro: str, found: list[str]) -> None:
    assert expanded("first", macro) == ["first", *found]


def test_the_whole_set_is_one_json_argument() -> None:
    (argument,) = expanded("${args_json}")
    assert json.loads(argument) == PARAMS


def test_variables_are_read_where_the_worker_runs() -> None:
    assert expanded("${envvar:MINE}/x") == ["${args_json}/x"]


def test_a_variable_that_is_not_there_is_named_with_the_remedy() -> None:
    with pytest.raises(ProgramError, match=r"\$\{envvar:NONE\}: .* give NONE under env: in the sweep file"):
        expanded("[${envvar:NONE}]")


@given(st.text(st.sampled_from("${}args_json:envvrpogm\n'\"` -;"), max_size=30))
def test_a_value_is_never_expanded_again(value: str) -> None:
    params: JsonObject = {"x": value}
    assert expanded("${args}", params=params) == [f"--x={value}"]
    (argument,) = expanded("${args_json}", params=params)
    assert json.loads(argument) == params


@given(st.dictionaries(st.text(st.characters(categories=["Ll"]), min_size=1), st.integers() | st.lists(st.integers())))
def test_flat_parameters_keep_their_paths(inner: dict[str, Json]) -> None:
    assert dict(flat({"a": 1, "b": inner})) == {"a": 1, **{f"b.{name}": value for name, value in inner.items()}}


def test_the_first_attempt_has_an_empty_folder(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "3", 0)
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_a_later_attempt_starts_from_the_newest_earlier_one(tmp_path: Path) -> None:
    for attempt in (0, 1, 3):
        (checkpoint_folder(tmp_path, attempt) / "state").write_text(f"of {attempt}")
    mine = checkpoint_folder(tmp_path, 5)
    assert (mine / "state").read_text() == "of 3"
    (mine / "state").write_text("of 5")
    assert (tmp_path / "attempt-3" / "state").read_text() == "of 3"


def test_a_folder_that_another_copy_of_this_attempt_left_is_not_taken_over(tmp_path: Path) -> None:
    (checkpoint_folder(tmp_path, 0) / "state").write_text("of 0")
    (checkpoint_folder(tmp_path, 1) / "half").touch()
    assert [path.name for path in checkpoint_folder(tmp_path, 1).iterdir()] == ["state"]


def interrupted(error: BaseException) -> Any:
    """A copy of files that ends at the second one."""
    copied: list[str] = []

    def copy(source: str, target: str) -> None:
        copied.append(source)
        if len(copied) == 2:
            raise error
        shutil.copy2(source, target)

    return copy


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt("killed")], ids=["full disk", "killed"]
)
def test_a_checkpoint_that_was_copied_in_part_is_never_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    for number in range(3):
        (checkpoint_folder(tmp_path, 0) if number == 0 else tmp_path / "attempt-0").joinpath(f"part{number}").touch()
    with monkeypatch.context() as patch:
        patch.setattr(command, "_copy_durably", interrupted(error))
        with pytest.raises(BaseException, match=r"full|killed"):
            checkpoint_folder(tmp_path, 1)
    if isinstance(error, OSError):
        assert sweeps.names(tmp_path) == ["attempt-0"]
    assert sweeps.names(checkpoint_folder(tmp_path, 2)) == ["part0", "part1", "part2"]


def test_an_argument_too_long_for_a_name_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "t.sh").touch()
    script = "echo " + "x" * 5000
    assert from_snapshot(("sh", "-c", script, "t.sh"), tmp_path) == ("sh", "-c", script, str(tmp_path / "t.sh"))


@pytest.mark.parametrize(
    ("given", "position"),
    [
        ([sys.executable, "-m", "mod"], 1),
        ([sys.executable, "-u", "-c", "pass"], 1),
        (["${env}", "${interpreter}", "-m", "mod"], 2),
        ([sys.executable, "train.py", "-m", "x"], None),
        ([sys.executable, "-u", "train.py"], None),
        (["bash", "-c", "python -m mod"], None),
        (["python9.99", "-m", "mod"], None),
    ],
)
def test_python_looks_in_the_snapshot_first(given: list[str], position: int | None) -> None:
    wanted = given if position is None else [*given[:position], "-P", *given[position:]]
    assert list(snapshot_first(tuple(given))) == wanted


def test_a_python_without_the_flag_is_left_alone_and_the_log_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python3.8"
    python.write_text('#!/bin/sh\n[ "$1" != -P ]\n')
    python.chmod(0o700)
    assert snapshot_first((str(python), "-m", "mod")) == (str(python), "-m", "mod")
    assert f"{python}: not Python 3.11 or newer" in capsys.readouterr().out


# With real processes

REPORT = 'import os; open(os.environ["ORC_REPORT"], "a").write(\'{"val_loss": %s}\')\n'


def edited_since(runs: Path, origin: Path, *argv: str) -> SweepPaths:
    """A sweep whose programs said 1 when it was submitted, and say 2 now."""
    origin.mkdir()
    for name, text in {"t.py": REPORT, "src/mod.py": REPORT, "data.txt": "%s"}.items():
        (origin / name).parent.mkdir(exist_ok=True)
        (origin / name).write_text(text % 1)
    paths = sweeps.make(runs, argv=argv, trials=1)
    snapshot.survey(None, origin).copy(paths.code)
    paths.origin.write_bytes(os.fsencode(origin))
    for file in (origin / "t.py", origin / "src/mod.py"):
        file.write_text(REPORT % 2)
    return paths


@pytest.mark.parametrize(
    "argv",
    [
        (sys.executable, "t.py"),
        (sys.executable, "-m", "t"),
        (sys.executable, "-m", "mod"),
        (sys.executable, "-c", "import t"),
        (sys.executable, "-c", "import mod"),
        ("sh", "-c", 'test -f data.txt && exec "$0" "$ORC_CODE/t.py"', sys.executable),
    ],
)
def test_a_program_runs_as_it_was_when_the_sweep_was_submitted(tmp_path: Path, argv: tuple[str, ...]) -> None:
    origin = tmp_path / "origin"
    paths = edited_since(tmp_path / "runs", origin, *argv)
    _, said = sweeps.run(paths, env={"PYTHONPATH": str(origin / "src")})
    (found,) = sweeps.records(paths, "outcome")
    assert found["payload"].get("value") == 1.0, said


def test_a_program_that_is_killed_with_its_worker_leaves_no_scratch_behind(tmp_path: Path) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    paths = sweeps.make(tmp_path / "runs", 'trap "" TERM; echo here; sleep 100', trials=1)
    with sweeps.started(paths, env={"TMPDIR": str(scratch)}) as process:
        sweeps.until(lambda: list(scratch.rglob("params.json")))
        process.kill()
        sweeps.until(lambda: sweeps.names(scratch) == [])


def test_a_variable_that_the_worker_lacks_fails_the_trial(tmp_path: Path) -> None:
    paths = sweeps.make(tmp_path, argv=("echo", "${envvar:NOT_HERE}"), trials=1)
    code, said = sweeps.run(paths)
    assert "give NOT_HERE under env:" in str(sweeps.fold(paths).payload(0).get("error")), (code, said)


# Reports of several attempts

RESUMES = """
import json, os, sys
from pathlib import Path
saved, losses = Path(os.environ["ORC_CHECKPOINT"], "step"), {losses}
for step in range(int(saved.read_text()) if saved.exists() else 0, len(losses)):
    with open(os.environ["ORC_REPORT"], "a") as report:
        report.write(json.dumps({{"step": step, "val_loss": losses[step]}}) + "\\n")
    saved.write_text(str(step + {saves}))
    if os.environ["ORC_ATTEMPT"] == "0" and step == 3 and {is_cut}:
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("at", ["best", "last"])
@pytest.mark.parametrize("saves", [1, -1])
@pytest.mark.parametrize("losses", [[4, 1, 3, 2, 5], [4, 3, 2, 1], [1, 2, 3, 4, 5, 6]])
def test_what_an_earlier_attempt_reported_counts_for_who_goes_on_from_its_checkpoint(
    tmp_path: Path, at: Literal["best", "last"], saves: int, losses: list[int]
) -> None:
    """Whether it does steps again or not, and even where nothing was left to do."""
    found = []
    for is_cut in (True, False):
        script = RESUMES.format(losses=losses, saves=saves, is_cut=is_cut)
        argv, metric = (sys.executable, "-c", script), Metric(at=at)
        paths = sweeps.make(tmp_path / str(is_cut), argv=argv, trials=1, metric=metric)
        assert sweeps.run(paths)[0] == 0
        found.append(sweeps.fold(paths).payload(0))
        assert len(sweeps.records(paths, "start")) == 1 + is_cut
    assert found[0] == found[1]
    assert found[0]["value"] == (min(losses) if at == "best" else losses[-1])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [b'{"step": 1}'], [b'{"step": 1}']),
        ([b'{"step": 1}', b'{"step": 2}'], [], [b'{"step": 1}', b'{"step": 2}']),
        ([b'{"step": 1}', b'{"step": 2}'], [b'{"step": 2}'], [b'{"step": 1}', b'{"step": 2}']),
        (
            [b'{"x": 1}', b"torn {", b'{"step": 9}'],
            [b"[]", b'{"step": 0}'],
            [b'{"x": 1}', b"torn {", b"[]", b'{"step": 0}'],
        ),
        ([b'{"step": 5}'], [b'{"x": 1}'], [b'{"step": 5}', b'{"x": 1}']),
    ],
)
def test_reports_of_steps_that_are_done_again_give_way(
    before: list[bytes], after: list[bytes], expected: list[bytes]
) -> None:
    assert joined(before, after) == expected


def test_a_note_that_is_lost_with_its_node_hides_no_earlier_reports(tmp_path: Path) -> None:
    paths = sweeps.make(tmp_path, trials=1)
    for attempt, earlier in ((0, None), (1, 0), (2, 1)):
        new_file(paths, 0, attempt, earlier).write_bytes(b'{"step": %d}\n' % attempt)
    assert said_before(paths, 0, 2) == [b'{"step": 0}', b'{"step": 1}', b'{"step": 2}']
    paths.report_note(0, 1).write_bytes(b"")
    assert said_before(paths, 0, 2) == [b'{"step": 0}', b'{"step": 2}']
    assert said_before(paths, 0, 1) == [b'{"step": 0}']
    forget(paths, 0, 1)
    assert [path.name.split(".")[1] for path in paths.checkpoints.iterdir()] == ["2", "2"]


@pytest.mark.parametrize("what", ["scratch", "checkpoints"])
def test_a_folder_that_is_gone_ends_the_work_instead_of_repeating_it(tmp_path: Path, what: str) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    folder = "$TMPDIR" if what == "scratch" else "$ORC_SWEEP/checkpoints"
    paths = sweeps.make(tmp_path / "runs", f"rm -rf {folder}/*; {HALF}", trials=3)
    sweeps.run(paths, env={"TMPDIR": str(scratch)})
    assert len(sweeps.records(paths, "start")) <= 3 * 6
