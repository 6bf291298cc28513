"""PruMerge: the outliers of the class token's attention, each merged with what resembles it.

Shang et al., ICCV 2025 (arXiv 2403.15388), LLaVA-PruMerge. The attention is that of the layer
after the one whose output is used, all heads as one. Patches above the third quartile by more than
one and a half interquartile ranges are kept: as many as the tile has content, never more than a
quarter. Each adds the 32 patches with the most similar keys, weighted by their attention, and one
more token is the weighted sum of all that were not kept. That happens before the projector.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lrs_edge.baselines.tower import Compressed, Patches

#: Patches that are merged into a kept one.
CLUSTER = 32

#: How far beyond the quartile an outlier lies, in interquartile ranges.
REACH = 1.5


def outliers(attention: NDArray[np.float32]) -> int:
    """How many numbers of [n] are outliers upwards (box plot); at most a quarter of them."""
    low, high = np.percentile(attention.astype(np.float32), (25, 75))
    return int((attention > high + REACH * (high - low)).sum())


class PruMerge:
    """The rule.

    Args:
        dropped: Share of a tile's tokens that is dropped; None keeps the outliers.
    """

    def __init__(self, dropped: float | None = None) -> None:
        self._dropped = dropped

    def most(self, patches: int) -> int:
        """A quarter of the patches, or the share that is asked for, and the sum of the others."""
        share = 0.25 if self._dropped is None else 1.0 - self._dropped
        return min(int(patches * share + 1e-6) + 1, patches)

    def compress(self, patches: Patches) -> Compressed:
        """The kept patches of one tile, merged, and the sum of the others."""
        features, attention = patches.features, patches.next_attention
        count = len(features)
        kept_count = outliers(attention)
        if self._dropped is not None:
            kept_count = int(count * (1.0 - self._dropped) + 1e-6)
        order = np.argsort(-attention, kind="stable")
        kept, others = np.sort(order[:kept_count]), order[kept_count:]
        unit = patches.next_keys / np.maximum(
            np.linalg.norm(patches.next_keys, axis=1, keepdims=True), 1e-12
        )
        similarity = unit[kept] @ unit.T
        similarity[np.arange(len(kept)), kept] = -np.inf
        size = min(CLUSTER, count - 1)
        near = np.argsort(-similarity, axis=1, kind="stable")[:, :size]
        values = features[kept] + np.einsum("kc,kcw->kw", attention[near], features[near])
        if len(others) == 0:
            return Compressed(values.astype(np.float32), kept.astype(np.int64))
        # The sum stands at the most attended of its patches.
        rest = attention[others] @ features[others]
        places = np.append(kept, others[0])
        ascending = np.argsort(places)
        values = np.concatenate([values, rest[None]])[ascending].astype(np.float32)
        return Compressed(values, places[ascending].astype(np.int64))
