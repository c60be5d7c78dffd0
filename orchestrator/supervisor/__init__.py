"""What Slurm, or this machine, starts: it gives trials to workers and records how they end. Never imports torch."""
