"""What reaches a worker when Slurm wants it gone, for every launch form as rendered: the table of notices, row by row.

All jobs run at the same time, since a time limit takes a minute; whichever xdist worker comes first watches them, and
the others read what it saw (with --dist loadfile nobody waits for it). The process under the script is `listener.py`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from filelock import FileLock
from on_lab import Slurm

from orchestrator.config.spec import Launch, SweepSpec
from orchestrator.core.atomic import Json
from orchestrator.slurm.lab import LabOptions
from orchestrator.slurm.script import WorkersRequest, render_workers

if TYPE_CHECKING:
    from conftest import LabFactory

Form = Literal["exec", "trap", "srun"]
FORMS: tuple[Form, ...] = ("exec", "trap", "srun")
SIGNALS = {"signal TERM": "TERM", "signal USR1": "USR1"}
SHARED_NODE_EVENTS = ("time limit", "cancel", *SIGNALS)
PREEMPTIONS = ("preemption", "preemption with user signal")
GRACE_S = 10
KILL_WAIT_S = 5
LIMIT_S = 60
QUIET = LabOptions(nodes=4, cpus=16, grace_time_s=GRACE_S, kill_wait_s=KILL_WAIT_S)
TELLING = LabOptions(nodes=3, cpus=4, grace_time_s=GRACE_S, kill_wait_s=KILL_WAIT_S, send_user_signal=True)


def script(form: Form, folder: Path, python: Path, options: dict[str, Json]) -> str:
    """The batch script of one worker of the sweep in `folder`; `python` is run as its interpreter."""
    spec = SweepSpec(
        name="notices",
        method="grid",
        parameters={},
        command=("true",),
        slurm=options,
        launch=Launch(form=form, notice_s=30),
    )
    return render_workers(
        WorkersRequest(
            spec=spec,
            sweep_id="notices-0123abcd4567",
            root=str(folder),
            python=str(python),
            token="5eed" * 8,
            num_workers=1,
        )
    )


@dataclass(frozen=True, slots=True)
class Job:
    """One job under one event."""

    slurm: Slurm
    folder: Path
    id: str

    def lines(self) -> list[dict[str, str | float]]:
        file = self.folder / "events.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def signals(self) -> list[tuple[str, float]]:
        """Name and time of every signal that the first run heard."""
        return [(str(line["what"]), float(line["at"])) for line in self.lines() if not line["restarts"]][1:]

    def starts(self) -> list[float]:
        return [float(line["at"]) for line in self.lines() if line["what"] == "start"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What came of one event: signals as (name, seconds after the event), the state after it, and how often it ran."""

    signals: list[tuple[str, float]]
    state: str
    num_starts: int

    def first(self, name: str) -> float:
        """Seconds from the event to the first signal of that name; infinite when there was none."""
        return min((at for found, at in self.signals if found == name), default=float("inf"))


def submit(slurm: Slurm, base: Path, python: Path, form: Form, event: str) -> Job:
    folder = base / f"{form}-{event}".replace(" ", "-")
    (folder / "logs").mkdir(parents=True)
    alone: dict[str, Json] = {"nodelist": f"n{FORMS.index(form)}", "exclusive": True}
    where = alone if event in PREEMPTIONS else {"nodelist": "n3"}
    options = {**where, "time": 1 if event == "time limit" else 10}
    (folder / "job.sh").write_text(script(form, folder, python, options))
    return Job(slurm, folder, f"{slurm.submit(folder / 'job.sh')}_0")


def cause(job: Job, form: Form, event: str) -> None:
    """Make the event happen; a time limit comes by itself."""
    if event == "cancel":
        job.slurm.run("scancel", job.id)
    if event in SIGNALS:
        job.slurm.run("scancel", "--batch", "--signal", SIGNALS[event], job.id)
    if event in PREEMPTIONS:
        (job.folder / "preemptor.sh").write_text("#!/bin/sh\n")
        node = f"n{FORMS.index(form)}"
        job.slurm.submit(job.folder / "preemptor.sh", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null")


def is_over(job: Job, event: str) -> bool:
    if event in SIGNALS:
        return bool(job.signals())
    if event in PREEMPTIONS:
        return len(job.starts()) > 1
    return job.slurm.job_state(job.id) in ("CANCELLED", "TIMEOUT", "FAILED", "COMPLETED")


def moment(job: Job, event: str, caused: float) -> float:
    """When the event came, in seconds since 1970: for a time limit the limit, for a preemption Slurm's PreemptTime."""
    if event == "time limit":
        return job.starts()[0] + LIMIT_S
    if event in PREEMPTIONS:
        return datetime.fromisoformat(job.slurm.show(job.id)["PreemptTime"]).timestamp()
    return caused


def watch(slurms: dict[str, Slurm], base: Path, python: Path) -> dict[str, Seen]:
    """Submit everything, cause everything, wait for everything."""
    jobs = {(form, event): submit(slurms[event], base, python, form, event) for event, form in product(slurms, FORMS)}
    first = next(iter(slurms.values()))
    first.wait_for(lambda: all(job.starts() for job in jobs.values()), 60)
    moments: dict[tuple[Form, str], float] = {}
    for (form, event), job in jobs.items():
        caused = datetime.now().timestamp()
        cause(job, form, event)
        if event in PREEMPTIONS:
            job.slurm.wait_for(lambda job=job: job.slurm.show(job.id).get("PreemptTime", "None") != "None")
        moments[form, event] = moment(job, event, caused)
    seen = {}
    for (form, event), job in sorted(jobs.items(), key=lambda item: item[0][1] == "time limit"):
        job.slurm.wait_for(lambda job=job, event=event: is_over(job, event), LIMIT_S + 60)
        signals = [(name, at - moments[form, event]) for name, at in job.signals()]
        seen[f"{form} {event}"] = Seen(signals=signals, state=job.slurm.job_state(job.id), num_starts=len(job.starts()))
        job.slurm.run("scancel", "--quiet", job.id)
    return seen


def stand_in(folder: Path) -> Path:
    """An executable that ignores the interpreter's options and listens."""
    file = folder / "python"
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).with_name("listener.py")}" "$@"\n')
    file.chmod(0o700)
    return file


@pytest.fixture(scope="session")
def seen(shared: Path, lab_of: LabFactory) -> dict[str, Seen]:
    file, base = shared / "notices.json", shared / "notices"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            base.mkdir()
            quiet, telling = Slurm(lab_of(QUIET)), Slurm(lab_of(TELLING))
            slurms = dict.fromkeys((*SHARED_NODE_EVENTS, "preemption"), quiet) | {PREEMPTIONS[1]: telling}
            result = watch(slurms, base, stand_in(base))
            file.write_text(json.dumps({key: asdict(value) for key, value in result.items()}))
        return {key: Seen(**value) for key, value in json.loads(file.read_text()).items()}


NOTICE = {"exec": "TERM", "trap": "TERM", "srun": "USR1"}


@pytest.mark.parametrize("form", FORMS)
def test_cancel_asks_every_form_at_once(seen: dict[str, Seen], form: Form) -> None:
    it = seen[f"{form} cancel"]
    assert it.first("TERM") < 3
    assert it.state == "CANCELLED"


@pytest.mark.parametrize("form", FORMS)
def test_a_time_limit_is_announced_before_it_comes(seen: dict[str, Seen], form: Form) -> None:
    it = seen[f"{form} time limit"]
    assert -LIMIT_S < it.first(NOTICE[form]) < -15
    assert it.state == "TIMEOUT"


@pytest.mark.parametrize("form", FORMS)
def test_a_job_at_its_time_limit_is_not_requeued(seen: dict[str, Seen], form: Form) -> None:
    assert seen[f"{form} time limit"].num_starts == 1


@pytest.mark.parametrize("form", ["exec", "trap"])
def test_a_batch_process_hears_of_a_preemption_only_when_its_grace_is_over(seen: dict[str, Seen], form: Form) -> None:
    it = seen[f"{form} preemption"]
    assert it.signals
    assert min(at for _, at in it.signals) > GRACE_S - 3


def test_a_step_hears_of_a_preemption_at_once(seen: dict[str, Seen]) -> None:
    assert seen["srun preemption"].first("TERM") < 4


@pytest.mark.parametrize("form", FORMS)
def test_with_user_signals_every_form_hears_of_a_preemption_at_once(seen: dict[str, Seen], form: Form) -> None:
    assert seen[f"{form} preemption with user signal"].first(NOTICE[form]) < 4


@pytest.mark.parametrize(("form", "event"), list(product(FORMS, PREEMPTIONS)))
def test_a_preempted_job_starts_again(seen: dict[str, Seen], form: Form, event: str) -> None:
    assert seen[f"{form} {event}"].num_starts == 2


@pytest.mark.parametrize(("form", "event"), list(product(FORMS, SIGNALS)))
def test_a_signal_by_hand_is_passed_on_and_the_job_goes_on(seen: dict[str, Seen], form: Form, event: str) -> None:
    it = seen[f"{form} {event}"]
    expected = SIGNALS[event] if form == "exec" else NOTICE[form]
    assert it.first(expected) < 3
    assert it.state == "RUNNING"


@pytest.mark.parametrize("event", ["signal TERM", "signal USR1"])
def test_a_step_is_never_sent_a_term_for_a_signal_to_the_batch_shell(seen: dict[str, Seen], event: str) -> None:
    assert seen[f"srun {event}"].first("TERM") == float("inf")
