"""The KV cache: which tokens an engine's key/value buffers hold, and how they are pruned.

Keys are stored after RoPE, so a token's position is data of its own and not its place in the
buffer: dropping tokens moves the others together and changes nothing in what they say. The property
that every test here rests on: attention over a compacted cache equals attention over the full cache
with the dropped tokens masked.

The cache knows what each token is (text, global view, tile at level/row/col, ...) but not how
scores came about. Of each it can also remember where its embedding comes from
(`lrs_edge.engines.rows`), so that keys and values that are still right are recognised
(`computed_alike`) and not computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.base import KVBuffers
from lrs_edge.engines.rows import UNKNOWN, Sources

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
    MARK = 7  # text that marks a tile


def token_dtype(axes: int) -> np.dtype[np.void]:
    """One cached token: its positions for RoPE, its kind and, for tile tokens, where it comes from.

    Args:
        axes: Positions k of a token: 1, or 3 for RoPE over time, rows and columns.
    """
    shape = () if axes == 1 else (axes,)
    places = [("level", "<i2"), ("row", "<i4"), ("col", "<i4")]
    return np.dtype([("position", "<i8", shape), ("kind", "i1"), *places])


#: Of models with one position for each token.
TOKEN = token_dtype(1)

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
        positions: int64 [n], or [k, n] of k axes: the positions that RoPE sees.
        kind: What they are, one for all or one each.
        level: Search level of tile tokens.
        rows: Tile row of each, -1 where there is none.
        cols: Tile column of each.

    Returns:
        Structured array [n] of `token_dtype(k)`.
    """
    axes = 1 if positions.ndim == 1 else len(positions)
    given = positions if axes > 1 else positions.reshape(-1)
    tokens = np.empty(given.shape[-1], token_dtype(axes))
    tokens["position"], tokens["kind"], tokens["level"] = given.T, kind, level
    tokens["row"], tokens["col"] = rows, cols
    return tokens


def position_ids(tokens: Tokens) -> NDArray[np.int64]:
    """Positions int64 [k, n] of tokens, as graphs take them."""
    positions: NDArray[np.int64] = tokens["position"].reshape(len(tokens), -1)
    return np.ascontiguousarray(positions.T)


class KVCache:
    """The tokens whose keys and values lie in one graph's buffers, in the order of the buffers.

    Args:
        buffers: They may have any content.
        most: Tokens of the longest sequence, where that is known: no room is made for more before
            it is needed.
    """

    def __init__(self, buffers: KVBuffers, most: int | None = None) -> None:
        self.buffers = buffers
        self._most = most
        # Longer than the cache: decoding appends a token at a time.
        self._labels: Tokens = np.empty(0, TOKEN)
        self._sources: Sources = np.empty(0, np.uint64)
        self._length = 0
        # Start and end of the runs that computed the tokens, in order; where the cache was cut
        # inside one, it stays here with the end that it had.
        self._runs: list[tuple[int, int]] = []
        self._output: tuple[int, NDArray[np.float32]] | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> Tokens:
        """Labels of the cached tokens, structured [length]; a copy."""
        return self._labels[: self._length].copy()

    @property
    def next_position(self) -> int:
        """The position after the last cached token's; gaps before it stay gaps.

        Of several axes the largest counts, and text has the same position on all of them.
        """
        return int(np.max(self._labels["position"][self._length - 1])) + 1 if self._length else 0

    def text_positions(self, count: int) -> NDArray[np.int64]:
        """Positions int64 [k, count] of text after the cached tokens."""
        places = self.next_position + np.arange(count, dtype=np.int64)
        return np.tile(places, (self._labels.dtype["position"].shape or (1,)) + (1,))

    @property
    def known(self) -> int:
        """Tokens at the start that a later sequence can share."""
        sources = self._sources[: self._length]
        return self._length if sources.all() else int(np.argmin(sources != UNKNOWN))

    @property
    def bytes_per_token(self) -> int:
        """Bytes that keys and values of one token take up."""
        return self.buffers.nbytes // self.buffers.capacity

    @property
    def output(self) -> NDArray[np.float32] | None:
        """What the graph gave after exactly these tokens, where that was remembered; a copy."""
        if self._output is None or self._output[0] != self._length:
            return None
        return self._output[1].copy()

    def remember(self, output: NDArray[np.float32]) -> None:
        """Keep what the graph gave after the last token, as long as the tokens up to it stay."""
        self._output = (self._length, output.copy())

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens; buffers grow, their content stays.

        Raises:
            OutOfMemoryError: The larger buffers do not fit; the cache is empty then.
        """
        needed = len(self) + count
        if needed > self.buffers.capacity:
            if self.buffers.doubling:
                doubled = 2 * self.buffers.capacity
                needed = max(needed, doubled if self._most is None else min(doubled, self._most))
            capacity = -(-needed // GROWTH) * GROWTH
            self._move(np.arange(len(self), dtype=np.int64), capacity)

    def _move(self, indices: NDArray[np.int64], capacity: int) -> None:
        try:
            self.buffers.gather(indices, capacity)
        except BaseException:
            # Some buffers have moved and others have not: nothing in them can be trusted.
            self._cut(0)
            raise

    def _cut(self, length: int) -> None:
        self._length = length
        self._runs = [run for run in self._runs if run[0] < length]
        if self._output is not None and self._output[0] > length:
            self._output = None

    def append(self, tokens: Tokens, sources: Sources | None = None) -> None:
        """Record tokens whose keys and values one run has just written after the others.

        Args:
            tokens: Labels [n].
            sources: Of their embeddings [n], None where they are not worth recognising.
                Labels alone do not tell tokens apart: two of one tile can have equal ones.

        Raises:
            ValueError: There is no room for them (`reserve` was not called), or their positions
                (on the first of several axes: time) do not ascend: attention is causal by place,
                so place and position must agree.
        """
        end = self._length + len(tokens)
        if end > self.buffers.capacity:
            raise ValueError(f"{len(tokens)} tokens do not fit after {len(self)} cached ones")
        if self._length == 0 and self._labels.dtype != tokens.dtype:
            self._labels = np.empty(len(self._labels), tokens.dtype)
        if not self._ascends(tokens):
            raise ValueError("positions of cached tokens must ascend")
        if end > len(self._labels):
            more = np.empty(max(end, self.buffers.capacity) - self._length, tokens.dtype)
            self._labels = np.concatenate([self._labels[: self._length], more])
            unknown = np.full(len(more), UNKNOWN, np.uint64)
            self._sources = np.concatenate([self._sources[: self._length], unknown])
        self._labels[self._length : end] = tokens
        self._sources[self._length : end] = UNKNOWN if sources is None else sources
        self._runs.append((self._length, end))
        self._length = end

    def _ascends(self, tokens: Tokens) -> bool:
        positions = tokens["position"]
        if positions.ndim > 1:
            # Tokens of one image have the same time, and their rows and columns go back and forth.
            known = self._labels["position"][: self._length][-1:, 0]
            return bool(np.all(np.diff(np.concatenate([known, positions[:, 0]])) >= 0))
        first = len(positions) == 0 or int(positions[0]) >= self.next_position
        return first and not np.any(positions[1:] <= positions[:-1])

    def truncate(self, length: int) -> None:
        """Return to the first `length` tokens. Costs nothing: the rest is overwritten later.

        Raises:
            ValueError: The cache holds fewer tokens.
        """
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot truncate {len(self)} cached tokens to {length}")
        self._cut(length)

    def release(self, length: int) -> None:
        """Return to the first `length` tokens and give back the memory of the rest.

        Raises:
            ValueError: The cache holds fewer tokens.
        """
        self.truncate(length)
        capacity = max(-(-length // GROWTH) * GROWTH, 1)
        if capacity < self.buffers.capacity:
            self._move(np.arange(length, dtype=np.int64), capacity)
        self._labels, self._sources = self._labels[:length].copy(), self._sources[:length].copy()

    def copy(self, length: int) -> KVCache:
        """A cache of its own that holds the first `length` tokens.

        Raises:
            ValueError: The cache holds fewer tokens.
            OutOfMemoryError: It does not fit into memory.
        """
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot copy {length} of {len(self)} cached tokens")
        capacity = max(-(-length // GROWTH), 1) * GROWTH
        copied = KVCache(self.buffers.copy(length, capacity), self._most)
        copied.append(self._labels[:length], self._sources[:length])
        copied._runs = [run for run in self._runs if run[0] < length]
        return copied

    def take_over(self, other: KVCache, buffers: KVBuffers, length: int) -> None:
        """Hold the first `length` tokens of another cache, and nothing else.

        Args:
            other: Knows the tokens.
            buffers: Those of its buffers that are this cache's, too; they are copied.
            length: At most as long as the other cache.

        Raises:
            ValueError: The other cache holds fewer tokens.
            OutOfMemoryError: It does not fit into memory; this cache is empty then.
        """
        if not 0 <= length <= len(other):
            raise ValueError(f"cannot take over {length} of {len(other)} cached tokens")
        self._cut(0)
        self.buffers = buffers.copy(length, max(-(-length // GROWTH), 1) * GROWTH)
        self.append(other._labels[:length], other._sources[:length])
        self._runs = [run for run in other._runs if run[0] < length]

    def keep(self, indices: NDArray[np.int64]) -> None:
        """Keep only the tokens at these places, each with its own position; compact the buffers.

        Args:
            indices: int64 [n], strictly ascending places in the cache.

        Raises:
            ValueError: The indices are not ascending or outside the cache.
            OutOfMemoryError: The spare buffer for the move does not fit; the cache is empty then.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and (
            indices[0] < 0 or indices[-1] >= len(self) or np.any(np.diff(indices) <= 0)
        ):
            raise ValueError("places to keep must ascend and lie inside the cache")
        stayed = int((indices == np.arange(len(indices))).sum())
        if stayed < len(indices):
            self._move(indices, self.buffers.capacity)
        self._labels[: len(indices)] = self._labels[indices]
        self._sources[: len(indices)] = self._sources[indices]
        # Tokens after a dropped one have seen it: what they hold is not what a cache that never
        # had it would hold.
        self._sources[stayed : len(indices)] = UNKNOWN
        self._cut(stayed)
        self._length = len(indices)

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
        kinds = self._labels["kind"][: self._length]
        local = np.isin(kinds, (TokenKind.TILE, TokenKind.NEWLINE))
        places = np.flatnonzero(local | (kinds == TokenKind.GLOBAL))
        order = np.lexsort((-places, scores[places], ~local[places]))
        dropped = places[order[:surplus]]
        self.keep(np.setdiff1d(np.arange(len(self), dtype=np.int64), dropped))
        return len(dropped)

    def common_prefix(self, tokens: Tokens, sources: Sources) -> int:
        """Tokens at the start that the cache holds just as they are here.

        Args:
            tokens: Labels [n].
            sources: Of their embeddings [n]; `UNKNOWN` equals nothing.
        """
        count = min(self._length, len(tokens))
        same = self._sources[:count] == sources[:count]
        same &= sources[:count] != UNKNOWN
        if self._labels.dtype != tokens.dtype:
            return 0
        same &= self._labels[:count] == tokens[:count]
        return count if same.all() else int(np.argmin(same))

    def computed_alike(self, tokens: Tokens, sources: Sources, bounds: Sequence[int]) -> int:
        """Tokens at the start that the cache holds just as running this sequence would leave them.

        Besides the tokens, the runs must be the same: where an engine quantizes activations by the
        run, a token's keys and values depend on the other tokens of its run, later ones included.

        Args:
            tokens: Labels [n].
            sources: Of their embeddings [n]; `UNKNOWN` equals nothing.
            bounds: 0, and where the runs of this sequence end, ascending to n.

        Returns:
            One of the bounds.
        """
        same, end = self.common_prefix(tokens, sources), 0
        for held, wanted in zip(self._runs, pairwise(bounds), strict=False):
            if held != wanted or held[1] > same:
                break
            end = held[1]
        return end
