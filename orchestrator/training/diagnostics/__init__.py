"""What a training is like from within: norms, curvature, time."""
