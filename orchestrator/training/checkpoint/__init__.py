"""Checkpoints: the state of a training, serialized, written beside it, restored."""
