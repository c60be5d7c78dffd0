"""What a person gets wrong: a clear message, the right exit code, nothing half-written, no traceback of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Orc
from fakes import FakeSlurm

GOOD = "def train(trial, *, x):\n    trial.report(val_loss=float(x))\n"


@pytest.fixture
def orc(tmp_path: Path) -> Orc:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "train.py").write_text(GOOD)
    return Orc(tmp_path / "work")


# Sweep files


BROKEN = {
    "method: gird\n": "sweep.yaml:1:9: method: found the string 'gird', allowed: grid, random; did you mean 'grid'?",
    "metod: grid\n": "sweep.yaml:1:1: metod: unknown key; did you mean 'method'?",
    "run_cap: many\n": "sweep.yaml:1:10: run_cap: found the string 'many', expected an integer",
    "parameters: {}\n": "sweep.yaml:1:13: parameters: found an empty mapping, expected at least one parameter",
    "parameters: {x: {values: []}}\n": "sweep.yaml:1:26: parameters.x.values: ",
    "parameters: {x: {min: 2, max: 1}}\n": "sweep.yaml:1:",
    "parameters: {x: {distribution: log_uniform_values, min: 0, max: 1}}\nmethod: random\n": "sweep.yaml:1:",
    "parameters: {x: 0.1}\n": "sweep.yaml:1:17: parameters.x: found the number 0.1, expected a mapping",
    "seed: -1\n": "sweep.yaml:1:7: seed: found the number -1, expected at least 0",
    "seed: 1\nseed: 2\n": "sweep.yaml:2:1: seed: ",
    "slurm: {tyme: 1}\n": "sweep.yaml:1:9: slurm.tyme: unknown option; did you mean 'time'?",
    'name: "a\\nb"\n': "sweep.yaml:1:7: name: found the string 'a\\nb', expected 1 to 64 of",
    "name: $(touch pwned)\n": "sweep.yaml:1:7: name: found the string '$(touch pwned)', expected 1 to 64 of",
    "zip: [[x, y]]\n": "sweep.yaml:1:11: zip[0][1]: ",
    "launch: {form: slurm}\n": "sweep.yaml:1:16: launch.form: found the string 'slurm', allowed: ",
    "method: [\n": "sweep.yaml:",
}
REST = {"program": "train.py", "method": "grid", "parameters": "{x: {values: [1, 2]}}"}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text.splitlines()[0])
def test_a_broken_sweep_file_is_refused_with_line_and_column(text: str, orc: Orc) -> None:
    given = {line.partition(":")[0] for line in text.splitlines()}
    rest = "".join(f"{key}: {value}\n" for key, value in REST.items() if key not in given)
    (orc.folder / "sweep.yaml").write_text(text + rest)
    said = orc("run", "sweep.yaml", expect=2)
    assert any(line.startswith(BROKEN[text]) for line in said.err.splitlines()), said.err
    assert not orc.runs.exists()


@pytest.mark.parametrize("verb", ["run", "plan", "submit"])
def test_every_verb_that_reads_a_sweep_file_refuses_a_broken_one(verb: str, orc: Orc) -> None:
    assert "sweep.yaml:5:9: method: " in orc(verb, orc.write(method="gird"), expect=2).err
    assert not orc.runs.exists()


def test_all_problems_are_reported_at_once(orc: Orc) -> None:
    (orc.folder / "sweep.yaml").write_text("metod: grid\nseed: x\nparameters: {}\nlaunch: {cpus: 0}\n")
    found = orc("run", "sweep.yaml", "lr=1", "run_cap=zero", expect=2).err.splitlines()
    keys = ("metod", "seed", "parameters", "launch.cpus", "method", "run_cap", "lr")
    assert all(any(key in line for line in found) for key in keys), found


@pytest.mark.parametrize("argument", ["x", "=1", "nosuch=1", "x=[", "run_cap=-1", "seed=1=2"])
def test_a_broken_argument_is_refused_and_shown(argument: str, orc: Orc) -> None:
    said = orc("run", orc.write(program="train.py"), argument, expect=2)
    assert f"argument '{argument}'" in said.err
    assert not orc.runs.exists()


@pytest.mark.parametrize("name", ["nosuch.yaml", ".", "binary"])
def test_a_sweep_file_that_is_none_is_refused(name: str, orc: Orc) -> None:
    (orc.folder / "binary").write_bytes(b"\xff\x00\x81")
    assert name in orc("run", name, expect=2).err


# Programs


PROGRAMS = {
    "nosuch.py": (None, "nosuch.py: no such file"),
    "syntax.py": ("def train(:\n", "syntax.py"),
    "nothing.py": ("x = 1\n", "train"),
    "takes.py": ("def train(trial, *, y=1): pass\n", "parameter 'x' is not taken"),
    "needs.py": ("def train(trial, *, x, y): pass\n", "needs 'y', which is not among the sweep's parameters"),
    "raises.py": ("import nosuchmodule\n" + GOOD, "ModuleNotFoundError: No module named 'nosuchmodule'"),
    "leaves.py": ("raise SystemExit('not today')\n" + GOOD, "not today"),
}


@pytest.mark.parametrize("verb", ["run", "submit"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_does_not_fit_is_refused_with_its_own_error(name: str, verb: str, orc: Orc) -> None:
    text, expected = PROGRAMS[name]
    if text is not None:
        (orc.folder / name).write_text(text)
    said = orc(verb, orc.write(program=name), expect=2)
    assert expected in said.err
    assert "orchestrator/" not in said.err
    assert orc.sweeps == []


@pytest.mark.parametrize("verb", ["run", "submit"])
def test_an_import_that_hangs_ends_at_the_limit(verb: str, orc: Orc) -> None:
    (orc.folder / "hangs.py").write_text("import time\ntime.sleep(1000)\n" + GOOD)
    said = orc(verb, orc.write(program="hangs.py", launch={"import_timeout_s": 1.0}), expect=2)
    assert "import_timeout_s" in said.err
    assert orc.sweeps == []


def test_a_metric_that_is_never_reported_fails_and_names_what_is(orc: Orc) -> None:
    said = orc("run", orc.write(metric={"name": "accuracy"}), expect=4)
    assert "the job never reported 'accuracy'; it reported other, val_loss" in said.err
    assert "0 of 3 complete, 3 failed" in said.out


def test_fault_28_values_are_never_run_by_a_shell(orc: Orc) -> None:
    values = ["$(touch pwned)", "`touch pwned`", "a\nb", "; touch pwned", "--x", "../.."]
    script = 'test "$#" = 1 && echo "{\\"val_loss\\": ${#1}}" >> $ORC_REPORT'
    said = orc("run", orc.write(command=["sh", "-c", script, "sh", "${args}"], parameters={"x": {"values": values}}))
    assert f"{len(values)} of {len(values)} complete" in said.out
    assert not list(orc.folder.rglob("pwned"))


# Folders


def test_a_file_where_runs_should_be_is_refused(orc: Orc) -> None:
    (orc.folder / "runs").touch()
    assert "should be a folder for sweeps, but is a file" in orc("run", orc.write(), expect=2).err
    assert "should be a folder for sweeps, but is a file" in orc("submit", "sweep.yaml", expect=2).err


def test_a_folder_that_can_not_be_written_is_refused(orc: Orc) -> None:
    said = orc("run", orc.write(), "--dir", "/proc/runs", expect=2)
    assert "/proc/runs: can't be made" in said.err
    assert "--dir or $ORC_DIR" in said.err


@pytest.mark.parametrize("verb", ["status", "best", "summary", "resume", "cancel", "run"])
def test_a_folder_of_another_schema_is_refused(verb: str, orc: Orc) -> None:
    orc("run", orc.write())
    plan = orc.runs / orc.sweeps[0] / "plan.jsonl"
    header, *rest = plan.read_text().splitlines()
    plan.chmod(0o600)
    plan.write_text("\n".join([json.dumps({**json.loads(header), "schema": 99}), *rest]) + "\n")
    arguments = ["sweep.yaml"] if verb == "run" else []
    assert "schema" in orc(verb, *arguments, expect=2).err


@pytest.mark.parametrize("missing", ["records", "plan.jsonl"])
def test_a_folder_that_is_not_whole_is_refused(missing: str, orc: Orc) -> None:
    orc("run", orc.write())
    (orc.runs / orc.sweeps[0] / missing).rename(orc.folder / "away")
    assert orc.sweeps[0] in orc("status", orc.sweeps[0], expect=3 if missing == "plan.jsonl" else 2).err


def test_fault_30_a_folder_that_anyone_may_write_is_read_but_not_run(orc: Orc) -> None:
    orc("run", orc.write())
    (orc.runs / orc.sweeps[0]).chmod(0o777)
    assert "3 complete" in orc("status").out
    for record in (orc.runs / orc.sweeps[0] / "records").iterdir():
        record.unlink()
    assert "anyone may write it" in orc("resume", expect=2).err


# Names on the command line


@pytest.mark.parametrize("trial", ["3", "-1", "0-00000000", "x", ""])
def test_a_trial_that_is_not_there_is_not_found(trial: str, orc: Orc) -> None:
    orc("run", orc.write())
    assert "trials are named by index, 0 to 2, or by id" in orc("logs", "--", trial, expect=3).err


@pytest.mark.parametrize(
    "arguments",
    [
        ["bset"],
        ["run"],
        ["run", "sweep.yaml", "--workers", "0"],
        ["best", "--top", "x"],
        ["submit", "--on", "moon", "s"],
    ],
)
def test_wrong_usage_shows_the_usage(arguments: list[str], orc: Orc) -> None:
    said = orc(*arguments, expect=2)
    assert said.err.startswith("Usage: orc")
    assert said.out == ""


@pytest.mark.parametrize("setting", ["launch.cpus=2", "slurm.tyme=1", "slurm.time", "seed=2", "slurm.output=x"])
def test_resume_refuses_what_is_no_option_of_sbatch(setting: str, orc: Orc) -> None:
    orc("run", orc.write(command=["false"]), expect=4)
    assert f"--set {setting}" in orc("resume", "--failed", "--set", setting, expect=2).err


# Slurm


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    (tmp_path / "slurm").mkdir()
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


@pytest.mark.parametrize("options", [[], ["--test-only"], ["--watch"]], ids=str)
def test_no_slurm_is_said_with_what_to_do_and_nothing_is_left(options: list[str], orc: Orc) -> None:
    orc.variables["PATH"] = "/nowhere"
    said = orc("submit", orc.write(), *options, expect=5)
    assert "there is no Slurm here" in said.err
    assert "--on local" in said.err
    assert orc.sweeps == []


@pytest.mark.parametrize("options", [[], ["--test-only"]], ids=str)
def test_a_rejected_script_is_shown_in_sbatch_s_own_words(options: list[str], orc: Orc, fake: FakeSlurm) -> None:
    fake.will("sbatch", *["reject Invalid account or account/partition combination specified"] * 4)
    said = orc("submit", orc.write(), *options, expect=2)
    assert "Invalid account or account/partition combination specified" in said.err
    assert fake.jobs == []
    assert orc.sweeps == []


def test_a_submission_goes_through_once_what_was_wrong_is_put_right(orc: Orc, fake: FakeSlurm) -> None:
    fake.will("sbatch", "reject Invalid qos specification")
    orc("submit", orc.write(), expect=2)
    orc("submit", "sweep.yaml")
    assert [job["tasks"] for job in fake.jobs] == [3, 0]


def test_a_controller_that_is_down_is_said(orc: Orc, fake: FakeSlurm) -> None:
    orc("submit", orc.write())
    fake.will("squeue", *["down"] * 9)
    said = orc("status")
    assert "jobs: unknown" in said.out


def test_no_error_is_a_traceback_even_on_a_full_disk(orc: Orc) -> None:
    limit = f"ulimit -f 0; exec {sys.executable} -P -m orchestrator run {orc.write()}"
    ran = subprocess.run(
        ["bash", "-c", limit], cwd=orc.folder, env=orc.environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0
    assert "Traceback" not in ran.stderr
