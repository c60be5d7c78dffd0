"""Packs: several trials of one architecture, trained as one network."""
