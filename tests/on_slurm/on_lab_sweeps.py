"""Whole sweeps on a lab, by the real command line, for tests: a folder with a sweep file, `orc`, and the faults."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from invariants import Jobs, check
from on_lab import Slurm

from orchestrator.core.paths import SweepPaths

__all__ = ["WINDOW", "Bench", "Make", "build"]

# A trial that knows nothing of us, and starts in a tenth of a second: by its index it fails, diverges, or is fine.
PROGRAM = """
import json, os, signal, sys, time
params = json.load(open(os.environ["ORC_PARAMS"]))
index = int(os.environ["ORC_TRIAL"])
time.sleep(params["seconds"])
if params["trouble"] and index % 10 == 3:
    sys.exit(1)
if params["trouble"] and index % 20 == 7:
    os.kill(os.getpid(), signal.SIGSEGV)
loss = float("nan") if params["trouble"] and index % 10 == 5 else 1.0 / (1 + params["x"]) + index * 1e-3
with open(os.environ["ORC_REPORT"], "a") as report:
    report.write(json.dumps({"step": 1, "val_loss": loss}) + "\\n")
"""

# A trial of `steps` steps that saves after each; it stays at its third until the file `go` is there, so that a fault
# finds it in the middle. `at_term`: `leave` (saved, gone), `save` (takes a second for it, then gone), `hold` (takes for
# it until the file `saved` is there) or `ignore`.
STEPS = """
import json, os, pathlib, signal, sys, time
params = json.load(open(os.environ["ORC_PARAMS"]))
index, folder, logs = os.environ["ORC_TRIAL"], pathlib.Path(os.environ["ORC_CHECKPOINT"]), pathlib.Path("marks")
logs.mkdir(exist_ok=True)
def leave(*_):
    with (logs / f"{index}.notices").open("a") as notices:
        print(time.time(), file=notices)
    if params["at_term"] == "save":
        (logs / f"{index}.saving").touch()
        time.sleep(1)
        (logs / f"{index}.saved").touch()
    if params["at_term"] == "hold":
        (logs / f"{index}.saving").touch()
        while not os.path.exists("saved"):
            time.sleep(0.02)
    if params["at_term"] != "ignore":
        os._exit(75)
signal.signal(signal.SIGTERM, leave)
state = folder / "step"
step = int(state.read_text()) if state.exists() else 0
print("from step", step, flush=True)
with (logs / f"{index}.from").open("a") as trace:
    print(step, file=trace)
while step < 6:
    step += 1
    (folder / "new").write_text(str(step))
    (folder / "new").rename(state)
    with (logs / f"{index}.steps").open("a") as trace:
        print(step, file=trace)
    (logs / f"{index}.at-{step}").touch()
    while step >= params["stay"] and not os.path.exists("go"):
        time.sleep(0.02)
with open(os.environ["ORC_REPORT"], "a") as report:
    report.write(json.dumps({"step": step, "val_loss": 1.0 / (1 + params["x"]) + int(index) * 1e-3}) + "\\n")
"""

SWEEP = """
command: ["{python}", trial.py]
name: {name}
method: random
run_cap: {trials}
parameters:
  x: {{min: 0.0, max: 10.0}}
{parameters}
launch: {{trials_per_task: {block}, lease_s: 5, notice_s: {notice_s}, form: {form}{launch}}}
reduce: {{visibility_s: 2}}
slurm: {{{slurm}}}
"""


WINDOW = {"time": 10, "notice_s": 540}
"""For tests with the fixture `unannounced`: a job of ten minutes whose whole time is near its end."""


@dataclass(frozen=True)
class Bench:
    """A folder with a sweep file, and `orc` in it."""

    folder: Path
    slurm: Slurm
    runs: str = "runs"

    def below(self, runs: str) -> Bench:
        """The same, for sweeps in another folder."""
        return replace(self, runs=runs)

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """`orc`, whatever it says."""
        return subprocess.run(
            [sys.executable, "-m", "orchestrator", *argv],
            cwd=self.folder,
            env={**self.slurm.env, "ORC_DIR": self.runs},
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )

    def orc(self, *argv: str, code: int | None = 0) -> str:
        """Standard output of `orc`; None for any exit code."""
        done = self.run(*argv)
        assert code is None or done.returncode == code, f"orc {argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    def submit(self, *options: str) -> str:
        """The id of the sweep, submitted."""
        return self.orc("submit", "sweep.yaml", *options).strip()

    def paths(self, sweep: str) -> SweepPaths:
        return SweepPaths(self.folder / self.runs / sweep)

    def status(self, sweep: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.orc("status", "--json", sweep))
        return found

    def trials(self, sweep: str) -> dict[str, int]:
        trials = self.status(sweep)["trials"]
        assert isinstance(trials, dict)
        return trials

    def jobs(self, sweep: str) -> list[dict[str, str]]:
        jobs = self.status(sweep)["jobs"]
        assert isinstance(jobs, list)
        return jobs

    def all_jobs(self, sweep: str) -> Jobs:
        """Every part that was ever submitted."""
        lines = self.paths(sweep).submissions.read_text().splitlines()
        ids = tuple(job for line in lines if (job := json.loads(line).get("job")))
        return Jobs(ids, self.slurm.env["SLURM_CONF"])

    def worker(self, sweep: str, number: int = 0) -> str:
        """The newest submission's worker `number`, as Slurm's commands name it."""
        lines = map(json.loads, self.paths(sweep).submissions.read_text().splitlines())
        return f"{[line['job'] for line in lines if line.get('job') and line['what'] == 'workers-0'][-1]}_{number}"

    def summary_file(self, sweep: str) -> Path:
        return self.folder / self.runs / sweep / "summary.json"

    def is_reduced(self, sweep: str) -> bool:
        return self.summary_file(sweep).exists() and not json.loads(self.summary_file(sweep).read_bytes())["missing"]

    def wait_until_reduced(self, sweep: str, limit_s: float = 90) -> bytes:
        self.slurm.wait_for(lambda: self.is_reduced(sweep), limit_s)
        return self.summary_file(sweep).read_bytes()

    def undisturbed(self) -> bytes:
        """The bytes of the same sweep, run on this machine in peace."""
        marks, kept = self.folder / "marks", self.folder / "marks.kept"
        if marks.exists():
            marks.rename(kept)
        self.orc("run", "sweep.yaml", "--dir", "calm", "--workers", "2", code=None)
        if kept.exists():
            shutil.rmtree(marks)
            kept.rename(marks)
        return next((self.folder / "calm").glob("*/summary.json")).read_bytes()

    def do_as_told(self, sweep: str) -> list[str]:
        """Run the commands by which status says that something which stands still goes on; returns them."""
        said = self.orc("status", sweep)
        found = re.findall(r"(?:is held|nothing of it is running); `([^`]+)`", said)
        for command in found:
            program, *arguments = command.split()
            if program == "orc":
                self.orc(*arguments)
            else:
                self.slurm.run(program, *arguments)
        return found

    def lines(self, sweep: str, kind: str) -> list[dict[str, str]]:
        """Every record of one kind."""
        texts = [path.read_text() for path in self.paths(sweep).records.glob("*.jsonl")]
        lines = [json.loads(line) for text in texts for line in text.splitlines()]
        return [line for line in lines if line["kind"] == kind]

    def notices(self, sweep: str) -> list[dict[str, str]]:
        return self.lines(sweep, "notice")

    def token(self, sweep: str) -> str:
        """The part of the first submission's token that job names carry."""
        return str(json.loads(self.paths(sweep).submissions.read_text().splitlines()[0])["submission"])[:8]

    # Of trials that take steps

    def wait_for_step(self, step: int = 3, trial: int = 0) -> None:
        self.slurm.wait_for((self.folder / "marks" / f"{trial}.at-{step}").exists, 60)

    def let_go(self) -> None:
        """From here on no trial stays anywhere."""
        (self.folder / "go").touch()

    def began_from(self, trial: int = 0) -> list[int]:
        """At which step each attempt began."""
        return list(map(int, (self.folder / "marks" / f"{trial}.from").read_text().split()))

    def urgent(self, node: str) -> None:
        """Displace what runs on a node, for a second."""
        script = self.folder / ".urgent.sh"
        script.write_text("#!/bin/sh\nsleep 1\n")
        self.slurm.submit(script, "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null")

    def finish(self, sweep: str, *, says: tuple[str, ...] = (), limit_s: float = 90) -> None:
        """Wait for the end, and see that nothing was lost and nothing is left."""
        self.let_go()
        self.wait_until_reduced(sweep, limit_s)
        self.slurm.wait_for(lambda: not self.jobs(sweep))
        check(self.paths(sweep), undisturbed=self.undisturbed(), jobs=self.all_jobs(sweep), says=says)


Make = Callable[..., Bench]


def build(
    folder: Path,
    slurm: Slurm,
    *,
    program: str = PROGRAM,
    trials: int = 12,
    block: int = 3,
    seconds: float = 0.0,
    trouble: bool = False,
    at_term: str = "leave",
    stay: int = 3,
    options: str = "time: 10",
    launch: str = "",
    form: str = "auto",
    notice_s: int = 30,
) -> Bench:
    """A bench with a sweep of `program`; `options` are sbatch's, `launch` is more of that key."""
    fixed = {"at_term": at_term, "stay": stay} if program == STEPS else {"seconds": seconds, "trouble": trouble}
    (folder / "trial.py").write_text(textwrap.dedent(program))
    text = SWEEP.format(
        python=sys.executable,
        name=folder.name.replace("[", ".").replace("]", ""),
        trials=trials,
        parameters="\n".join(f"  {name}: {{value: {json.dumps(value)}}}" for name, value in fixed.items()),
        block=block,
        slurm=options,
        form=form,
        launch=launch and f", {launch}",
        notice_s=notice_s,
    )
    (folder / "sweep.yaml").write_text(text)
    return Bench(folder, slurm)
