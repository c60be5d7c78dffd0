"""From `sweep.yaml` and the user's code to a plan: parse, check, snapshot, draw the parameters."""
