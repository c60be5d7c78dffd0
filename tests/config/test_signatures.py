"""Signatures read from source, and the split of parameters at run time."""

import sys
from pathlib import Path

import pytest

from orchestrator.config.signatures import check, read_signatures, split
from orchestrator.errors import ProgramError

JOB = """\
raise SystemExit("nobody may import this to read it")

def build(*, lr: float, hidden: int = 50):
    pass

def train(trial, *, epochs: int, batch_size: int = 64):
    trial.build(build)
"""


def program(tmp_path: Path, text: str, name: str = "train.py") -> str:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    return name


def refusal(tmp_path: Path, text: str, *parameters: str, name: str = "train.py") -> str:
    target = program(tmp_path, text)
    with pytest.raises(ProgramError) as caught:
        check(name.replace("train.py", target), parameters, tmp_path)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_both_functions_are_read_without_importing(tmp_path: Path) -> None:
    found = check(program(tmp_path, JOB), {"lr", "epochs", "batch_size"}, tmp_path)
    assert found is not None
    assert found.build is not None
    assert (found.build.required, found.build.optional, found.build.line) == (("lr",), ("hidden",), 3)
    assert (found.train.required, found.train.optional, found.train.line) == (("epochs",), ("batch_size",), 6)


def test_all_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    takes = "build (line 3) and train (line 6) take lr, hidden, epochs, batch_size"
    needs = "train needs 'epochs', which is not among the sweep's parameters"
    assert refusal(tmp_path, JOB, "lr", "hiden", "x").splitlines() == [
        f"train.py: parameter 'hiden' is not taken: {takes}; did you mean 'hidden'?",
        f"train.py: parameter 'x' is not taken: {takes}",
        f"train.py:6: {needs}; add it as parameters.epochs, or give it a default",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def train(trial): pass", "train.py: parameter 'x' is not taken: train (line 1) take none"),
        ("def tarin(trial): pass", "train.py: no function 'train'; did you mean 'tarin'?"),
        ("import argparse", "train.py: no function 'train'; to run the file as a script, give command: "
                            "[python, train.py, '${args}'] for program"),
        ("async def train(trial): pass", "train.py:1: train is async, expected a plain function"),
        ("def train(:\n", "train.py:1:11: not Python: invalid syntax"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, text: str, expected: str) -> None:
    assert refusal(tmp_path, text, "x") == expected


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path) -> None:
    assert refusal(tmp_path, JOB, name="trian.py") == "trian.py: no such file; did you mean 'train.py'?"


@pytest.mark.parametrize(
    "text",
    [
        "def train(trial, **params): pass",
        "def train(trial, x, y=1): pass",
        "def build(**params): pass\ndef train(trial): trial.build(build)",
        "@decorated\ndef train(trial, needed): pass",
        "def build(dataset): pass\ndef train(trial, x): build('mnist')",
        "if True:\n    def train(trial, x): pass\nelse:\n    def train(trial, x): pass",
        "try:\n    import a\nexcept ImportError:\n    pass\ndef train(trial, x): pass",
        "def train(trial): pass\ndef train(trial, x): pass",
    ],
)
def test_what_fits(tmp_path: Path, text: str) -> None:
    assert check(program(tmp_path, text), ["x"], tmp_path) is not None


@pytest.mark.parametrize(
    "text", ["from elsewhere import train", "from elsewhere import *", "train = make()", "class train: pass"]
)
def test_what_cannot_be_known_is_not_judged(tmp_path: Path, text: str) -> None:
    assert check(program(tmp_path, text), ["x"], tmp_path) is None


def test_a_function_may_be_named(tmp_path: Path) -> None:
    name = program(tmp_path, "def main(trial, x): pass\ndef train(): pass")
    found = read_signatures(f"{name}:main", tmp_path)
    assert found is not None
    assert found.train.name == "main"


@pytest.mark.parametrize("file", ["pkg/sub/job.py", "pkg/sub/job/__init__.py"])
@pytest.mark.parametrize("on_path", [True, False])
def test_a_module_is_found_without_importing_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, on_path: bool
) -> None:
    program(tmp_path, "def main(trial, x): pass", file)
    program(tmp_path, "raise SystemExit", "pkg/__init__.py")
    if on_path:
        monkeypatch.syspath_prepend(str(tmp_path))
    folder = Path("/") if on_path else tmp_path
    found = check("pkg.sub.job:main", ["x"], folder)
    assert found is not None
    assert found.file == tmp_path / file
    assert "pkg" not in sys.modules


@pytest.mark.parametrize("module", ["no_such_package.job:f", "sys:exit", "math:sin"])
def test_a_module_out_of_sight_is_not_judged(tmp_path: Path, module: str) -> None:
    assert check(module, ["x"], tmp_path) is None


def test_a_name_that_both_take_goes_to_both() -> None:
    def build(*, lr: float, width: int = 3) -> None: ...
    def train(trial: object, width: int, *, epochs: int) -> None: ...

    params = {"lr": 0.1, "width": 4, "epochs": 2}
    assert split(params, build, train) == ({"lr": 0.1, "width": 4}, {"width": 4, "epochs": 2})


def test_the_trial_is_not_a_parameter_and_kwargs_take_all() -> None:
    def train(trial: object, **params: object) -> None: ...

    assert split({"a": 1, "b": 2}, None, train) == ({}, {"a": 1, "b": 2})


def test_a_parameter_that_nobody_takes_is_refused() -> None:
    def train(trial: object) -> None: ...

    with pytest.raises(ProgramError, match="neither build nor train takes 'trial'"):
        split({"trial": 1}, None, train)
