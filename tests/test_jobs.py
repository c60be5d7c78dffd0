"""The example jobs do what their docstrings say: by these commands, with these sizes, on any number of ranks."""

from __future__ import annotations

import ast
import gzip
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson
import pytest
import torch
from crew import together
from test_resumed_training import check_everywhere

from orchestrator.cli import init as examples
from orchestrator.cli import prepare
from orchestrator.config import program, signatures
from orchestrator.config.spec import Metric
from orchestrator.distributed.rendezvous import RankContext
from orchestrator.errors import DataError
from orchestrator.training.trial import Trial

FOLDER = examples.folder()
JOBS = examples.names()
SCRIPTS = {"command_example"}
TRAINED = [name for name in JOBS if name not in SCRIPTS]

# Sizes of seconds.
SMALL: dict[str, list[str]] = {
    "batch_size_curves": ["epochs=2", "repeats=1", "batch_size=64,256"],
    "char_lm": ["steps=3", "layers=1", "lr=1e-3", "width=16", "batch_size=8"],
    "cifar_resnet": ["layers=8", "repeats=1", "iterations=3", "batch_size=12", "held_out=10"],
    "command_example": ["run_cap=4"],
    "digits_mlp": ["run_cap=2", "parameters.epochs.value=1"],
    "mnist_mlp": ["lr=0.5", "repeats=1", "batch_size=16"],
    "tabular_regression": ["run_cap=2", "epochs=2"],
}
DATA = {"mnist_mlp": "mnist", "cifar_resnet": "cifar-10", "char_lm": "shakespeare.txt"}


def commands(name: str) -> list[str]:
    """Those of a job's docstring."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    return re.findall(r"^ {4}((?:[A-Z0-9]+=\S+ )?(?:orc|python) (?:\S| (?! ))+)", text, re.MULTILINE)


def write_mnist(folder: Path) -> None:
    """60 and 20 images of noise with a bright line where the digit says; labels as they are, images packed."""
    generator = torch.Generator().manual_seed(1)
    for part, num in (("train", 60), ("t10k", 20)):
        y = torch.arange(num) % 10
        x = torch.randint(0, 100, (num, 28, 28), generator=generator).to(torch.uint8)
        x[torch.arange(num), 2 * y + 3] += 150
        head = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in x.shape)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + x.numpy().tobytes()))
        labels = y.to(torch.uint8).numpy().tobytes()
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + num.to_bytes(4, "big") + labels)


def write_cifar(folder: Path) -> None:
    """Five files of 10 images and one of 20, each a byte for the label and 3,072 for the pixels: red, green, blue.

    From 0 to 9 they turn from green to red.
    """
    generator = torch.Generator().manual_seed(2)
    for name, num in [*((f"data_batch_{number}.bin", 10) for number in range(1, 6)), ("test_batch.bin", 20)]:
        y = torch.arange(num) % 10
        x = torch.randint(0, 60, (num, 3072), generator=generator)
        x[:, :1024] += 15 * y[:, None]
        x[:, 1024:2048] += 150 - 15 * y[:, None]
        (folder / name).write_bytes(torch.cat([y[:, None], x], 1).to(torch.uint8).numpy().tobytes())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several would wait for each other on a busy machine; so small, they gain nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that jobs want, under the names that docstrings give them."""
    folder = tmp_path_factory.mktemp("data")
    for name, write in (("mnist", write_mnist), ("cifar-10", write_cifar)):
        (folder / name).mkdir()
        write(folder / name)
    (folder / "shakespeare.txt").write_text(
        "".join(f"{number} is the number after {number - 1}\n" for number in range(99))
    )
    return folder


# As the docstring says


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_short_and_says_how_it_is_launched_on_both(name: str) -> None:
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 300
    found = " ".join(commands(name))
    assert f"orc run jobs/{name}.yaml" in found
    assert f"orc submit jobs/{name}.yaml" in found


def reading(command: str) -> tuple[str, list[str]]:
    """The sweep file and the overrides of a command that reads one."""
    words = [word for word in command.split() if not re.match(r"[A-Z0-9]+=", word)]
    return words[2], words[3:]


SWEEPS = [command for name in JOBS for command in commands(name) if re.search(r"orc (run|submit) ", command)]


@pytest.mark.parametrize("command", SWEEPS)
def test_every_sweep_of_a_docstring_is_understood(command: str, tmp_path: Path) -> None:
    file, overrides = reading(command)
    taken = prepare.read(FOLDER.parent / file if FOLDER.name == "jobs" else FOLDER / file, overrides, runs=tmp_path)
    assert taken.plan.num_trials >= 4


def do(command: str, folder: Path, files: Path) -> str:
    """What a shell prints in a folder that has the jobs, with the data in `files`."""
    for name in JOBS:
        if not (folder / "jobs" / f"{name}.py").exists():
            examples.copy(name, folder / "jobs")
    variables = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ORC_")} | variables
    done = subprocess.run(
        ["bash", "-ec", command.replace("/data/", f"{files}/")],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# Each command imports torch anew, which takes seconds; so the data are small.
@pytest.mark.parametrize("name", TRAINED)
def test_a_job_runs_by_its_commands(name: str, tmp_path: Path, files: Path) -> None:
    of_kind = {kind: [one for one in commands(name) if f"orc {kind} " in one] for kind in ("run", "summary")}
    assert of_kind["run"]
    for number, command in enumerate(of_kind["run"]):
        data = f" data=/data/{DATA[name]}" if name in DATA and "/data/" not in command and name != "char_lm" else ""
        assert "trial" in do(f"{command}{data} {' '.join(SMALL[name])} name=small{number}", tmp_path, files)
        (count,) = re.findall(r"(\d+) complete", do(f"orc status small{number}", tmp_path, files))
        assert int(count) >= 1
    for command in of_kind["summary"]:
        assert do(command, tmp_path, files).count("\n") > 3


def test_the_same_file_trains_as_one_process_and_as_four_ranks(tmp_path: Path, files: Path) -> None:
    small = ["run_cap=2", "parameters.epochs.value=2", "launch.ranks_per_node=4"]
    do(f"{commands('digits_mlp')[0]} {' '.join(small)}", tmp_path, files)
    plan = prepare.read(FOLDER / "digits_mlp.yaml", small, runs=files).plan
    (curve,) = orjson.loads(do("orc summary --curve val_loss --json", tmp_path, files))["curves"]
    # 1,437 samples in batches of 64: no batch is left out, and none is made twice.
    assert [(one["step"], one["count"]) for one in curve["steps"]] == [(23, 2), (46, 2)]
    best = orjson.loads(do("orc best --top 2 --json", tmp_path, files))
    assert {one["index"] for one in best} == {0, 1}
    for one in best:
        alone, _ = run("digits_mlp", dict(plan.trial(one["index"]).params), seed=plan.trial(one["index"]).seed)
        wanted = alone.result(None).payload
        assert one["metrics"] == pytest.approx(wanted["metrics"], rel=1e-4)


def test_a_script_runs_by_itself_and_as_a_sweep(tmp_path: Path, files: Path) -> None:
    alone, sweep, _ = commands("command_example")
    last = do(alone, tmp_path, files).splitlines()[-1]
    assert re.fullmatch(r'\{"step": 500, "value": 0\.00\d+\}', last)
    assert "trial" in do(f"{sweep} run_cap=6", tmp_path, files)
    assert '"value"' in do("orc best --json", tmp_path, files)


# Here


@cache
def module(name: str) -> ModuleType:
    before = sys.dont_write_bytecode, list(sys.path)
    try:
        return program.load_job(FOLDER, f"{name}.py").module
    finally:
        sys.dont_write_bytecode, sys.path[:] = before


def params(name: str, files: Path) -> dict[str, Any]:
    """Those of the sweep's first trial, small and with its data."""
    where = [f"data={files / DATA[name]}"] if name in DATA else []
    found = prepare.read(FOLDER / f"{name}.yaml", [*where, *SMALL[name]], runs=files)
    return dict(found.plan.trial(0).params)


def run(
    name: str, given: dict[str, Any], party: RankContext | None = None, *, seed: int = 3
) -> tuple[Trial, list[dict[str, Any]]]:
    """A trial of a job, and what it reports."""
    code = module(name)
    for_build, for_train = signatures.split(given, code.build, code.train)
    reports: list[Any] = []
    trial = Trial(
        index=0,
        params=given,
        build_params=for_build,
        seed=seed,
        metric=Metric(),
        emit=reports.append,
        device=torch.device("cpu"),
        party=party,
    )
    code.train(trial, **for_train)
    return trial, reports


@pytest.mark.parametrize("name", TRAINED)
def test_a_job_trains_and_reports_its_objective_the_same_every_time(name: str, files: Path) -> None:
    given = params(name, files)
    trial, reports = run(name, given)
    metric = prepare.read(FOLDER / f"{name}.yaml", [], runs=files).plan.spec.metric.name
    assert any(metric in report["metrics"] for report in reports)
    assert trial.num_steps >= 2
    again, _ = run(name, given)
    assert trial.result(None).payload == again.result(None).payload


@pytest.mark.parametrize(
    ("name", "more", "at_most"),
    [
        ("mnist_mlp", {"epochs": 12, "lr": 0.1}, 1.8),  # guessing gives 2.3
        ("cifar_resnet", {"iterations": 24, "lr": 0.02, "held_out": 0}, 2.0),  # 2.3 too
        ("char_lm", {"steps": 60, "lr": 1e-2, "warm_up": 5, "context": 16}, 2.2),  # 5.5
        ("tabular_regression", {"epochs": 10, "lr": 1e-2}, 0.7),  # 1.0
    ],
)
def test_a_job_learns(name: str, more: dict[str, Any], at_most: float, files: Path) -> None:
    _, reports = run(name, params(name, files) | more)
    assert [one["metrics"]["val_loss"] for one in reports if "val_loss" in one["metrics"]][-1] < at_most


LOADS = {"batch_size_curves": "data", "digits_mlp": "data", "tabular_regression": "load"}
"""What gives the data of a job that has them from scikit-learn, whose import takes longer than all that a rank does."""


def weights_of_ranks(party: RankContext, name: str, given: dict[str, Any], samples: Path) -> list[float]:
    """All weights after a trial; `samples` is what the job's own data were written to, if they are scikit-learn's."""
    if name in LOADS:
        code, found = module(name), torch.load(samples, weights_only=True)
        setattr(code, LOADS[name], lambda: code.Data(*found) if hasattr(code, "Data") else found)
    return weights(run(name, given, party)[0])


def weights(trial: Trial) -> list[float]:
    found: list[float] = torch.nn.utils.parameters_to_vector(trial.net.parameters()).tolist()
    return found


# Float32 sums in another order, over the 3 to 46 steps of the sizes above; docs/sweep-file.md says so. Batches of one
# sample less would change weights by a thousand times as much. Where batches are normalised, each rank does so for
# itself, so one process takes the batch in as many micro_batches; and each rank draws its own dropout.
TOLERANCE = 2e-6
ALIKE: dict[str, dict[str, Any]] = {
    "char_lm": {"warm_up": 1},  # else its three steps are too small to tell
    "cifar_resnet": {
        "held_out": 14,
        "lr": 0.01,
        "batch_size": 12,
    },  # 36 images, in batches that 2 and 3 ranks share evenly
    "tabular_regression": {"dropout": 0.0},
}
NORMALISED = {"cifar_resnet"}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", TRAINED)
def test_ranks_follow_one_process(name: str, world_size: int, files: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    given = params(name, files) | ALIKE.get(name, {})
    if name in LOADS:
        torch.save(tuple(getattr(module(name), LOADS[name])()), tmp_path / "samples")
    found = torch.tensor(together(tmp_path, world_size, weights_of_ranks, name, given, tmp_path / "samples"))
    assert (found == found[0]).all()
    alone = given | ({"micro_batches": world_size} if name in NORMALISED else {})
    wanted = torch.tensor(weights(run(name, alone)[0]))
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["char_lm", "cifar_resnet"])
def test_a_job_that_ends_in_mid_epoch_goes_on_with_the_bits_of_an_undisturbed_one(
    name: str, files: Path, tmp_path: Path
) -> None:
    given = params(name, files) | {"context": 16} if name == "char_lm" else params(name, files)
    code = module(name)
    for_build, for_train = signatures.split(given, code.build, code.train)

    def train(trial: Trial) -> None:
        trial._build_params = for_build
        code.train(trial, **for_train)

    check_everywhere(tmp_path, train, steps={1, 2, 3})


# Sizes, rates and mistakes


@pytest.mark.parametrize(
    ("layers", "num"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_residual_networks_have_the_paper_s_sizes(layers: int, num: int) -> None:
    with torch.device("meta"):
        assert sum(one.numel() for one in module("cifar_resnet").resnet(layers).parameters()) == num


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (20, {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}),
        (110, {0: 0.01, 399: 0.01, 400: 0.1, 32_000: 0.01}),
    ],
)
def test_the_rate_is_divided_at_32k_and_48k_and_110_layers_warm_up(layers: int, expected: dict[int, float]) -> None:
    rate: Callable[..., float] = module("cifar_resnet").rate
    assert {step: 0.1 * rate(step, 64_000, layers) for step in expected} == pytest.approx(expected)


def test_a_shortcut_takes_every_other_pixel_and_adds_filters_of_zeros() -> None:
    block = module("cifar_resnet").Block(16, 32)
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 16, 8, 8)
    y = block(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2].relu())
    assert not y[:, 16:].any()


def test_a_character_depends_on_those_before_it_alone() -> None:
    net = module("char_lm").build(width=16, context=12).net.eval()
    x = torch.randint(0, 256, (1, 12))
    other = x.clone()
    other[0, 7] = (x[0, 7] + 1) % 256
    with torch.no_grad():
        same = torch.isclose(net(x), net(other), atol=1e-6).all(dim=2)[0].tolist()
    assert same == [True] * 7 + [False] * 5


def test_without_a_file_the_text_is_python_s_manual() -> None:
    (train,), (val,) = module("char_lm").load("", 64)
    text = bytes(train[:, :-1].flatten().tolist())
    assert b'The "if" statement' in text
    assert 8 < len(train) / len(val) < 10


@pytest.mark.parametrize(
    ("name", "given", "error", "text"),
    [
        ("mnist_mlp", {"data": "nowhere"}, DataError, "nowhere"),
        ("cifar_resnet", {"data": "nowhere"}, DataError, "nowhere"),
        ("cifar_resnet", {"layers": 21}, ValueError, "layers must be 6n[+]2, such as 20, 32, 44, 56 or 110, not 21"),
        ("char_lm", {"context": 10_000}, ValueError, "must be longer than the context of 10000; it has"),
    ],
)
def test_a_mistake_is_told(name: str, given: dict[str, Any], error: type[Exception], text: str, files: Path) -> None:
    with pytest.raises(error, match=text):
        run(name, params(name, files) | given)
