from __future__ import annotations

from pathlib import Path

import pytest
from fakes import FakeSlurm

from orchestrator.errors import OrcError, SbatchRejected, SlurmUnreachable
from orchestrator.slurm import commands as slurm
from orchestrator.slurm.commands import JobId, Patience

QUICK = Patience(timeout_s=20, tries=3, pause_s=0.01)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "it's a $(script).sh"
    path.write_text("#!/bin/bash\n#SBATCH --job-name=name\n#SBATCH --partition=low\n")
    return path


def test_sbatch_gets_an_argument_list_and_gives_the_job(fake: FakeSlurm, script: Path) -> None:
    assert slurm.sbatch(script, comment="orc:t:reducer", dependency="afterany:1:2") == JobId(id="101")
    expected = ["--parsable", "--comment=orc:t:reducer", "--dependency=afterany:1:2", str(script)]
    assert fake.argv("sbatch") == [expected]


@pytest.mark.parametrize(
    ("answer", "job"),
    [("7\\n", JobId(id="7")), ("7;red\\n", JobId(id="7", cluster="red")), ("Welcome!\\n\\n7\\n", JobId(id="7"))],
)
def test_a_job_id_is_found_in_what_sbatch_prints(fake: FakeSlurm, script: Path, answer: str, job: JobId) -> None:
    fake.will("sbatch", f"say {answer}")
    assert slurm.sbatch(script, comment="c") == job


def test_an_answer_without_a_job_id_is_named(fake: FakeSlurm, script: Path) -> None:
    fake.will("sbatch", "say Submitted batch job seven\\n")
    with pytest.raises(OrcError, match="expected a job id, got 'Submitted batch job seven"):
        slurm.sbatch(script, comment="c")


def test_a_refusal_carries_sbatchs_own_words(fake: FakeSlurm, script: Path) -> None:
    fake.will("sbatch", "reject invalid partition specified: no-such")
    with pytest.raises(SbatchRejected, match="invalid partition specified: no-such") as caught:
        slurm.sbatch(script, comment="c", patience=QUICK)
    assert caught.value.exit_code == 2
    assert fake.commands == ["sbatch"]


def test_a_silent_controller_is_asked_again(fake: FakeSlurm, script: Path) -> None:
    fake.will("sbatch", "down", "down", "ok")
    assert slurm.sbatch(script, comment="c", patience=QUICK).id == "101"
    assert len(fake.jobs) == 1


def test_a_job_whose_answer_was_lost_is_found_not_repeated(fake: FakeSlurm, script: Path) -> None:
    fake.will("sbatch", "lost")
    assert slurm.sbatch(script, comment="orc:t:workers-0", patience=QUICK).id == "101"
    assert fake.commands == ["sbatch", "squeue"]
    assert len(fake.jobs) == 1


def test_tries_are_bounded_and_the_remedy_is_named(fake: FakeSlurm, script: Path) -> None:
    fake.will("sbatch", *["down"] * 9)
    with pytest.raises(
        SlurmUnreachable, match=r"Unable to contact slurm controller.*run the same command again"
    ) as caught:
        slurm.sbatch(script, comment="c", patience=QUICK)
    assert caught.value.exit_code == 5
    assert fake.commands.count("sbatch") == 3


def test_a_command_that_hangs_is_given_up(fake: FakeSlurm) -> None:
    fake.will("squeue", "hang")
    with pytest.raises(SlurmUnreachable, match=r"squeue: .*no answer within 0\.3 s"):
        slurm.queue(patience=Patience(timeout_s=0.3))


def test_without_slurm_the_text_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.available()
    with pytest.raises(SlurmUnreachable, match="--on local"):
        slurm.sbatch(script, comment="c")


def test_nothing_of_a_job_around_us_reaches_the_new_one(
    fake: FakeSlurm, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SBATCH_ARRAY_INX", "SBATCH_TIMELIMIT", "RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SBATCH_ACCOUNT", "physics")
    monkeypatch.setenv("SBATCH_PARTITION", "the script decides")
    slurm.sbatch(script, comment="c")
    assert fake.calls[0]["env"] == {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "physics"}


def test_the_queue_has_a_row_an_element_and_keeps_hostile_names(fake: FakeSlurm) -> None:
    name, comment = "a|b\nc $(x) JobId=1", "d|e\nf"
    fake.jobs = [
        {"id": "5", "tasks": 2, "name": name, "comment": comment, "state": "PENDING"},
        {"id": "6", "tasks": 0, "name": "n", "comment": "(null)", "state": "COMPLETED"},
    ]
    first, second, third = slurm.queue()
    assert (first.job_id, first.array_job_id, first.task_id) == ("5_0", "5", 0)
    assert (first.name, first.comment, first.partition, first.is_live) == (name, comment, "low", True)
    assert (second.job_id, second.task_id) == ("5_1", 1)
    assert (third.job_id, third.task_id, third.comment, third.is_live) == ("6", None, "", False)


def test_rows_of_several_clusters_are_told_apart(fake: FakeSlurm) -> None:
    row = "\x1e{}\x1f{}\x1fN/A\x1fRUNNING\x1fNone\x1fn\x1fc\x1f2030-01-01T00:00:00\x1flow\\n"
    fake.will("squeue", "say CLUSTER: red\\n" + row.format(1, 1) + "\\nCLUSTER: blue\\n" + row.format(1, 1))
    assert [(row.job_id, row.cluster, row.partition) for row in slurm.queue(clusters=["red", "blue"])] == [
        ("1", "red", "low"),
        ("1", "blue", "low"),
    ]
    assert "--clusters=red,blue" in fake.argv("squeue")[0]


def test_a_job_is_described_by_pairs_and_a_mimic_in_free_text_loses(fake: FakeSlurm) -> None:
    line = "JobId=7 JobName=n JobState=RUNNING PreemptTime=None Comment=a b JobState=FAILED Nice=0"
    fake.will("scontrol", f"say {line}\\n")
    found = slurm.show_job("7")
    assert found is not None
    assert (found["JobState"], found["PreemptTime"], found["Nice"]) == ("RUNNING", "None", "0")


def test_an_unknown_job_is_none(fake: FakeSlurm) -> None:
    fake.will("scontrol", "reject Invalid job id specified")
    assert slurm.show_job("7") is None


def test_the_configuration_is_read_once_for_all(fake: FakeSlurm) -> None:
    assert slurm.config()["MaxArraySize"] == "1001"
    assert fake.argv("scontrol") == [["show", "config"]]


def test_cancelling_what_is_gone_is_fine_and_a_refusal_is_not(fake: FakeSlurm) -> None:
    fake.will("scancel", "reject Kill job error on job id 5: Invalid job id specified", "reject Access denied")
    slurm.cancel(["5"])
    with pytest.raises(OrcError, match="Access denied"):
        slurm.cancel(["5"])
    slurm.cancel([])
    assert len(fake.calls) == 2


@pytest.mark.parametrize(
    ("todo", "on_its_way"),
    [("ok", True), ("reject Job is pending execution", True), ("reject Requested operation is disabled", False)],
)
def test_a_requeue_counts_when_the_job_is_on_its_way(fake: FakeSlurm, todo: str, on_its_way: bool) -> None:
    fake.will("scontrol", todo)
    assert slurm.requeue("5_1") is on_its_way


@pytest.mark.parametrize(
    ("message", "over"),
    [
        ("QOSMaxSubmitJobPerUserLimit", True),
        ("AssocMaxSubmitJobLimit", True),
        ("Invalid job array specification", True),
        ("invalid partition specified", False),
        ("QOSMaxWallDurationPerJobLimit", False),
    ],
)
def test_a_limit_on_jobs_is_told_from_other_refusals(message: str, over: bool) -> None:
    assert slurm.is_over_limit(SbatchRejected(f"x.sh: sbatch refused it: {message}")) is over


def test_without_accounting_nothing_is_known(fake: FakeSlurm) -> None:
    assert slurm.accounting(["5"]) == []
    assert slurm.submit_limit() is None


def test_the_least_limit_of_ones_own_qualities_counts(fake: FakeSlurm) -> None:
    fake.will("sacctmgr", "say 500|normal,long\\n|normal\\n", "say normal|200\\nlong|\\nforeign|3\\n")
    assert slurm.submit_limit() == 200


def test_a_requeue_without_an_answer_is_no_refusal(fake: FakeSlurm) -> None:
    # What scontrol requeue says on 22.05 when the controller is down.
    fake.will("scontrol", "reject Unexpected message received for job 5")
    with pytest.raises(SlurmUnreachable):
        slurm.requeue("5")
