"""Ranks that work on one thing: rendezvous, collectives on the control group, consensus, lost ranks."""
