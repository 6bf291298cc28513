"""VisionZip: a few tokens of every tile, chosen by attention inside the vision tower.

Yang et al., CVPR 2025 (arXiv 2412.04467). Of a tile's patches, those that the class token attends
to most are kept (dominant tokens). Of the others every so-many-th becomes a contextual token: the
rest is assigned to the one with the most similar key, and each adds the mean of what was assigned
to it, as the authors' code does. That happens before the projector. Their defaults keep 54 dominant
and 10 contextual tokens of 576. Left out here is the class token, which they keep too: a projector
that was trained on patches has never seen it.
"""

from __future__ import annotations

import numpy as np

from lrs_edge.baselines.tower import Compressed, Patches

#: Share of a tile's tokens that is dropped by default: 64 of 576 are left.
DROPPED = 8 / 9
#: Share of the kept tokens that are contextual: 10 of 64.
CONTEXTUAL = 10 / 64


def kept_counts(patches: int, dropped: float) -> tuple[int, int]:
    """Dominant and contextual tokens that are kept of a tile's patches; together at least one.

    Args:
        patches: At least 1.
        dropped: Share that is dropped, at least 0 and below 1.
    """
    kept = max(int(patches * (1.0 - dropped) + 1e-6), 1)
    contextual = int(kept * CONTEXTUAL)
    return kept - contextual, contextual


class VisionZip:
    """The rule.

    Args:
        dropped: Share of a tile's tokens that is dropped, at least 0 and below 1.
    """

    def __init__(self, dropped: float = DROPPED) -> None:
        self._dropped = dropped

    def most(self, patches: int) -> int:
        """Dominant and contextual tokens together."""
        return sum(kept_counts(patches, self._dropped))

    def compress(self, patches: Patches) -> Compressed:
        """Dominant and contextual tokens of one tile."""
        features, attention, keys = patches.features, patches.attention, patches.keys
        dominant_count, contextual_count = kept_counts(len(features), self._dropped)
        dominant = np.sort(np.argsort(-attention, kind="stable")[:dominant_count])
        others = np.setdiff1d(np.arange(len(features)), dominant)
        # Where nearly all are dominant, fewer may be left than contextual tokens were wanted.
        contextual_count = min(contextual_count, len(others))
        step = max(len(others) // max(contextual_count, 1), 1)
        is_target = np.zeros(len(others), bool)
        is_target[np.arange(0, len(others), step)[:contextual_count]] = True
        targets, merged = others[is_target], others[~is_target]
        values = features[targets].astype(np.float32, copy=True)
        if len(targets) and len(merged):
            unit = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12)
            nearest = np.argmax(unit[merged] @ unit[targets].T, axis=1)
            for target in np.unique(nearest):
                values[target] += features[merged[nearest == target]].mean(axis=0)
        places = np.concatenate([dominant, targets])
        order = np.argsort(places)
        return Compressed(
            np.concatenate([features[dominant], values])[order], places[order].astype(np.int64)
        )
