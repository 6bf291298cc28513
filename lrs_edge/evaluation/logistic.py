"""Logistic regression with a small prior, for a handful of features. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

#: Standard deviation of the prior of every coefficient, of features of spread 1: probabilities far
#: from one half take more than a few answers, and where one feature tells right from wrong without
#: a mistake its coefficient stays finite.
PRIOR_SPREAD = 3.0

_MOST_STEPS = 100
_SMALL = 1e-9


def fit_logistic(features: Values, right: Values, weights: Values) -> Values:
    """Coefficients by maximum posterior, none of the slopes negative.

    Features of which more would make it less likely are left out: more certain is not less right.

    Args:
        features: float64 [n, k], each standing for more certainty.
        right: float64 [n] of 0 and 1.
        weights: float64 [n], above 0; what counts beside their proportions is how even they are.

    Returns:
        float64 [k + 1]: slopes per unit of each feature, then the intercept.
    """
    kept = np.ones(features.shape[1], bool)
    # As many answers as have the same information: all of them where the weights are even.
    weights = weights * weights.sum() / (weights**2).sum()
    mean = np.average(features, axis=0, weights=weights)
    spread = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=weights))
    kept &= spread > _SMALL
    scaled = (features - mean) / np.where(spread > _SMALL, spread, 1.0)
    while True:
        found = _newton(scaled[:, kept], right, weights)
        if (found[:-1] >= 0).all():
            break
        kept[np.flatnonzero(kept)[int(np.argmin(found[:-1]))]] = False
    slopes = np.zeros(len(kept))
    slopes[kept] = found[:-1] / spread[kept]
    return np.append(slopes, found[-1] - slopes @ mean)


def _newton(features: Values, right: Values, weights: Values) -> Values:
    """Slopes and intercept [k + 1]; steps are halved until they are no worse."""
    design = np.column_stack([features, np.ones(len(features))])
    precision = np.eye(design.shape[1]) / PRIOR_SPREAD**2

    def loss(values: Values) -> float:
        margins = design @ values
        likelihood = weights @ (np.logaddexp(0, margins) - right * margins)
        return float(likelihood + 0.5 * values @ precision @ values)

    values = np.zeros(design.shape[1])
    current = loss(values)
    for _ in range(_MOST_STEPS):
        shares = probabilities(design @ values)
        gradient = design.T @ (weights * (shares - right)) + precision @ values
        curvature = design.T @ (design * (weights * shares * (1 - shares))[:, None]) + precision
        step = np.linalg.solve(curvature, gradient)
        while (following := loss(values - step)) > current and np.abs(step).max() > _SMALL:
            step /= 2
        values, gained, current = values - step, current - following, following
        if gained < _SMALL:
            break
    return values


def probabilities(margins: Values) -> Values:
    """1 / (1 + exp(-x)), elementwise."""
    return 0.5 * (1 + np.tanh(0.5 * margins))
