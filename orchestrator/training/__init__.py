"""What a job sees: the trial, its data, losses and metrics, checkpoints, packs, diagnostics."""
