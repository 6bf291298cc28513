"""Dropping vision tokens between the language model's layers: FastV and PyramidDrop.

FastV (Chen et al., ECCV 2024, arXiv 2403.06764) cuts once, after layer K = 2, and drops half of the
vision tokens: those that the prompt's last token attends to least in layer K - 1 (from 0), the last
one that ran. PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247) cuts several times and keeps
half each time; it ranks by the same attention, computed in the layer after the cut. Both take the
mean over the heads of the softmax over all tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.manifest import SegmentSpec
from lrs_edge.errors import BundleError, UsageError
from lrs_edge.language.kv_cache import TokenKind, Tokens
from lrs_edge.pyramid.selection import top_indices
from lrs_edge.requests.options import AskOptions
from lrs_edge.search.rfm import token_scores

#: Share of the vision tokens that is dropped at every cut, by default of both papers.
DROPPED = 0.5

#: What may be dropped; text and the separator, which is text, stay.
VISION = (TokenKind.GLOBAL, TokenKind.TILE, TokenKind.NEWLINE)

#: Output of a segment by which tokens are ranked.
Ranking = Literal["attention", "next_attention"]


@dataclass(frozen=True)
class PruningPlan:
    """Where tokens are dropped, how many, and by what.

    Attributes:
        keeps: Share of the prompt's vision tokens that is left after each layer count K.
        ranking: Which attention ranks them.
    """

    keeps: Mapping[int, float]
    ranking: Ranking


def plan_pruning(options: AskOptions, segments: tuple[SegmentSpec, ...]) -> PruningPlan:
    """The plan that the options name, on a bundle's segments.

    Args:
        options: `prune` is `fastv` or `pdrop`.
        segments: Of the bundle's LLM.

    Raises:
        BundleError: The bundle has no segments.
        UsageError: The bundle is not cut at a layer that was asked for.
    """
    cuts = [segment.first_layer for segment in segments[1:]]
    if not cuts:
        raise BundleError(
            f"--prune {options.prune} drops tokens between layers of the language model, which "
            "this bundle has as one graph; export it with --attention-layers (such as 2)"
        )
    chosen = options.prune_layers or (cuts[:1] if options.prune == "fastv" else cuts)
    for layer in chosen:
        if layer not in cuts:
            raise UsageError(
                f"this bundle's language model is not cut after layer {layer}; it is after "
                f"{', '.join(map(str, cuts))} (--attention-layers of the export)"
            )
    kept = 1.0 - (DROPPED if options.prune_ratio is None else options.prune_ratio)
    keeps = {layer: kept**number for number, layer in enumerate(chosen, start=1)}
    return PruningPlan(keeps, "attention" if options.prune == "fastv" else "next_attention")


def kept_count(vision: int, share: float) -> int:
    """How many of the prompt's vision tokens a share of them is, rounded down as the papers do."""
    # 1 - 0.9 is a little less than 0.1.
    return int(vision * share + 1e-6)


def kept_places(tokens: Tokens, logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Places of all text and of the `count` vision tokens with the most attention.

    Args:
        tokens: Labels [T] of the tokens in the segment's cache.
        logits: float32 [H, T], scaled query-key products of the last token.
        count: Vision tokens to keep; all where there are no more.

    Returns:
        int64 [n], ascending places among the T.
    """
    is_vision = np.isin(tokens["kind"], VISION)
    vision = np.flatnonzero(is_vision)
    best = vision[top_indices(token_scores(logits)[vision], count)]
    return np.sort(np.concatenate([np.flatnonzero(~is_vision), best]))
