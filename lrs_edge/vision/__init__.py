"""Tiles to tokens: reading ahead, encoding, the feature cache, image positions."""
