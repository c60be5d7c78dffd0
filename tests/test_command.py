"""Commands: W&B's macros as arguments, never as shell text; checkpoint folders that no two attempts share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.command import checkpoint_folder, expand, flat
from orchestrator.store import Json, JsonObject

PARAMS: JsonObject = {"lr": 0.1, "name": "a b", "fast": True, "slow": False, "opt": {"beta": [1, 2], "eps": None}}
FILE = Path("/scratch/params.json")


def expanded(*command: str, params: JsonObject = PARAMS) -> list[str]:
    return expand(command, params, params_file=FILE)


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


def test_variables_are_read_where_the_worker_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "${args_json}")
    monkeypatch.delenv("NONE", raising=False)
    assert expanded("${envvar:MINE}/x", "[${envvar:NONE}]") == ["${args_json}/x", "[]"]


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
