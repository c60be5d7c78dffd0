"""Slurm's commands, and nothing else calls them: sbatch, squeue, scontrol, scancel, sacct, sacctmgr.

    job = slurm.sbatch(script, comment="orc:<token>:workers-0")
    rows = slurm.queue()                 every job of mine, one squeue
    slurm.cancel([row.job_id for row in rows if row.is_live])

Commands are argument lists, never a shell; each has a time limit and runs in an environment without the variables of a
job around us and without those of sbatch that would override a script's own lines. A command that gets no answer raises
`SlurmUnreachable`; one that is refused carries Slurm's own words.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from orchestrator.errors import OrcError, SbatchRejected, SlurmUnreachable
from orchestrator.slurm.environment import for_command

__all__ = [
    "PATIENCE",
    "AccountRow",
    "JobId",
    "JobRow",
    "Patience",
    "accounting",
    "available",
    "cancel",
    "check",
    "config",
    "find_by_comment",
    "has_ended",
    "is_over_limit",
    "queue",
    "release",
    "requeue",
    "sbatch",
    "show_job",
    "start_now",
    "submit_limit",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for Slurm.

    Args:
        timeout_s: one command's time, in seconds.
        tries: how often a submission without an answer is tried.
        pause_s: pause before the second try, in seconds; doubled before each further one.
    """

    timeout_s: float = 30.0
    tries: int = 3
    pause_s: float = 2.0


PATIENCE = Patience()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobId:
    """A job as sbatch names it; `cluster` is set only where several clusters are served."""

    id: str
    cluster: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """One job or array element in the queue.

    Args:
        job_id: as commands take it: `123`, or `123_4` for an array element.
        array_job_id: the array's id, or the job's own.
        task_id: index in the array, None for a job that is none.
        state: Slurm's long name, such as PENDING.
        reason: why it waits, in Slurm's words.
        name: job name.
        comment: what `sbatch --comment` said.
        submit_time: local time of the controller, ISO 8601 without a zone.
        partition: where it waits or runs.
        cluster: set only when asked with `clusters`.
    """

    job_id: str
    array_job_id: str
    task_id: int | None
    state: str
    reason: str
    name: str
    comment: str
    submit_time: str
    partition: str
    cluster: str | None = None

    @property
    def is_live(self) -> bool:
        """Whether it waits, runs or is about to run again."""
        return not has_ended(self.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountRow:
    """What accounting remembers of a job: `exit_code` is Slurm's `code:signal`."""

    job_id: str
    state: str
    exit_code: str


_FINISHED = frozenset(
    [
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
        *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    ]
)


def has_ended(state: str) -> bool:
    """Whether a job in this state, in Slurm's long name, will never run again by itself."""
    return state in _FINISHED


# A record and a field start with a character that no name can hold by accident: names and comments hold anything else.
_RECORD, _FIELD = "\x1e", "\x1f"
_QUEUE_FORMAT = _RECORD + _FIELD.join(("%i", "%F", "%K", "%T", "%r", "%j", "%k", "%V", "%P"))

# Patterns are text, compiled when first used: most commands have no use for them, and each takes half a millisecond.
_NO_ANSWER = (
    r"(?i)Unable to contact slurm controller|Socket timed out|Connection (closed|refused|reset|timed out)"
    r"|Zero Bytes were transmitted|Could not establish a configuration source|Communication connection failure"
    r"|Transport endpoint|Protocol authentication error|backup controller in standby|Resource temporarily unavailable"
    r"|Unexpected message received"
)
_OVER_LIMIT = r"(?i)MaxSubmit|Invalid job array specification"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    code: int
    out: str
    error: str

    @property
    def words(self) -> str:
        """Slurm's own message, in one line."""
        return "; ".join(line.strip() for line in (self.error or self.out).splitlines() if line.strip())


def _run(argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None) -> _Answer:
    """Run one of Slurm's commands.

    Raises:
        SlurmUnreachable: the command is missing, gave no answer in time, or could not reach the controller.
    """
    import subprocess  # takes 2 ms, and `orc status` of a sweep with no job asks Slurm nothing

    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            check=False,
            encoding="utf-8",
            env=for_command() if env is None else env,
            errors="surrogateescape",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
        )
    except FileNotFoundError:
        raise SlurmUnreachable(_missing(argv[0])) from None
    except PermissionError as error:
        raise SlurmUnreachable(f"{argv[0]}: can't be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        _unreachable(argv[0], f"no answer within {timeout_s:g} s")
    answer = _Answer(code=done.returncode, out=done.stdout, error=done.stderr)
    if answer.code and re.search(_NO_ANSWER, answer.error):
        _unreachable(argv[0], answer.words)
    return answer


def _missing(command: str) -> str:
    return (
        f"{command}: no such command on PATH, so there is no Slurm here. Use a login node (or load its module), "
        "run on this machine with `--on local`, or start a private Slurm with `orc lab up`"
    )


def _unreachable(command: str, words: str) -> NoReturn:
    raise SlurmUnreachable(
        f"{command}: Slurm does not answer ({words}). Nothing is lost: run the same command again once "
        "`scontrol ping` says that the controller is up"
    )


def _has(command: str) -> bool:
    import shutil

    return shutil.which(command) is not None


def available() -> bool:
    """Whether Slurm's commands are on PATH; says nothing about the controller."""
    return _has("sbatch")


def sbatch(
    script: Path,
    *,
    comment: str,
    dependency: str | None = None,
    extra: Sequence[str] = (),
    patience: Patience = PATIENCE,
) -> JobId:
    """Submit `script` once, whatever the controller does meanwhile.

    Args:
        script: the script's file.
        comment: unique to this submission; by it a submission whose answer was lost is found again.
        dependency: value of `--dependency`, such as `afterany:123`.
        extra: further options of sbatch.
        patience: limits on time and tries.

    Raises:
        SbatchRejected: sbatch refused; its own words are in the text.
        SlurmUnreachable: no answer after all tries; the job may exist, `find_by_comment` will tell.
    """
    argv = ["sbatch", "--parsable", f"--comment={comment}", *extra]
    argv += [f"--dependency={dependency}"] if dependency else []
    env = for_command(_text(script))

    def attempt() -> JobId:
        return _parse_job_id(_accepted(_run([*argv, str(script)], timeout_s=patience.timeout_s, env=env), script))

    try:
        return attempt()
    except SlurmUnreachable as error:
        if not available():
            raise
        return _again(attempt, comment, patience, error)


def _again(attempt: Callable[[], JobId], comment: str, patience: Patience, error: SlurmUnreachable) -> JobId:
    """Try once more, but first look whether the unanswered try arrived after all."""
    pause_s = patience.pause_s
    for _ in range(patience.tries - 1):
        time.sleep(pause_s)
        pause_s *= 2
        try:
            found = find_by_comment(comment, patience=patience)
            return JobId(id=found[0].array_job_id, cluster=found[0].cluster) if found else attempt()
        except SlurmUnreachable as again:
            error = again
    raise error


def check(script: Path, *, patience: Patience = PATIENCE) -> str:
    """What `sbatch --test-only` says of `script`: when it would start. Submits nothing.

    Raises:
        SbatchRejected: it would be refused.
        SlurmUnreachable: no Slurm, or no answer.
    """
    argv = ["sbatch", "--test-only", str(script)]
    return _accepted(_run(argv, timeout_s=patience.timeout_s, env=for_command(_text(script))), script).words


def _text(script: Path) -> str:
    return script.read_text(encoding="utf-8", errors="surrogateescape")


def _accepted(answer: _Answer, script: Path) -> _Answer:
    if answer.code:
        raise SbatchRejected(f"{script}: sbatch refused it: {answer.words or f'exit code {answer.code}'}")
    return answer


def _parse_job_id(answer: _Answer) -> JobId:
    """Site wrappers print greetings, so only the last line counts; `--parsable` gives `id` or `id;cluster`."""
    last = answer.out.strip().rpartition("\n")[2]
    number, _, cluster = last.partition(";")
    if not number.isdigit():
        raise OrcError(f"sbatch: expected a job id, got {answer.out!r}")
    return JobId(id=number, cluster=cluster.strip() or None)


def is_over_limit(error: SbatchRejected) -> bool:
    """Whether a refusal means "too many jobs at once" rather than "never"."""
    return bool(re.search(_OVER_LIMIT, str(error)))


def queue(user: str | None = None, *, clusters: Sequence[str] = (), patience: Patience = PATIENCE) -> list[JobRow]:
    """Every job of `user` (default: of this process) that Slurm remembers, arrays one row an element: one squeue.

    Finished jobs stay for MinJobAge, so look at `is_live`. Never asks for single ids: squeue fails on one unknown id.

    Raises:
        SlurmUnreachable: no Slurm, or no answer.
    """
    whose = user or str(os.getuid())
    argv = ["squeue", "--noheader", "--array", "--states=all", f"--user={whose}", f"--format={_QUEUE_FORMAT}"]
    argv += [f"--clusters={','.join(clusters)}"] if clusters else []
    answer = _run(argv, timeout_s=patience.timeout_s)
    if answer.code:
        raise OrcError(f"squeue: {answer.words}")
    return list(_parse_queue(answer.out))


def _parse_queue(text: str) -> Iterable[JobRow]:
    before, *records = text.split(_RECORD)
    cluster = _cluster_line(before)
    for record in records:
        fields = record.rstrip("\n").split(_FIELD)
        if len(fields) >= 9:
            yield _row(fields, cluster)
        cluster = _cluster_line(record) or cluster


def _cluster_line(text: str) -> str | None:
    """With `--clusters`, a line `CLUSTER: name` stands before the rows of each."""
    found = re.search(r"^CLUSTER: (\S+)$", text, re.MULTILINE)
    return found[1] if found else None


def _row(fields: list[str], cluster: str | None) -> JobRow:
    job_id, array_job_id, task_id, state, reason, name, comment, submit_time, partition = fields[:9]
    return JobRow(
        job_id=job_id,
        array_job_id=array_job_id,
        task_id=int(task_id) if task_id.isdigit() else None,
        state=state,
        reason=reason,
        name=name,
        comment="" if comment == "(null)" else comment,
        submit_time=submit_time,
        partition=partition.partition("\n")[0],
        cluster=cluster,
    )


def find_by_comment(comment: str, *, patience: Patience = PATIENCE) -> list[JobRow]:
    """Every job of this user whose comment is `comment`, finished ones too while Slurm remembers them."""
    return [row for row in queue(patience=patience) if row.comment == comment]


def show_job(job_id: str, *, patience: Patience = PATIENCE) -> dict[str, str] | None:
    """`scontrol show job` of a job or an array element as key to text; None when Slurm doesn't know it.

    Useful keys: JobState, Restarts, PreemptTime, EndTime, SubmitTime, JobName, Comment, Reason.

    Raises:
        SlurmUnreachable: no Slurm, or no answer.
    """
    answer = _run(["scontrol", "--oneliner", "show", "job", job_id], timeout_s=patience.timeout_s)
    if answer.code or not answer.out.startswith("JobId="):
        return None
    return _pairs(answer.out.partition("\n")[0])


def _pairs(line: str) -> dict[str, str]:
    """`Key=value` pairs whose values may hold spaces. The first of a key wins: a comment, the mimic, is last.

    A job's name stands before its state, so a name with ` JobState=` in it would win; our jobs' names are one word.
    """
    pieces = re.split(r"(?:^| )([A-Z][A-Za-z/:]*)=", line)
    found: dict[str, str] = {}
    for key, value in zip(pieces[1::2], pieces[2::2], strict=True):
        found.setdefault(key, value.strip())
    return found


def config(*, patience: Patience = PATIENCE) -> dict[str, str]:
    """`scontrol show config` as key to text, such as MaxArraySize.

    Raises:
        SlurmUnreachable: no Slurm, or no answer.
    """
    answer = _run(["scontrol", "show", "config"], timeout_s=patience.timeout_s)
    if answer.code:
        raise OrcError(f"scontrol: {answer.words}")
    pairs = (line.partition("=") for line in answer.out.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


_GONE = r"(?i)Invalid job id|already complet|not found"


def cancel(job_ids: Sequence[str], *, cluster: str | None = None, patience: Patience = PATIENCE) -> None:
    """Cancel jobs or array elements; one that is gone already is fine. One command for all.

    Raises:
        OrcError: Slurm refused, in its own words.
        SlurmUnreachable: no Slurm, or no answer.
    """
    if not job_ids:
        return
    where = [f"--clusters={cluster}"] if cluster else []
    answer = _run(["scancel", *where, *job_ids], timeout_s=patience.timeout_s)
    refused = [line for line in answer.error.splitlines() if line.strip() and not re.search(_GONE, line)]
    if answer.code and refused:
        raise OrcError(f"scancel: {'; '.join(refused)}")


def requeue(job_id: str, *, patience: Patience = PATIENCE) -> bool:
    """Requeue a job or an array element; True when it is on its way, also when it was already.

    Never give the bare id of an array from inside one of its elements: that requeues the whole array.

    Raises:
        SlurmUnreachable: no Slurm, or no answer.
    """
    answer = _run(["scontrol", "requeue", job_id], timeout_s=patience.timeout_s)
    # From inside the job, the requeue's own TERM ends scontrol (seen: -15); a second call finds the job pending.
    return answer.code in (0, -15) or "pending execution" in answer.error


def release(job_id: str, *, patience: Patience = PATIENCE) -> bool:
    """Release a held job; whether Slurm did."""
    return not _run(["scontrol", "release", job_id], timeout_s=patience.timeout_s).code


def start_now(job_id: str, *, patience: Patience = PATIENCE) -> bool:
    """End the wait (Reason=BeginTime) that a requeue imposes; whether Slurm did."""
    argv = ["scontrol", "update", f"JobId={job_id}", "StartTime=now"]
    return not _run(argv, timeout_s=patience.timeout_s).code


def accounting(job_ids: Sequence[str], *, patience: Patience = PATIENCE) -> list[AccountRow]:
    """What accounting remembers, without steps; empty where it is not kept."""
    if not job_ids or not _has("sacct"):
        return []
    argv = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode"]
    answer = _run([*argv, f"--jobs={','.join(job_ids)}"], timeout_s=patience.timeout_s)
    rows = (line.split("|") for line in answer.out.splitlines()) if not answer.code else ()
    return [AccountRow(job_id=row[0], state=row[1], exit_code=row[2]) for row in rows if len(row) == 3]


def submit_limit(*, patience: Patience = PATIENCE) -> int | None:
    """The least limit that accounting puts on this user's jobs in the queue, running ones included; None if unknown."""
    if not _has("sacctmgr"):
        return None
    argv = ["sacctmgr", "--noheader", "--parsable2", "show", "assoc", "where", f"user={_user()}"]
    try:
        association = _run([*argv, "format=MaxSubmit,QOS"], timeout_s=patience.timeout_s)
        quality = _run([*argv[:3], "show", "qos", "format=Name,MaxSubmitPU"], timeout_s=patience.timeout_s)
    except SlurmUnreachable:
        return None
    rows = [line.split("|") for line in association.out.splitlines() if "|" in line]
    allowed = {name for row in rows for name in row[1].split(",")}
    limits = [row[0] for row in rows]
    limits += [row[1] for row in (line.split("|") for line in quality.out.splitlines()) if row[0] in allowed]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name
