"""Checkpoint families: each file reads one kind of checkpoint into the canonical three stages."""
