"""What trials have reported: records, claims, the fold of all records, and the reduction to `summary.json`."""
