"""What the kernel tells of a process, in /proc; see proc(5). Imports next to nothing: a guardian starts with it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ProcessStat", "boot_id", "pid_namespace", "process_stat"]


class ProcessStat(NamedTuple):
    """A process of this machine, as it was when somebody looked; its fields are those of proc(5).

    Args:
        pid: its number.
        parent: the number of its parent.
        group: the number of its process group.
        start: when it started, in clock ticks since the boot.
        state: one letter.
        num_threads: how many of its threads have not been taken down.
    """

    pid: int
    parent: int
    group: int
    start: int
    state: str
    num_threads: int

    @property
    def has_ended(self) -> bool:
        """Whether only its exit status is left. With its main thread gone and others at work it has not ended."""
        return self.state in ("Z", "X", "x") and self.num_threads <= 1


def process_stat(pid: int) -> ProcessStat | None:
    """Look at a process of this machine; None when there is none of that number."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:  # noqa: PTH123 (pathlib takes as long as this process)
            text = file.read()
    except OSError:
        return None
    # The name before them stands in parentheses and may itself hold any character.
    fields = text.rpartition(")")[2].split()
    return ProcessStat(pid, int(fields[1]), int(fields[2]), int(fields[19]), fields[0], int(fields[17]))


def boot_id() -> str:
    """The kernel's id of this boot of the machine; empty where there is none."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:  # noqa: PTH123 (as above)
            return file.read().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """The number of the namespace in which this process's number means something; empty where there is none."""
    import os

    try:
        return "".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid")))  # noqa: PTH115 (as above)
    except OSError:
        return ""
