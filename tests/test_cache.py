"""Bookkeeping of the KV cache, and the buffers of the ONNX backend underneath it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lrs_edge.backends.onnx import OnnxKVBuffers, open_mover
from lrs_edge.cache import GROWTH, KVCache, TokenKind, make_tokens

NAMES = ("key_0", "value_0", "key_1")


MOVER = open_mover("float32", "cpu")


def new_cache() -> KVCache:
    return KVCache(OnnxKVBuffers(NAMES, 2, 4, "float32", "cpu", MOVER))


def write(cache: KVCache, positions: np.ndarray, kinds: np.ndarray) -> None:
    """Do what a graph does: put something recognisable behind the cached tokens."""
    cache.reserve(len(positions))
    for name in NAMES:
        memory = cache.buffers.value(name)  # type: ignore[attr-defined]
        array = memory.numpy()
        places = slice(len(cache), len(cache) + len(positions))
        array[:, :, places, :] = positions[None, None, :, None] + NAMES.index(name) / 4
        memory.update_inplace(np.ascontiguousarray(array))
    cache.append(make_tokens(positions, kinds))


def content(cache: KVCache, name: str) -> np.ndarray:
    return cache.buffers.read(name)[0, 0, : len(cache), 0]


class CacheMachine(RuleBasedStateMachine):
    """Any order of appending, truncating, keeping and evicting, against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = new_cache()
        self.expected: list[tuple[int, int]] = []

    @rule(count=st.integers(1, 300), gap=st.integers(0, 50), kind=st.sampled_from(TokenKind))
    def append(self, count: int, gap: int, kind: TokenKind) -> None:
        start = self.cache.next_position + gap
        positions = np.arange(start, start + count)
        write(self.cache, positions, np.full(count, kind, np.int8))
        self.expected += [(int(p), int(kind)) for p in positions]

    @precondition(lambda self: self.expected)
    @rule(share=st.floats(0, 1))
    def truncate(self, share: float) -> None:
        length = int(share * len(self.expected))
        self.cache.truncate(length)
        self.expected = self.expected[:length]

    @precondition(lambda self: self.expected)
    @rule(share=st.floats(0, 1))
    def release(self, share: float) -> None:
        length = int(share * len(self.expected))
        self.cache.release(length)
        self.expected = self.expected[:length]
        assert self.cache.buffers.capacity <= length + GROWTH

    @precondition(lambda self: self.expected)
    @rule(seed=st.integers(0, 1000), share=st.floats(0, 1))
    def keep(self, seed: int, share: float) -> None:
        mask = np.random.default_rng(seed).random(len(self.expected)) < share
        indices = np.flatnonzero(mask)
        self.cache.keep(indices)
        self.expected = [self.expected[i] for i in indices]

    @precondition(lambda self: self.expected)
    @rule(seed=st.integers(0, 1000), budget=st.integers(1, 400))
    def evict(self, seed: int, budget: int) -> None:
        scores = np.random.default_rng(seed).random(len(self.expected)).astype(np.float32)
        before = len(self.expected)
        places = range(before)
        rank = {int(TokenKind.TILE): 0, int(TokenKind.NEWLINE): 0, int(TokenKind.GLOBAL): 1}
        droppable = [i for i in places if self.expected[i][1] in rank]
        droppable.sort(key=lambda i: (rank[self.expected[i][1]], scores[i], -i))
        gone = set(droppable[: max(before - budget, 0)])
        assert self.cache.evict(scores, budget) == len(gone)
        self.expected = [self.expected[i] for i in places if i not in gone]

    @invariant()
    def holds_the_expected_tokens(self) -> None:
        tokens = self.cache.tokens
        assert list(zip(tokens["position"], tokens["kind"], strict=True)) == self.expected
        positions = np.array([position for position, _ in self.expected], np.float32)
        for number, name in enumerate(NAMES):
            assert np.array_equal(content(self.cache, name), positions + number / 4)


TestCacheMachine = CacheMachine.TestCase


def test_positions_must_ascend() -> None:
    cache = new_cache()
    write(cache, np.arange(3), np.zeros(3, np.int8))
    cache.reserve(1)
    with pytest.raises(ValueError, match="ascend"):
        cache.append(make_tokens(np.array([2]), TokenKind.TILE))


def test_tokens_need_room() -> None:
    cache = new_cache()
    with pytest.raises(ValueError, match="fit"):
        cache.append(make_tokens(np.arange(5), TokenKind.TILE))


@pytest.mark.parametrize("indices", [[1, 1], [2, 1], [-1], [3]])
def test_places_to_keep_are_checked(indices: list[int]) -> None:
    cache = new_cache()
    write(cache, np.arange(3), np.zeros(3, np.int8))
    with pytest.raises(ValueError, match="ascend"):
        cache.keep(np.array(indices))


def test_text_is_never_evicted() -> None:
    cache = new_cache()
    kinds = np.array([TokenKind.SYSTEM, TokenKind.GLOBAL, TokenKind.TILE, TokenKind.QUESTION])
    write(cache, np.arange(4), kinds.astype(np.int8))
    assert cache.evict(np.zeros(4, np.float32), 1) == 2
    assert cache.tokens["kind"].tolist() == [TokenKind.SYSTEM, TokenKind.QUESTION]


@given(st.integers(0, 5), st.integers(0, 5))
def test_a_prefix_is_recognised_only_while_whole(length: int, dropped: int) -> None:
    cache = new_cache()
    write(cache, np.arange(5), np.zeros(5, np.int8))
    prefix = cache.tokens[:length]
    cache.keep(np.array([i for i in range(5) if i != dropped]))
    assert cache.has_prefix(prefix) == (dropped >= length)
