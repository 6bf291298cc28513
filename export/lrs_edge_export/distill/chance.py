"""Chance that is the same in every run."""

from __future__ import annotations

import numpy as np


def seeded(*parts: object) -> np.random.Generator:
    """A source of chance that depends on these values only."""
    return np.random.default_rng(list("/".join(map(str, parts)).encode()))
