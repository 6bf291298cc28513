"""Recipes for known checkpoints and the embedded default bundle (package data)."""
