"""Reducers of several levels: ranges of trials, reduced one by one and merged."""
