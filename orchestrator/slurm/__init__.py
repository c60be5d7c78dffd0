"""Slurm: job scripts, submissions and their ledger, Slurm's commands, and a private Slurm to test on."""
