"""Slurm's commands as far as this package calls them, over a folder, $FAKE_SLURM, in which tests set the scene.

calls.jsonl     every call: command, arguments, and the variables of Slurm and sbatch that it saw
jobs.json       the queue
<command>.todo  what the next calls of that command do, a line each; `ok` when there is none:
    ok | reject MESSAGE    accept, or refuse with sbatch's kind of message
    down                   "Unable to contact slurm controller"
    lost                   accept, but let the answer time out
    hang                   accept nothing and never answer
    kill-before, kill-after    SIGKILL to the caller, before or after accepting
    cluster NAME           accept, and answer `id;NAME`
    say TEXT               print TEXT (with \\n for line ends) and nothing else
limit           array elements at most in the queue
config          what `scontrol show config` prints
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["FAKE_SLURM"])


def main(command, argv):
    env = {name: value for name, value in os.environ.items() if name.startswith(("SLURM", "SBATCH", "RANK"))}
    with (ROOT / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps({"command": command, "argv": argv, "env": env}) + "\n")
    todo = next_todo(command)
    verb, _, rest = todo.partition(" ")
    if verb == "down":
        sys.exit(f"{command}: error: Unable to contact slurm controller (connect failure)")
    if verb == "reject":
        sys.exit(f"{command}: error: {rest}\n{command}: error: Batch job submission failed: {rest}")
    if verb == "hang":
        time.sleep(60)
    if verb == "kill-before":
        os.kill(os.getppid(), signal.SIGKILL)
        return
    if verb == "say":
        print(rest.replace("\\n", "\n"), end="")
        return
    COMMANDS[command](argv, verb, rest)


def next_todo(command):
    path = ROOT / f"{command}.todo"
    lines = path.read_text().split("\n") if path.exists() else []
    if lines:
        path.write_text("\n".join(lines[1:]))
    return (lines and lines[0]) or "ok"


def read_jobs():
    path = ROOT / "jobs.json"
    return json.loads(path.read_text()) if path.exists() else []


def write_jobs(jobs):
    (ROOT / "jobs.json").write_text(json.dumps(jobs))


def sbatch(argv, verb, rest):
    script = Path(argv[-1]).read_text()
    if "--test-only" in argv:
        print("sbatch: Job 1 to start at 2030-01-01T00:00:00", file=sys.stderr)
        return
    jobs = read_jobs()
    job = {
        "id": str(101 + len(jobs)),
        "name": re.search(r"^#SBATCH --job-name=\"?([^\"\n]*)", script, re.M)[1],
        "comment": next(a for a in argv if a.startswith("--comment=")).removeprefix("--comment="),
        "tasks": count(script),
        "state": "PENDING",
    }
    limit = ROOT / "limit"
    if limit.exists() and sum(job["tasks"] or 1 for job in [*jobs, job] if job["state"] == "PENDING") > int(
        limit.read_text()
    ):
        error = "QOSMaxSubmitJobPerUserLimit"
        sys.exit(
            f"sbatch: error: {error}\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
        )
    write_jobs([*jobs, job])
    if verb == "kill-after":
        os.kill(os.getppid(), signal.SIGKILL)
    elif verb == "lost":
        sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    print(f"{job['id']};{rest}" if verb == "cluster" else job["id"])


def count(script):
    found = re.search(r"^#SBATCH --array=0-(\d+)", script, re.M)
    return int(found[1]) + 1 if found else 0


def squeue(argv, verb, rest):
    for job in read_jobs():
        for task in range(job["tasks"]) if job["tasks"] else [None]:
            own = job["id"] if task is None else f"{job['id']}_{task}"
            fields = (
                own,
                job["id"],
                "N/A" if task is None else task,
                job["state"],
                job.get("reason", "Priority"),
                job["name"],
                job["comment"],
            )
            print("\x1e" + "\x1f".join(map(str, (*fields, "2030-01-01T00:00:00", "low"))))


def scancel(argv, verb, rest):
    mark = ROOT / "watched-mark"
    if mark.exists():
        (ROOT / "mark-at-scancel").write_text(str(Path(mark.read_text()).exists()))
    jobs = read_jobs()
    for job in jobs:
        job["state"] = "CANCELLED" if job["id"] in argv else job["state"]
    write_jobs(jobs)


def scontrol(argv, verb, rest):
    if argv == ["show", "config"]:
        config = ROOT / "config"
        print(config.read_text() if config.exists() else "Configuration data\nMaxArraySize            = 1001\n")


def nothing(argv, verb, rest):
    sys.exit("Slurm accounting storage is disabled")


COMMANDS = {
    "sbatch": sbatch,
    "squeue": squeue,
    "scancel": scancel,
    "scontrol": scontrol,
    "sacct": nothing,
    "sacctmgr": nothing,
}

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
