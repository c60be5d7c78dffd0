"""Where Slurm's and munge's programs are, and what to install when they are not.

Debian keeps daemons in /usr/sbin, which an ordinary user's PATH leaves out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from orchestrator.errors import OrcError, UsageError

__all__ = ["find_program", "missing_programs", "need_programs", "slurm_version"]

_SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scancel", "scontrol")
_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "my_print_defaults", "sacct")
_PACKAGES = {
    "munged": "munge",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client",
}
_SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"


def find_program(name: str) -> str | None:
    """Path of a program, looked for on PATH and then where daemons live."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{_SYSTEM_FOLDERS}")


def missing_programs(*, accounting: bool = False) -> tuple[str, ...]:
    """Names of the programs that a lab needs and that this machine lacks."""
    names = _SLURM + (_ACCOUNTING if accounting else ())
    return tuple(name for name in names if find_program(name) is None)


def need_programs(*, accounting: bool = False) -> None:
    """Return if a lab can run here.

    Raises:
        UsageError: programs are missing; the text names them and the packages that bring them.
    """
    missing = missing_programs(accounting=accounting)
    if not missing:
        return
    packages = sorted({_PACKAGES.get(name, "slurm-wlm") for name in missing})
    raise UsageError(
        f"lab: {', '.join(missing)} not found on PATH or in {_SYSTEM_FOLDERS}; "
        f"on Debian or Ubuntu: apt-get install {' '.join(packages)}"
    )


def slurm_version() -> tuple[int, int]:
    """Year and month of the installed Slurm's release, such as (22, 5).

    Raises:
        OrcError: slurmctld says something else.
    """
    program = find_program("slurmctld")
    assert program is not None, "need_programs looks before"
    words = subprocess.run([program, "-V"], capture_output=True, text=True, check=False, timeout=20).stdout
    found = re.search(r"(\d+)\.(\d+)", words)
    if found is None:
        raise OrcError(f"lab: `{program} -V` printed {words!r}, but should name a version such as 22.05.8")
    return int(found[1]), int(found[2])
