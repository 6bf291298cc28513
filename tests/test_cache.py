"""Bookkeeping of the KV cache, and the buffers of the ONNX backend underneath it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lrs_edge.engines.onnx import open_mover
from lrs_edge.engines.onnx_buffers import OnnxKVBuffers
from lrs_edge.engines.rows import UNKNOWN
from lrs_edge.errors import BackendError
from lrs_edge.language.kv_cache import (
    GROWTH,
    KVCache,
    TokenKind,
    make_tokens,
)
from tests.sequences import content_sources

NAMES = ("key_0", "value_0", "key_1")


#: Movers of one buffer after the other, as on the host, and of all at once, as on devices.
MOVERS = {"host": open_mover("float32", "cpu"), "device": open_mover("float32", "cpu", 3)}


class DeviceBuffers(OnnxKVBuffers):
    """As on a device."""

    doubling = True  # type: ignore[assignment]


def new_cache(way: str = "host") -> KVCache:
    kind = OnnxKVBuffers if way == "host" else DeviceBuffers
    return KVCache(kind(NAMES, 2, 4, "float32", "cpu", MOVERS[way]))


def write(cache: KVCache, positions: np.ndarray, kinds: np.ndarray) -> None:
    """Do what a graph does: put something recognisable after the cached tokens."""
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

    way = "host"

    def __init__(self) -> None:
        super().__init__()
        self.cache = new_cache(self.way)
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


class DeviceCacheMachine(CacheMachine):
    """The same where buffers move together and grow by doubling."""

    way = "device"


TestDeviceCacheMachine = DeviceCacheMachine.TestCase


def test_buffers_double_where_moving_costs_more_than_memory() -> None:
    found = []
    for way in ("host", "device"):
        cache = new_cache(way)
        sizes = []
        for count in (GROWTH, 1, GROWTH, GROWTH):
            write(cache, cache.next_position + np.arange(count), np.zeros(count, np.int8))
            sizes.append(cache.buffers.capacity // GROWTH)
        found.append(sizes)
    assert found == [[1, 2, 3, 4], [1, 2, 4, 4]]


def test_buffers_never_double_beyond_the_longest_sequence() -> None:
    cache = KVCache(new_cache("device").buffers, 3 * GROWTH)
    sizes = []
    for count in (2 * GROWTH, 1, GROWTH):
        write(cache, cache.next_position + np.arange(count), np.zeros(count, np.int8))
        sizes.append(cache.buffers.capacity // GROWTH)
    assert sizes == [2, 3, 4]


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


def marked(count: int, seed: int = 0) -> tuple[KVCache, np.ndarray]:
    """A cache of tokens that can be recognised, all of one tile, and their embeddings."""
    embeds = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    cache = new_cache()
    cache.reserve(count)
    cache.append(make_tokens(np.arange(count), TokenKind.TILE), content_sources(embeds))
    return cache, embeds


@given(st.integers(0, 6), st.integers(0, 5), st.integers(0, 5))
def test_tokens_are_recognised_by_source_and_place(length: int, changed: int, moved: int) -> None:
    cache, embeds = marked(6)
    tokens = cache.tokens[:length]
    assert cache.common_prefix(tokens, content_sources(embeds[:length])) == length
    other = embeds[:length].copy()
    other[changed:] += 1
    assert cache.common_prefix(tokens, content_sources(other)) == min(length, changed)
    tokens["position"][moved:] += 1
    assert cache.common_prefix(tokens, content_sources(embeds[:length])) == min(length, moved)
    assert cache.common_prefix(tokens, np.full(length, UNKNOWN)) == 0


@given(st.sets(st.integers(0, 7)), st.integers(0, 8))
def test_tokens_behind_a_dropped_one_are_not_trusted(dropped: set[int], length: int) -> None:
    cache, embeds = marked(8)
    output = np.arange(3, dtype=np.float32)
    cache.remember(output)
    kept = np.array([place for place in range(8) if place not in dropped], np.int64)
    cache.keep(kept)
    unharmed = min(dropped, default=8)
    assert cache.known == min(unharmed, len(kept))
    # Even where the new sequence has the same gaps.
    assert cache.common_prefix(cache.tokens, content_sources(embeds[kept])) == cache.known
    assert (cache.output is None) == bool(dropped)
    cache.truncate(min(length, len(cache)))
    assert (cache.output is None) == (bool(dropped) or length < 8)


def test_an_output_outlives_the_tokens_behind_it() -> None:
    cache, _ = marked(4)
    output = np.arange(3, dtype=np.float32)
    cache.remember(output)
    output += 1
    cache.reserve(1)
    cache.append(make_tokens(np.array([9]), TokenKind.ANSWER))
    assert cache.output is None
    assert cache.known == 4
    cache.release(4)
    found = cache.output
    assert found is not None
    assert found.tolist() == [0, 1, 2]
    cache.truncate(3)
    cache.append(make_tokens(np.array([9]), TokenKind.ANSWER))
    assert cache.output is None


@given(st.integers(1, 300), st.floats(0, 1))
def test_a_copy_lives_by_itself(count: int, share: float) -> None:
    cache = new_cache()
    write(cache, np.arange(count), np.zeros(count, np.int8))
    length = int(share * count)
    copied = cache.copy(length)
    write(copied, count + np.arange(3), np.zeros(3, np.int8))
    write(cache, 2 * count + np.arange(2), np.zeros(2, np.int8))
    for name in NAMES:
        places = [*range(length), *range(count, count + 3)]
        expected = np.array(places, np.float32) + NAMES.index(name) / 4
        assert np.array_equal(content(copied, name), expected)
    assert np.array_equal(content(cache, NAMES[0])[:count], np.arange(count))
    assert len(cache) == count + 2
    with pytest.raises(ValueError, match="copy"):
        cache.copy(count + 3)


@pytest.mark.parametrize(
    ("way", "failing"), [*(("host", number) for number in range(len(NAMES))), ("device", 0)]
)
def test_a_cache_whose_move_failed_is_empty_and_works(
    way: str, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = new_cache(way)
    write(cache, np.arange(5), np.zeros(5, np.int8))
    move, calls = OnnxKVBuffers._move, iter(range(10))

    def fail(self: OnnxKVBuffers, *args: object) -> None:
        if next(calls) == failing:
            raise MemoryError
        move(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(OnnxKVBuffers, "_move", fail)
    with pytest.raises(BackendError):
        cache.keep(np.array([1, 3]))
    monkeypatch.undo()
    assert len(cache) == cache.known == 0
    write(cache, np.arange(7, 10), np.zeros(3, np.int8))
    for name in NAMES:
        assert np.array_equal(content(cache, name), np.arange(7, 10) + NAMES.index(name) / 4)
