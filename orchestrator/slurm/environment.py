"""The environment in which Slurm's commands run: nothing of the job around us, and the user's defaults."""

from __future__ import annotations

import os
import re

from orchestrator.core import process_tree

__all__ = ["for_command", "outside"]

# Where a user's jobs go by default; kept unless the script says it. Any other SBATCH_* would override a script's lines.
_KEPT_DEFAULTS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CLUSTERS": "clusters",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_WCKEY": "wckey",
}
_KEPT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})
_FOREIGN = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SUBMITIT_")
_RANKS = frozenset({"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})
_OPTION = r"(?m)^#SBATCH\s+--([a-z-]+)"


def outside() -> dict[str, str]:
    """Return our environment as it would be outside of any job: nothing of Slurm's but where its configuration is."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not (name.startswith(_FOREIGN) or name in _RANKS or name == process_tree.MARK)
    }


def for_command(script: str = "") -> dict[str, str]:
    """Return `outside`, and a user's defaults for sbatch as far as `script` doesn't decide them itself."""
    said = set(re.findall(_OPTION, script))
    defaults = (name for name, option in _KEPT_DEFAULTS.items() if option not in said and name in os.environ)
    return outside() | {name: os.environ[name] for name in defaults} | {"LC_ALL": "C"}
