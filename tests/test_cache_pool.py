"""One bound for everything an engine keeps: counting, leaving, and many scenes on a real engine."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lrs_edge
from lrs_edge import Engine, UsageError
from lrs_edge.engine import default_cache_bytes
from lrs_edge.errors import OutOfMemoryError
from lrs_edge.language.kv_cache import KVCache
from lrs_edge.requests.cache_pool import CachePool
from lrs_edge.requests.memory import give_back
from lrs_edge.vision.encoder import FeatureCache
from tests.test_engine import picture

QUESTION = "What is this?"


class Shelf:
    """An owner that remembers what it holds."""

    def __init__(self) -> None:
        self.held: set[Hashable] = set()

    def drop(self, key: Hashable) -> None:
        self.held.remove(key)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("hold", "touch", "forget", "gone")),
        st.integers(0, 2),
        st.integers(0, 3),
        st.integers(0, 12),
    ),
    max_size=40,
)


@given(STEPS)
def test_the_pool_is_a_least_recently_used_list_over_all_owners(steps: list) -> None:
    pool, shelves = CachePool(10), [Shelf() for _ in range(3)]
    wanted: OrderedDict[tuple[int, int], int] = OrderedDict()
    for what, owner, key, size in steps:
        if what == "gone":
            shelves[owner] = Shelf()
            for name in [name for name in wanted if name[0] == owner]:
                del wanted[name]
        elif what == "hold":
            wanted.pop((owner, key), None)
            shelves[owner].held.add(key)
            if pool.hold(shelves[owner], key, size):
                wanted[owner, key] = size
            else:
                assert size > 10
                shelves[owner].held.discard(key)
            while sum(wanted.values()) > 10:
                wanted.popitem(last=False)
        elif what == "touch" and (owner, key) in wanted:
            pool.touch(shelves[owner], key)
            wanted.move_to_end((owner, key))
        elif what == "forget":
            pool.forget(shelves[owner], key)
            shelves[owner].held.discard(key)
            wanted.pop((owner, key), None)
        assert pool.nbytes == sum(wanted.values())
        assert [shelf.held for shelf in shelves] == [
            {key for place, key in wanted if place == number} for number in range(3)
        ]


def test_tokens_of_one_scene_push_out_those_of_another() -> None:
    pool = CachePool(3 * 16)
    one, other = FeatureCache(pool), FeatureCache(pool)
    tile = np.zeros((2, 2), np.float32)
    one.put("a", tile)
    one.put("b", tile)
    other.put("a", tile)
    assert one.get("a") is tile
    other.put("b", tile)
    assert one.get("b") is None
    assert (len(one), len(other), pool.nbytes) == (1, 2, 48)
    one.clear()
    assert pool.nbytes == 32


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    return [picture(folder / f"{n}.png", 300 + n, 200) for n in range(6)]


@pytest.fixture(scope="module")
def wanted(images: list[Path]) -> list[tuple[int, ...]]:
    with lrs_edge.load(threads=1, provider="cpu") as engine:
        return [ask(engine, image) for image in images]


def ask(engine: Engine, image: Path) -> tuple[int, ...]:
    with engine.open(image) as scene:
        return scene.ask(QUESTION, max_tokens=2).token_ids


@pytest.mark.parametrize("cache_bytes", [0, 12 << 20, 1 << 30])
def test_open_scenes_share_one_bound(
    images: list[Path], wanted: list[tuple[int, ...]], cache_bytes: int
) -> None:
    with lrs_edge.load(threads=1, provider="cpu", cache_bytes=cache_bytes) as engine:
        pool = engine._pool
        scenes = [engine.open(image) for image in images]
        for scene, ids in zip(scenes, wanted, strict=True):
            assert scene.ask(QUESTION, max_tokens=2).token_ids == ids
            assert pool.nbytes <= cache_bytes
            assert sum(map(kept, scenes)) <= cache_bytes + 6 * 64 * 1024
        if cache_bytes > 1 << 28:
            assert pool.nbytes == sum(map(kept, scenes))
            assert all(kept(scene) > 1 << 20 for scene in scenes)
        elif cache_bytes:
            # The scene asked last is still there, the first one is not.
            assert kept(scenes[-1]) > 1 << 20 > kept(scenes[0])
        again = scenes[0].ask(QUESTION, max_tokens=2)
        assert again.token_ids == wanted[0]
        for scene in scenes[1:]:
            scene.close()
        del scene, scenes
        gc.collect()
        assert pool.nbytes == 0


def kept(scene: lrs_edge.Scene) -> int:
    caches = scene._caches
    kept = () if caches is None else (caches.rfm, caches.llm)
    return sum(cache.buffers.nbytes for cache in kept) + scene._features.nbytes


@pytest.mark.parametrize("cache_bytes", [-1, 1.5, "1G"])
def test_a_bound_is_a_number_of_bytes(cache_bytes: object) -> None:
    with pytest.raises(UsageError, match="cache_bytes"):
        lrs_edge.load(cache_bytes=cache_bytes)


@pytest.mark.parametrize("error", [OutOfMemoryError("no room"), MemoryError()])
def test_a_finished_answer_is_not_lost_when_memory_runs_out_behind_it(
    images: list[Path], wanted: list[tuple[int, ...]], error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fails(*_: object) -> None:
        raise error

    with lrs_edge.load(threads=1, provider="cpu") as engine, engine.open(images[0]) as scene:
        with monkeypatch.context() as patch:
            patch.setattr("lrs_edge.engines.onnx.OnnxKVBuffers.gather", fails_when(fails))
            assert scene.ask(QUESTION, max_tokens=2).token_ids == wanted[0]
        assert scene.ask(QUESTION, max_tokens=2).token_ids == wanted[0]


def fails_when(fails: object) -> object:
    """`gather` that fails when buffers get smaller, as they do after an answer."""
    from lrs_edge.engines.onnx import OnnxKVBuffers

    real = OnnxKVBuffers.gather

    def gather(self: OnnxKVBuffers, indices: np.ndarray, capacity: int) -> None:
        if capacity < self.capacity:
            fails()  # type: ignore[operator]
        real(self, indices, capacity)

    return gather


def test_memory_that_runs_out_in_python_is_an_error_of_the_question(
    images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("Unable to allocate 7 GiB")

    with lrs_edge.load(threads=1, provider="cpu") as engine, engine.open(images[0]) as scene:
        monkeypatch.setattr(KVCache, "reserve", fails)
        with pytest.raises(OutOfMemoryError, match="7 GiB"):
            scene.ask(QUESTION)


def test_the_default_bound_holds_what_one_scene_keeps() -> None:
    with lrs_edge.load(provider="cpu", threads=1) as engine:
        assert engine._pool.max_bytes == default_cache_bytes(engine.manifest) == 512 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc holds what is freed")
def test_freed_memory_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("not glibc")
    libc.malloc.restype = libc.free.argtypes = None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size = 64 << 10  # Below the threshold over which memory is mapped for itself.
    blocks = [libc.malloc(size) for _ in range(1600)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:  # The last one keeps the heap from shrinking by itself.
        libc.free(block)
    before = resident()
    give_back()
    assert before - resident() > 80 << 20
    libc.free(blocks[-1])


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
