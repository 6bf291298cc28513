"""Colours of a picture in six numbers, and how far they are from those of other pictures."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.calibration import COLOUR_FEATURES, ColourDomain

Colours = NDArray[np.float64]

#: With fewer visible pixels there is nothing to say.
_LEAST_PIXELS = 64


def colours_of(pixels: NDArray[np.float32]) -> Colours | None:
    """Mean of red, green and blue, then their standard deviations.

    Black pixels do not count: what is hidden or has no data is shown black.

    Args:
        pixels: float32 [rows, cols, 3] of 0..1.

    Returns:
        float64 [6]; None where hardly a pixel is visible.
    """
    flat = pixels.reshape(-1, 3)
    flat = flat[flat.any(axis=1)]
    if len(flat) < _LEAST_PIXELS:
        return None
    means, spreads = flat.mean(axis=0, dtype=np.float64), flat.std(axis=0, dtype=np.float64)
    return np.concatenate([means, spreads])


def distance(colours: Colours, domain: ColourDomain) -> float:
    """Mahalanobis distance of a picture's colours from a domain's mean."""
    off = colours - np.array(domain.mean)
    return math.sqrt(max(float(off @ np.linalg.solve(np.array(domain.covariance), off)), 0.0))


def fit_colours(found: NDArray[np.float64], limit_share: float = 0.99) -> ColourDomain:
    """Mean, covariance and limit of pictures' colours.

    Args:
        found: float64 [n, 6], n at least 2.
        limit_share: Share of these pictures that lie within the limit.
    """
    mean, count = found.mean(axis=0), len(found)
    off = found - mean
    covariance = off.T @ off / max(count - 1, 1)
    # As if a few pictures more had been seen whose numbers vary alone and by as much: of fewer
    # pictures than numbers there is no inverse.
    weight = COLOUR_FEATURES / (count + COLOUR_FEATURES)
    apart = np.diag(np.maximum(np.diag(covariance), _LEAST_VARIANCE))
    covariance = (1 - weight) * covariance + weight * apart
    domain = ColourDomain(_plain(mean), tuple(_plain(row) for row in covariance), 1.0)
    within = float(np.quantile([distance(row, domain) for row in found], limit_share))
    return ColourDomain(domain.mean, domain.covariance, max(within, _LEAST_LIMIT))


#: Of 0..1: a quarter of a level of 8 bits.
_LEAST_VARIANCE = 1e-6
#: 99 of 100 points of a normal distribution in six dimensions lie within it.
_LEAST_LIMIT = 4.1


def _plain(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
