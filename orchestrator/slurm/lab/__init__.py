"""A private, real Slurm on this one machine, in a folder of its own.

    lab = Lab(default_root())
    lab.up(LabOptions(nodes=4, cpus=4))
    subprocess.run(["sbatch", "job.sh"], env=os.environ | lab.env())
    lab.down()

munged on a private socket with its own key, slurmctld, and one slurmd per node, all on the loopback interface and on
free ports. Partition `low` is the default and preemptable; `high` preempts it; every node is in both. No system Slurm,
no system munge and no file outside the lab's folder is touched, except that Unix sockets, whose paths may have 107
bytes at most, move to a node-local folder of mode 0700 when the lab's own path is too long. `down` ends only processes
that are its own and removes that folder.

It needs Slurm's and munge's programs (Debian: `apt-get install slurm-wlm munge`). Run by an ordinary user, everything
runs as that user, and only that user's jobs do.
"""

from orchestrator.slurm.lab.cluster import Lab, LabStatus, default_root
from orchestrator.slurm.lab.options import LabOptions
from orchestrator.slurm.lab.programs import missing_programs

__all__ = ["Lab", "LabOptions", "LabStatus", "default_root", "missing_programs"]
