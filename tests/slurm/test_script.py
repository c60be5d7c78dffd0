"""Scripts as text, and as bash runs them; what Slurm makes of them is in tests/slurm."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.spec import Launch, Reduce, SweepSpec
from orchestrator.errors import UsageError
from orchestrator.slurm.script import (
    OWNED,
    LevelRequest,
    ReducerRequest,
    WorkersRequest,
    arrays,
    form_of,
    render_reducer,
    render_workers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLES = Path(__file__).parents[2] / "sbatch"
FORMS = ("exec", "trap", "srun")
HOSTILE = [
    "it's",
    'a "b" c',
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "x\ntouch pwned",
    "-n",
    "${HOME}",
    "ä€😀",
    "\\",
    "%j",
    "",
]


def spec(launch: Launch | None = None, **fields: object) -> SweepSpec:
    plain = SweepSpec(name="digits", method="random", parameters={}, launch=launch or Launch())
    return replace(plain, **fields)  # type: ignore[arg-type]


def workers(of: SweepSpec, **fields: object) -> WorkersRequest:
    plain = {
        "sweep_id": "digits-0123abcd4567",
        "root": "/home/ada/runs/digits-0123abcd4567",
        "python": "/home/ada/venv/bin/python",
        "token": "5eed" * 8,
        "num_workers": 100,
    }
    return WorkersRequest(spec=of, **{**plain, **fields})  # type: ignore[arg-type]


def reducer(of: SweepSpec) -> ReducerRequest:
    request = workers(of)
    return ReducerRequest(
        spec=of, sweep_id=request.sweep_id, root=request.root, python=request.python, token=request.token
    )


def level(of: SweepSpec, number: int) -> LevelRequest:
    """Level `number` of a tree over 40 ranges, of which 20 are merged at a time."""
    root = replace(reducer(of), num_ranges=40)
    return LevelRequest.of(root, level=number, num_reducers=(40, 2)[number])


def directives(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("#SBATCH ")]


# Text


def example(name: str) -> str:
    slurm = {"time": "02:00:00", "mem": "4G", "partition": "cpu"}
    setup = "ulimit -n 4096"
    of = spec(
        Launch(form="trap", throttle=20, cpus=2, modules=("gcc/12",), setup=setup), slurm=slurm, env={"TZ": "UTC"}
    )
    reduce = Reduce(slurm={"time": "00:10:00"}, fan_in=20)
    if name == "reducer":
        return render_reducer(reducer(replace(of, reduce=reduce)))
    if name == "reducer-level":
        return render_reducer(level(replace(of, reduce=reduce), 0))
    if name == "reducer-ranks":
        return render_reducer(reducer(replace(of, reduce=replace(reduce, ranks=8))))
    if name == "nodes":
        return render_workers(workers(replace(of, launch=replace(of.launch, form="auto", nodes=2, ranks_per_node=2))))
    return render_workers(workers(replace(of, launch=replace(of.launch, form=name))))


@pytest.mark.parametrize("name", [*FORMS, "nodes", "reducer", "reducer-level", "reducer-ranks"])
def test_the_rendered_examples_are_current(name: str) -> None:
    path = EXAMPLES / f"{name}.sh"
    if os.environ.get("ORC_UPDATE"):
        path.write_text(example(name))
    assert path.read_text() == example(name), "ORC_UPDATE=1 pytest tests/slurm/test_script.py writes them anew"


def test_auto_is_srun() -> None:
    assert form_of(Launch()) == "srun"
    assert render_workers(workers(spec())) == render_workers(workers(spec(Launch(form="srun"))))


def command(script: str) -> str:
    return script.splitlines()[-1]


def test_a_reducer_of_a_tree_is_told_the_tree_and_its_place() -> None:
    of = spec(reduce=Reduce(fan_in=20, slurm={"time": "5"}))
    root, lower = render_reducer(replace(reducer(of), num_ranges=40)), render_reducer(level(of, 1))
    assert command(root).endswith(" --ranges 40 --fan-in 20")
    assert command(lower).endswith(' --ranges 40 --fan-in 20 --level 1 --number "$SLURM_ARRAY_TASK_ID"')
    assert "#SBATCH --array=0-1" in directives(lower)
    assert f"#SBATCH --output={reducer(of).root}/logs/reduce-1-%A_%a.log" in directives(lower)
    assert all("#SBATCH --time=5" in directives(script) for script in (root, lower))
    assert [line for line in directives(root) if "array" in line] == []


def test_the_jobs_of_a_tree_have_names_of_their_own() -> None:
    requests = [workers(spec()), reducer(spec()), level(spec(), 0), level(spec(), 1)]
    assert len({request.job_name for request in requests}) == len(requests)


def test_ranks_are_the_tasks_of_one_step_with_the_processors_that_the_job_has() -> None:
    script = render_reducer(reducer(spec(reduce=Reduce(ranks=4, slurm={"cpus-per-task": 2}))))
    assert "#SBATCH --ntasks=4" in directives(script)
    assert "#SBATCH --cpus-per-task=2" in directives(script)
    assert command(script).startswith("exec srun --ntasks=4 --cpus-per-task=2 --kill-on-bad-exit=1 --export=ALL ")
    assert " -P -m orchestrator.worker.reducer_ranks --dir " in command(script)


@given(st.integers(0, 5000), st.integers(2, 1500))
def test_arrays_hold_every_worker_once_under_indices_that_slurm_allows(num_workers: int, limit: int) -> None:
    parts = arrays(num_workers, limit)
    assert [first + index for first, count in parts for index in range(count)] == list(range(num_workers))
    assert all(0 < count <= limit for _, count in parts)


def test_a_slurm_without_arrays_is_refused() -> None:
    with pytest.raises(UsageError, match="MaxArraySize is 0"):
        arrays(10, 0)


@pytest.mark.parametrize(
    ("throttle", "num_arrays", "expected"), [(None, 1, "0-99"), (20, 1, "0-99%20"), (20, 3, "0-99%6"), (2, 3, "0-99%1")]
)
def test_arrays_share_the_throttle(throttle: int | None, num_arrays: int, expected: str) -> None:
    script = render_workers(workers(spec(Launch(throttle=throttle)), num_arrays=num_arrays))
    assert f"#SBATCH --array={expected}" in directives(script)


def test_an_offset_moves_the_workers_and_not_the_indices() -> None:
    script = render_workers(workers(spec(), num_workers=7, first_worker=2002))
    assert "#SBATCH --array=0-6" in directives(script)
    assert "orc_worker=$((2002 + SLURM_ARRAY_TASK_ID))" in script


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("12:00:00", ["#SBATCH --x=12:00:00"]),
        (30, ["#SBATCH --x=30"]),
        (True, ["#SBATCH --x"]),
        (False, []),
        (None, []),
        (["n1", "n2"], ["#SBATCH --x=n1,n2"]),
        ('a "b" \\ #c', ['#SBATCH --x="a \\"b\\" \\\\ #c"']),
        ("", ['#SBATCH --x=""']),
    ],
)
def test_options_are_passed_on_as_they_are(value: object, expected: list[str]) -> None:
    script = render_workers(workers(spec(slurm={"x": value})))
    assert [line for line in directives(script) if "--x" in line] == expected


def test_the_reducer_s_own_options_go_over_the_sweep_s() -> None:
    of = spec(slurm={"time": "12:00:00", "gpus": 1}, reduce=Reduce(slurm={"time": "00:10:00", "gpus": None}))
    lines = directives(render_reducer(reducer(of)))
    assert "#SBATCH --time=00:10:00" in lines
    assert not [line for line in lines if "gpus" in line or "array" in line or "12:00" in line]


def test_a_worker_may_have_more_cpus_than_a_trial_has_threads() -> None:
    of = spec(Launch(form="srun", cpus=2), slurm={"cpus-per-task": 6})
    script = render_workers(workers(of))
    assert [line for line in directives(script) if "cpus" in line] == ["#SBATCH --cpus-per-task=6"]
    assert "srun --nodes=1 --ntasks=1 --cpus-per-task=6 " in script
    assert "OMP_NUM_THREADS=2" in script
    assert "#SBATCH --cpus-per-task=1" in directives(render_reducer(reducer(of)))


def test_a_worker_has_processors_for_all_ranks_of_its_trial() -> None:
    script = render_workers(workers(spec(Launch(form="srun", cpus=2, ranks_per_node=4))))
    assert [line for line in directives(script) if "cpus" in line] == ["#SBATCH --cpus-per-task=8"]
    assert "srun --nodes=1 --ntasks=1 --cpus-per-task=8 " in script
    assert "OMP_NUM_THREADS=2" in script, "of each rank"


def test_a_job_of_several_nodes_has_a_worker_on_each() -> None:
    script = render_workers(workers(spec(Launch(cpus=2, nodes=3, ranks_per_node=4))))
    said = [line for line in directives(script) if "nodes" in line or "tasks" in line or "cpus" in line]
    assert said == ["#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=8"]
    assert "srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --cpus-per-task=8 --kill-on-bad-exit=0 --wait=0 " in script


def test_trials_side_by_side_have_their_processors_and_share_gpus_as_told() -> None:
    of = Launch(cpus=2, ranks_per_node=2, gpus=1, trials_per_node=5, trials_per_gpu=2)
    script = render_workers(workers(spec(of)))
    said = [line for line in directives(script) if "cpus" in line or "gres" in line]
    assert said == ["#SBATCH --cpus-per-task=20", "#SBATCH --gres=gpu:6"]
    assert '--worker "$orc_worker" --slots 5 &\n' in script
    assert "--gres=gpu:a100:6" in render_workers(workers(spec(of, slurm={"gres": "gpu:a100:6"})))
    assert "gres" not in render_workers(workers(spec(of, slurm={"gpus-per-node": 6})))


def test_a_percent_sign_of_the_folder_is_no_pattern() -> None:
    script = render_workers(workers(spec(), root="/runs/100%A/digits-1"))
    assert "#SBATCH --output=/runs/100%%A/digits-1/logs/%A_%a.log" in directives(script)


def test_the_environment_that_goes_along_is_a_short_list() -> None:
    (line,) = [line for line in directives(render_workers(workers(spec()))) if "--export" in line]
    names = line.removeprefix("#SBATCH --export=").split(",")
    assert {"PATH", "HOME"} <= set(names)
    assert "ALL" not in names


# Refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"root": "runs/x"}, "root: 'runs/x' must be an absolute path"),
        ({"root": "/a\nb"}, "a newline can't be passed on"),
        ({"root": "/a\\b"}, "a backslash can't be passed on"),
        ({"python": "python"}, "python: 'python' must be an absolute path"),
        ({"python": "/a\0b"}, "NUL"),
        ({"root": "/a\udc80"}, "not valid UTF-8"),
        ({"sweep_id": "a\nb"}, "sweep_id"),
        ({"token": "$(x)"}, "token"),
    ],
)
def test_a_request_that_no_script_can_say_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        workers(spec(), **change)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (Launch(venv=".venv"), "launch.venv: '.venv' must be an absolute path"),
        (Launch(conda="envs/x"), "launch.conda"),
        (Launch(venv="/v", conda="x"), "conda and venv are given"),
        (Launch(setup="a\r\nb"), "launch.setup"),
        (Launch(modules=("a\0",)), "launch.modules[0]"),
    ],
)
def test_a_launch_that_no_script_can_say_is_refused(launch: Launch, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        workers(spec(launch))
    assert said in str(caught.value)


@pytest.mark.parametrize("option", [*sorted(OWNED), "-x", "x\ny", "Time", "x=1 --y", ""])
def test_an_option_that_is_ours_or_none_at_all_is_refused(option: str) -> None:
    for fields in ({"slurm": {option: "1"}}, {"reduce": Reduce(slurm={option: "1"})}):
        with pytest.raises(UsageError):
            workers(spec(**fields))


@pytest.mark.parametrize("value", [{"a": 1}, [["a"]], "a\nb", "a\0b"])
def test_an_option_s_value_is_one_line(value: object) -> None:
    with pytest.raises(UsageError, match=r"slurm\.x"):
        workers(spec(slurm={"x": value}))


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        workers(spec(Launch(venv="v"), slurm={"array": 1}, env={"A-B": "1"}), root="runs")
    assert len(str(caught.value).splitlines()) == 4


# Lint

PROLOGUES: list[dict[str, object]] = [
    {},
    {"modules": ("gcc/12", "cuda/12.4")},
    {"conda": "my env"},
    {"venv": "/opt/it's"},
    {"uv": "/home/ada/project"},
    {"apptainer": "/images/a b.sif"},
    {"setup": "ulimit -n 4096\nexport A=1"},
    {"modules": ("gcc",), "venv": "/opt/v", "setup": "echo hello"},
]


@pytest.fixture(scope="module")
def shellcheck() -> str:
    found = shutil.which("shellcheck")
    if found is None:
        assert not os.environ.get("CI"), "shellcheck is missing: apt-get install shellcheck"
        pytest.skip("shellcheck is missing: apt-get install shellcheck")
    return found


def test_shellcheck_finds_nothing(shellcheck: str, tmp_path: Path) -> None:
    env = {f"V{i}": value for i, value in enumerate(HOSTILE)}
    for form, prologue in itertools.product(("exec", "trap", "srun", "reducer"), PROLOGUES):
        launch = Launch(form="auto" if form == "reducer" else form, **prologue)  # type: ignore[arg-type]
        of = spec(launch, env=env)
        script = render_reducer(reducer(of)) if form == "reducer" else render_workers(workers(of))
        (tmp_path / f"{form}-{PROLOGUES.index(prologue)}.sh").write_text(script)
    done = subprocess.run([shellcheck, *sorted(tmp_path.iterdir())], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# Bash. `worker` stands for the interpreter: it logs how it was started and every signal, and does what WORKER says.

WORKER = """
import json, os, pathlib, signal, sys, time
log = open(os.environ["LOG"], "a", buffering=1)
say = lambda **what: log.write(json.dumps(what) + "\\n")
plan = {"slow": 0.0, "deaf": 0, "notices": 1, "status": 0, **json.loads(os.environ.get("WORKER", "{}"))}
heard = []

def notice(number, frame):
    heard.append(number)
    say(signal=signal.Signals(number).name)
    if len(heard) > plan["deaf"] and "ORC_ACK" in os.environ:
        pathlib.Path(os.environ["ORC_ACK"]).touch()

time.sleep(plan["slow"])
signal.signal(signal.SIGTERM, notice)
signal.signal(signal.SIGUSR1, notice)
if "ORC_READY" in os.environ:
    pathlib.Path(os.environ["ORC_READY"]).touch()
say(argv=sys.argv[1:], env=dict(os.environ))
limit = time.monotonic() + 20
while len(heard) < plan["notices"] + plan["deaf"] and not os.environ.get("ORC_NOTICE") and time.monotonic() < limit:
    time.sleep(0.01)
say(left=plan["status"])
if plan["status"] < 0:
    os.kill(os.getpid(), -plan["status"])
sys.exit(plan["status"])
"""


@dataclass(frozen=True)
class Bench:
    """A folder with a fake interpreter and a fake srun, to run scripts in."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "worker"

    @property
    def log(self) -> list[dict[str, object]]:
        path = self.root / "log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def told(self, key: str) -> list[object]:
        return [line[key] for line in self.log if key in line]

    @contextlib.contextmanager
    def run(
        self, form: str, worker: dict[str, object] | None = None, **launch: object
    ) -> Iterator[subprocess.Popen[str]]:
        of = spec(Launch(form=form, **launch))  # type: ignore[arg-type]
        request = workers(of, root=str(self.root), python=str(self.python), first_worker=40)
        with self.start(render_workers(request), worker or {}) as process:
            yield process

    @contextlib.contextmanager
    def start(self, script: str, worker: dict[str, object]) -> Iterator[subprocess.Popen[str]]:
        path = self.root / "script.sh"
        path.write_text(script)
        environment = {
            "PATH": f"{self.root}:{os.environ['PATH']}",
            "LOG": str(self.root / "log"),
            "WORKER": json.dumps(worker),
            "SLURM_ARRAY_TASK_ID": "2",
            "SLURM_EXPORT_ENV": "PATH",
            "TMPDIR": str(self.root / "tmp"),
            "HOME": "/",
        }
        process = subprocess.Popen(
            ["/bin/bash", path],
            cwd=self.root / "tmp",
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o700)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    root = tmp_path / "it's $(touch pwned) #1 100%A -x"
    (root / "tmp").mkdir(parents=True)
    executable(root / "worker", f"#!{sys.executable} -S\n{WORKER}")
    executable(root / "srun", '#!/bin/bash\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    return Bench(root)


def wait_for(what: Callable[[], object], limit_s: float = 15) -> None:
    limit = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < limit, "this never came true"
        time.sleep(0.005)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=15)
    return process.returncode, output


@pytest.mark.parametrize("form", FORMS)
def test_the_worker_gets_its_number_and_no_more_than_it_should(form: str, bench: Bench) -> None:
    with bench.run(form, {"notices": 0}, cpus=3) as process:
        assert finish(process) == (0, "")
    (argv,) = bench.told("argv")
    expected = ["-P", "-m", "orchestrator.supervisor", "work", "--dir", str(bench.root)]
    assert argv == [*expected, "--submission", "5eed" * 8, "--worker", "42"]
    (env,) = bench.told("env")
    assert isinstance(env, dict)
    assert env["OMP_NUM_THREADS"] == "3"
    assert not {"SLURM_EXPORT_ENV", "ORC_NOTICE"} & env.keys()
    assert not list((bench.root / "tmp").iterdir()), "something was left, or ran"


@pytest.mark.parametrize("form", FORMS)
def test_hostile_values_arrive_as_they_are_and_never_run(form: str, bench: Bench) -> None:
    values = {f"V{i}": value for i, value in enumerate(HOSTILE)}
    request = workers(spec(Launch(form=form), env=values), root=str(bench.root), python=str(bench.python))  # type: ignore[arg-type]
    with bench.start(render_workers(request), {"notices": 0}) as process:
        assert finish(process) == (0, "")
    (env,) = bench.told("env")
    assert isinstance(env, dict)
    assert {name: env[name] for name in values} == values
    assert not list(bench.root.rglob("pwned"))


@pytest.mark.parametrize("status", [0, 3, 75, -9])
@pytest.mark.parametrize("form", FORMS)
def test_the_worker_s_status_is_kept_through_a_notice(form: str, status: int, bench: Bench) -> None:
    with bench.run(form, {"status": status}) as process:
        wait_for(lambda: bench.told("argv"))
        process.send_signal(signal.SIGTERM)
        code, _ = finish(process)
    assert code in (status, 128 - status)
    assert bench.told("left") == [status]


@pytest.mark.parametrize(("form", "name"), [("trap", "SIGTERM"), ("srun", "SIGUSR1")])
def test_a_notice_is_passed_on_in_the_signal_of_the_form(form: str, name: str, bench: Bench) -> None:
    with bench.run(form) as process:
        wait_for(lambda: bench.told("argv"))
        process.send_signal(signal.SIGTERM)
        assert finish(process) == (0, "")
    assert bench.told("signal") == [name]
    assert not list((bench.root / "tmp").iterdir())


@pytest.mark.parametrize("form", ["trap", "srun"])
def test_every_notice_is_passed_on(form: str, bench: Bench) -> None:
    with bench.run(form, {"notices": 3}) as process:
        wait_for(lambda: bench.told("argv"))
        for count in (1, 2, 3):
            process.send_signal(signal.SIGTERM)
            wait_for(lambda count=count: len(bench.told("signal")) == count)
        assert finish(process) == (0, "")


@pytest.mark.parametrize("form", ["trap", "srun"])
def test_a_notice_that_is_lost_is_repeated_until_it_is_acknowledged(form: str, bench: Bench) -> None:
    with bench.run(form, {"deaf": 2}) as process:
        wait_for(lambda: bench.told("argv"))
        process.send_signal(signal.SIGTERM)
        assert finish(process) == (0, "")
    assert len(bench.told("signal")) == 3


@pytest.mark.parametrize("form", ["trap", "srun"])
def test_a_worker_that_can_t_listen_yet_is_not_killed_by_its_notice(form: str, bench: Bench) -> None:
    with bench.run(form, {"slow": 0.6}) as process:
        wait_for(lambda: any((bench.root / "tmp").glob("orc-*")))
        process.send_signal(signal.SIGTERM)
        assert finish(process) == (0, "")
    assert bench.told("left") == [0]


@pytest.mark.parametrize("form", FORMS)
def test_fault_42_a_notice_during_the_prologue_waits_for_the_worker(form: str, bench: Bench) -> None:
    setup = "touch ready\nuntil [ -e go ]; do sleep 0.01; done\nrm ready go\nset -eu\ntrap - TERM"
    with bench.run(form, setup=setup) as process:
        wait_for((bench.root / "tmp" / "ready").exists)
        process.send_signal(signal.SIGTERM)
        (bench.root / "tmp" / "go").touch()
        assert finish(process) == (0, "")
    (env,) = bench.told("env")
    assert isinstance(env, dict)
    assert env["ORC_NOTICE"] == "TERM"


@pytest.mark.parametrize("form", FORMS)
def test_fault_42_a_prologue_s_command_that_the_notice_ends_is_no_failure(form: str, bench: Bench) -> None:
    with bench.run(form, setup="echo $$ > ready\nsleep 15\nrm ready") as process:
        wait_for(lambda: (bench.root / "tmp" / "ready").exists() and children(process.pid))
        os.killpg(process.pid, signal.SIGTERM)
        code, _ = finish(process)
    assert code == 0
    assert bench.told("left") == [0]


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("setup", "said"),
    [
        ("true\nls nowhere 2>/dev/null\ntrue", "status 2 at: line {line}: ls nowhere 2> /dev/null"),
        (". ./missing 2>/dev/null", "status 1 at: line {first}: . ./missing"),
        ("set -e\nfalse", "status 1 at: line {line}: false"),
        ("(exit 7)", "status 7 at: line {first}: "),
    ],
)
def test_a_prologue_that_fails_names_its_line_and_starts_no_worker(
    form: str, setup: str, said: str, bench: Bench
) -> None:
    with bench.run(form, setup=setup) as process:
        code, output = finish(process)
    lines = (bench.root / "script.sh").read_text().splitlines()
    first = lines.index(setup.splitlines()[0]) + 1
    assert code != 0
    assert said.format(first=first, line=first + 1) in output
    assert not bench.log


@pytest.mark.parametrize(
    "setup", ["if false; then :; fi", "false || true", ". ./sourced", "f() { false; true; }; f", "false | true"]
)
def test_what_a_prologue_does_inside_is_its_own_affair(setup: str, bench: Bench) -> None:
    (bench.root / "tmp" / "sourced").write_text("false\n[ -n '' ] && true\ntrue\n")
    with bench.run("trap", {"notices": 0}, setup=setup) as process:
        assert finish(process) == (0, "")


def test_an_environment_that_can_t_be_entered_ends_the_script(bench: Bench) -> None:
    with bench.run("srun", venv=str(bench.root / "venv")) as process:
        code, output = finish(process)
    assert code != 0
    assert "the prologue ended with status 1 at: . " in output
    assert not bench.log


def test_the_interpreter_is_that_of_the_environment(bench: Bench) -> None:
    folder = bench.root / "my venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(bench.python)
    (folder / "activate").write_text('PATH="$PWD/../my venv/bin:$PATH"; export ACTIVE=1; false; true\n')
    with bench.run("srun", {"notices": 0}, venv=str(folder.parent)) as process:
        assert finish(process) == (0, "")
    (env,) = bench.told("env")
    assert isinstance(env, dict)
    assert env["ACTIVE"] == "1"


@pytest.mark.parametrize("form", FORMS)
def test_an_interpreter_that_is_missing_shows(form: str, bench: Bench) -> None:
    bench.python.unlink()
    with bench.run(form) as process:
        code, output = finish(process)
    assert code in (126, 127)
    assert "No such file or directory" in output
