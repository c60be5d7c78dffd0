"""The `slurm:` section: which of sbatch's options may be given, and under which name."""

from __future__ import annotations

import re

from orchestrator.config.document import SweepDocument
from orchestrator.core.atomic import Json
from orchestrator.core.text import describe, nearest

__all__ = ["check_slurm", "option_fault"]

_OWNED = {
    "array": "set by the number of blocks; see launch.trials_per_task, launch.max_workers and launch.throttle",
    "chdir": "workers start in the sweep's folder",
    "comment": "holds the submission's token",
    "dependency": "set between workers and reducer",
    "error": "logs are in the sweep's folder",
    "export": "give variables under env",
    "export-file": "give variables under env",
    "job-name": "give name",
    "no-requeue": "workers are always requeueable; see launch.retries",
    "open-mode": "always append",
    "output": "logs are in the sweep's folder",
    "parsable": "always set",
    "requeue": "always set",
    "signal": "give launch.notice_s",
    "test-only": "give --test-only on the command line",
    "wait": "give --watch on the command line",
    "wrap": "give program or command",
}
_SBATCH = (  # noqa: SIM905  # one name a line would fill two screens
    "account acctg-freq batch bb bbf begin cluster-constraint clusters constraint container contiguous core-spec "
    "cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot distribution exclude exclusive "
    "extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres "
    "gres-flags hint hold ignore-pbs input kill-on-invalid-dep licenses mail-type mail-user mcs-label mem "
    "mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill nodefile nodelist nodes ntasks ntasks-per-core "
    "ntasks-per-gpu ntasks-per-node ntasks-per-socket overcommit oversubscribe partition power prefer priority "
    "profile propagate qos quiet reboot reservation sockets-per-node spread-job switches thread-spec "
    "threads-per-core time time-min tmp tres-per-task uid use-min-nodes wait-all-nodes wckey "
).split()
_SHORT = {
    "A": "account",
    "C": "constraint",
    "c": "cpus-per-task",
    "G": "gpus",
    "J": "job-name",
    "N": "nodes",
    "n": "ntasks",
}
_SHORT |= {"p": "partition", "q": "qos", "t": "time", "w": "nodelist", "x": "exclude"}


def check_slurm(sheet: SweepDocument, path: tuple[str, ...]) -> None:
    """Blame every option at `path` that is misspelt, owned by this package, or not a plain value."""
    section: Json = sheet.tree
    for part in path:
        section = section.get(part) if isinstance(section, dict) else None
    for name, value in section.items() if isinstance(section, dict) else ():
        fault = option_fault(name)
        if fault:
            sheet.blame((*path, name), fault, key=True)
        elif isinstance(value, list | dict):
            sheet.blame((*path, name), f"found {describe(value)}, expected a string, a number, true, false or null")
        elif isinstance(value, str) and not value.isprintable():
            sheet.blame((*path, name), f"found {describe(value)}, expected one line of printable characters")


def option_fault(name: str) -> str | None:
    """What keeps `name` from being given as an option of sbatch; None when nothing does."""
    if name in _OWNED:
        return f"not for you to set: {_OWNED[name]}"
    if name in _SBATCH:
        return None
    if name in _SHORT:
        return f"a short option, expected the long one: {_SHORT[name]}"
    plain = name.lstrip("-").replace("_", "-")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", plain):
        return "not an option of sbatch, expected a long option without its dashes"
    # Sites add options by plugins, so an unknown one is a mistake only when it looks like one.
    near = plain if plain != name else nearest(name, [*_SBATCH, *_OWNED], cutoff=0.75)
    return f"unknown option; did you mean {near!r}?" if near else None
