"""Samples: data sets by index, batches, order of an epoch."""
