"""The KV cache: which tokens an engine's key/value buffers hold, and how they are pruned.

Keys are stored after RoPE, so a token's position is data of its own and not its place in the
buffer: dropping tokens moves the others together and changes nothing in what they say. The property
that every test here rests on: attention over a compacted cache equals attention over the full cache
with the dropped tokens masked.

The cache knows what each token is (text, global view, tile at level/row/col, ...) but not how
scores came about.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from lrs_edge.backends.base import KVBuffers

#: Buffers grow by this many places, so that decoding does not move them at every token.
GROWTH = 256


class TokenKind(IntEnum):
    """What a cached token is."""

    SYSTEM = 0  # text before the image
    GLOBAL = 1
    SEPARATOR = 2
    TILE = 3
    NEWLINE = 4
    QUESTION = 5  # text after the image
    ANSWER = 6


#: One cached token: its position for RoPE, its kind and, for tile tokens, where it comes from.
TOKEN = np.dtype(
    [("position", "<i8"), ("kind", "i1"), ("level", "<i2"), ("row", "<i4"), ("col", "<i4")]
)

Tokens = NDArray[np.void]


def make_tokens(
    positions: NDArray[np.int64],
    kind: TokenKind | NDArray[np.int8],
    *,
    level: int = -1,
    rows: NDArray[np.int64] | int = -1,
    cols: NDArray[np.int64] | int = -1,
) -> Tokens:
    """Labels for tokens that are about to enter a cache.

    Args:
        positions: int64 [n], the positions that RoPE sees.
        kind: What they are, one for all or one each.
        level: Search level of tile tokens.
        rows: Tile row of each, -1 where there is none.
        cols: Tile column of each.

    Returns:
        Structured array [n] of dtype `TOKEN`.
    """
    tokens = np.empty(len(positions), TOKEN)
    tokens["position"], tokens["kind"], tokens["level"] = positions, kind, level
    tokens["row"], tokens["col"] = rows, cols
    return tokens


class KVCache:
    """The tokens whose keys and values lie in one graph's buffers, in the order of the buffers."""

    def __init__(self, buffers: KVBuffers) -> None:
        self.buffers = buffers
        self._tokens: Tokens = np.empty(0, TOKEN)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> Tokens:
        """Labels of the cached tokens, structured [length]; a copy."""
        return self._tokens.copy()

    @property
    def next_position(self) -> int:
        """The position after the last cached token's; gaps before it stay gaps."""
        return int(self._tokens["position"][-1]) + 1 if len(self._tokens) else 0

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens; buffers grow, their content stays.

        Raises:
            OutOfMemoryError: The larger buffers do not fit.
        """
        needed = len(self) + count
        if needed > self.buffers.capacity:
            capacity = -(-needed // GROWTH) * GROWTH
            self.buffers.gather(np.arange(len(self), dtype=np.int64), capacity)

    def append(self, tokens: Tokens) -> None:
        """Record tokens whose keys and values a graph has just written behind the others.

        Raises:
            ValueError: There is no room for them (`reserve` was not called), or their positions
                do not ascend: attention is causal by place, so place and position must agree.
        """
        if len(self) + len(tokens) > self.buffers.capacity:
            raise ValueError(f"{len(tokens)} tokens do not fit behind {len(self)} cached ones")
        positions = np.concatenate([self._tokens["position"][-1:], tokens["position"]])
        if np.any(np.diff(positions) <= 0):
            raise ValueError("positions of cached tokens must ascend")
        self._tokens = np.concatenate([self._tokens, tokens])

    def truncate(self, length: int) -> None:
        """Return to the first `length` tokens. Costs nothing: the rest is overwritten later.

        Raises:
            ValueError: The cache holds fewer tokens.
        """
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot truncate {len(self)} cached tokens to {length}")
        self._tokens = self._tokens[:length]

    def release(self, length: int) -> None:
        """Return to the first `length` tokens and give back the memory of the rest.

        Raises:
            ValueError: The cache holds fewer tokens.
        """
        self.truncate(length)
        capacity = max(-(-length // GROWTH), 1) * GROWTH
        if capacity < self.buffers.capacity:
            self.buffers.gather(np.arange(length, dtype=np.int64), capacity)

    def keep(self, indices: NDArray[np.int64]) -> None:
        """Keep only the tokens at these places, each with its own position; compact the buffers.

        Args:
            indices: int64 [n], strictly ascending places in the cache.

        Raises:
            ValueError: The indices are not ascending or outside the cache.
            OutOfMemoryError: The spare buffer for the move does not fit.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and (
            indices[0] < 0 or indices[-1] >= len(self) or np.any(np.diff(indices) <= 0)
        ):
            raise ValueError("places to keep must ascend and lie inside the cache")
        if len(indices) == 0 or indices[-1] != len(indices) - 1:
            self.buffers.gather(indices, self.buffers.capacity)
        self._tokens = self._tokens[indices]

    def evict(self, scores: NDArray[np.float32], budget: int) -> int:
        """Drop the lowest-scored vision tokens until at most `budget` tokens are left.

        Tokens of tiles (and their newlines) go first, the global view only when none is left, text
        and separator never. Of equal scores the later token goes first.

        Args:
            scores: float32 [length], one per cached token; those of text are not looked at.
            budget: Tokens to be left.

        Returns:
            Number of tokens dropped. The cache can stay above the budget when text alone is.

        Raises:
            ValueError: There is not one score per token.
        """
        if len(scores) != len(self):
            raise ValueError(f"{len(scores)} scores for {len(self)} cached tokens")
        surplus = len(self) - budget
        if surplus <= 0:
            return 0
        kinds = self._tokens["kind"]
        local = np.isin(kinds, (TokenKind.TILE, TokenKind.NEWLINE))
        places = np.flatnonzero(local | (kinds == TokenKind.GLOBAL))
        order = np.lexsort((-places, scores[places], ~local[places]))
        dropped = places[order[:surplus]]
        self.keep(np.setdiff1d(np.arange(len(self), dtype=np.int64), dropped))
        return len(dropped)

    def has_prefix(self, tokens: Tokens) -> bool:
        """True where the cache still begins with exactly these tokens."""
        return len(tokens) <= len(self) and bool(np.all(self._tokens[: len(tokens)] == tokens))
