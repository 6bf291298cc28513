"""Checkpoints on disk: found, read tensor by tensor, described as three stages."""
