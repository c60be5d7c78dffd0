"""What a real Slurm makes of the rendered scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from orchestrator.config.spec import Launch, SweepSpec
from orchestrator.slurm.script import ReducerRequest, WorkersRequest, render_reducer, render_workers

if TYPE_CHECKING:
    from conftest import Slurm

EXAMPLES = sorted((Path(__file__).parent.parent.parent / "sbatch").glob("*.sh"))
TOKEN = "5eed" * 8
VALUES = [
    "it's",
    'a "b" c',
    "$(touch pwned)",
    "`x`",
    "a;b",
    "-n",
    "${HOME}",
    "ä€😀",
    "\\",
    "a\\",
    "#x",
    "a #b",
    " lead",
    "trail ",
    "",
    "'",
    '"',
]

PYTHON = f"""#!{sys.executable} -S
import json, os, sys
print(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}))
"""


def test_every_form_has_an_example() -> None:
    reducers = ["reducer-level", "reducer-ranks", "reducer"]
    assert [path.stem for path in EXAMPLES] == ["exec", "nodes", *reducers, "srun", "trap"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_accepted(example: Path, slurm: Slurm) -> None:
    # The example's partition is none of the lab's; what is given on the command line goes before what is in the script.
    slurm.run("sbatch", "--test-only", "--partition=low", str(example))


def read_by_sbatch(script: Path, env: dict[str, str]) -> dict[str, str]:
    """The options that sbatch found in a script, as it shows them."""
    done = subprocess.run(
        ["sbatch", "-vv", "--test-only", "--partition=low", script],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = (line.removeprefix("sbatch: ").partition(": ") for line in done.stderr.splitlines())
    return {name.strip(): value for name, _, value in rows}


@pytest.mark.parametrize("value", VALUES)
def test_sbatch_reads_an_option_as_it_was_given(value: str, slurm: Slurm, tmp_path: Path) -> None:
    spec = SweepSpec(name="digits", method="random", parameters={}, slurm={"account": value})
    root = "/runs/" + value.replace("\\", "") + "%A"
    request = WorkersRequest(spec=spec, sweep_id="digits-1", root=root, python="/p", token=TOKEN, num_workers=2)
    script = tmp_path / "script.sh"
    script.write_text(render_workers(request))
    found = read_by_sbatch(script, slurm.env)
    assert found["account"] == value
    assert found["chdir"] == root
    assert found["output"] == f"{root}%A".replace("%A%A", "%%A") + "/logs/%A_%a.log"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / 'it\'s $(touch pwned) #1 100%A "q" -x'
    (root / "logs").mkdir(parents=True)
    (root / "python").write_text(PYTHON)
    (root / "python").chmod(0o700)
    return root


def submit(slurm: Slurm, root: Path, text: str) -> str:
    script = root / "script.sh"
    script.write_text(text)
    return slurm.submit(script, "--partition=high")


def said(log: Path) -> dict[str, object]:
    return json.loads(log.read_text().splitlines()[-1])


@pytest.mark.parametrize("form", ["exec", "trap", "srun"])
def test_a_worker_runs_where_and_with_what_its_script_says(
    form: str, slurm: Slurm, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "of the submitter")
    launch = Launch(form=form, setup="export FROM_SETUP=1")
    spec = SweepSpec(name="digits", method="random", parameters={}, launch=launch, env={"FROM_ENV": "a 'b'\n$(c)"})
    request = WorkersRequest(
        spec=spec,
        sweep_id="digits-1",
        root=str(root),
        python=str(root / "python"),
        token=TOKEN,
        num_workers=2,
        first_worker=8,
    )
    job = submit(slurm, root, render_workers(request))
    logs = [root / "logs" / f"{job}_{element}.log" for element in range(2)]
    slurm.wait_for(lambda: all(log.exists() and log.read_text().endswith("}\n") for log in logs))
    for number, found in enumerate(map(said, logs), start=8):
        assert found["argv"][-6:] == ["--dir", str(root), "--submission", TOKEN, "--worker", str(number)]
        assert found["cwd"] == str(root)
        assert (found["env"]["FROM_ENV"], found["env"]["FROM_SETUP"]) == ("a 'b'\n$(c)", "1")
        assert "A_SECRET" not in found["env"]
    assert not (root / "pwned").exists()


def test_the_reducer_runs_as_its_script_says(slurm: Slurm, root: Path) -> None:
    spec = SweepSpec(name="digits", method="random", parameters={})
    request = ReducerRequest(spec=spec, sweep_id="digits-1", root=str(root), python=str(root / "python"), token=TOKEN)
    job = submit(slurm, root, render_reducer(request))
    log = root / "logs" / f"reducer-{job}.log"
    slurm.wait_for(lambda: log.exists() and log.read_text().endswith("}\n"))
    assert said(log)["argv"] == ["-P", "-m", "orchestrator.results.reducer", "--dir", str(root), "--submission", TOKEN]


def test_the_worker_s_status_is_the_job_s(slurm: Slurm, root: Path) -> None:
    (root / "python").write_text("#!/bin/sh\nexit 75\n")
    spec = SweepSpec(name="digits", method="random", parameters={}, launch=Launch(form="srun"))
    request = WorkersRequest(
        spec=spec, sweep_id="digits-1", root=str(root), python=str(root / "python"), token=TOKEN, num_workers=1
    )
    job = submit(slurm, root, render_workers(request))
    slurm.wait_for_state(f"{job}_0", "FAILED")
    assert slurm.show(f"{job}_0")["ExitCode"] == "75:0"
