"""An engine's questions under budgets, in simulated time, and from threads and event loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lrs_edge
from lrs_edge import Answer, CancelledError, Engine, Progress, QueueFullError
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.engines import metered
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.requests.clock import Clock
from tests.golden_data import ROOT
from tests.test_engine import picture

IMAGE = ROOT / "images" / "img_1500x900.png"
QUESTION = "How many ships are there?"


@pytest.fixture(scope="module")
def engine(golden_bundles: dict[str, Path]) -> Iterator[Engine]:
    with lrs_edge.load(golden_bundles["llama"], provider="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three search levels, of 9, 42 and 117 tiles."""
    return picture(tmp_path_factory.mktemp("large") / "large.png", 4100, 3000)


def ask(engine: Engine, path: Path, **options: Any) -> Answer:
    with engine.open(path) as scene:
        return scene.ask(QUESTION, max_tokens=4, **options)


@pytest.mark.parametrize("limit", [2, 3, 4, 5, 7, 10, 13, 20, 30, 41, 60])
def test_a_tile_budget_is_shared_and_reaches_the_finest_level(
    engine: Engine, large: Path, limit: int
) -> None:
    answer = ask(engine, large, max_tiles=limit)
    counts = {level.level: level.tiles_encoded for level in answer.levels}
    assert 1 + sum(counts.values()) <= limit
    assert answer.levels[-1].level == 2
    assert sorted(counts) == list(range(3 - min(limit - 1, 3), 3))
    if limit <= 40:
        assert 1 + sum(counts.values()) == limit
        assert answer.search_end == "max_tiles"
    assert any("skipped" in warning for warning in answer.warnings) == (limit < 4)
    assert answer.tokens.sent > engine.manifest.vision.grid**2
    assert answer.text


@pytest.mark.parametrize("limit", [0, 1])
def test_no_tiles_leave_the_global_view_alone(engine: Engine, large: Path, limit: int) -> None:
    answer = ask(engine, large, max_tiles=limit)
    assert not answer.levels
    assert answer.search_end == "max_tiles"
    assert answer.text


class World:
    """Time that passes only while graphs run and tiles are read."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A slow machine: 0.1 s per tile, 1 ms per token, at least 10 ms per run."""
    world, run = World(), OnnxGraph.run

    def slow(
        self: OnnxGraph, feeds: Mapping[str, Any], outputs: Sequence[str], buffers: Any = None
    ) -> list[Any]:
        if "pixel_values" in feeds:
            world.now += 0.1 * len(feeds["pixel_values"])
        else:
            world.now += max(0.001 * feeds["position_ids"].shape[1], 0.01)
        return run(self, feeds, outputs, buffers)

    class Timer:
        perf_counter = world

    monkeypatch.setattr(OnnxGraph, "run", slow)
    monkeypatch.setattr(metered, "time", Timer)
    monkeypatch.setattr("lrs_edge.requests.question_run.Clock", partial(Clock, now=world))
    return world


def shortest(bundle: Path, path: Path, world: World) -> float:
    """Seconds of the global view, prefill and a few tokens."""
    with lrs_edge.load(bundle, provider="cpu") as engine:
        start = world.now
        ask(engine, path, max_tiles=0)
        return world.now - start


@pytest.mark.parametrize("times", [1.1, 1.5, 2.0, 3.0, 5.0])
def test_any_time_limit_above_the_shortest_answer_is_kept_with_an_answer(
    golden_bundles: dict[str, Path], large: Path, world: World, times: float
) -> None:
    limit = times * shortest(golden_bundles["llama"], large, world)
    with lrs_edge.load(golden_bundles["llama"], provider="cpu") as engine:
        start = world.now
        answer = ask(engine, large, timeout=limit)
        taken = world.now - start
        again = ask(engine, large, timeout=limit)
    assert answer.text
    assert again.text
    # One run of an engine may have begun just before the limit.
    assert taken <= limit + 0.3
    assert answer.search_end == "timeout"
    assert any("time limit" in warning for warning in answer.warnings)


@pytest.mark.usefixtures("world")
def test_more_time_looks_at_more_tiles(golden_bundles: dict[str, Path], large: Path) -> None:
    counts = []
    with lrs_edge.load(golden_bundles["llama"], provider="cpu") as engine:
        for limit in (1.5, 3.0, 6.0, 12.0, 100.0):
            answer = ask(engine, large, timeout=limit)
            counts.append(sum(level.tiles_encoded for level in answer.levels))
        unlimited = ask(engine, large)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    assert answer.regions == unlimited.regions
    assert answer.token_ids == unlimited.token_ids


def test_a_limit_far_too_short_gives_an_empty_answer_in_time(
    golden_bundles: dict[str, Path], large: Path, world: World
) -> None:
    with lrs_edge.load(golden_bundles["llama"], provider="cpu") as engine:
        start = world.now
        answer = ask(engine, large, timeout=0.05)
    assert world.now - start <= 0.11
    assert answer.finish_reason == "timeout"
    assert answer.search_end == "timeout"
    assert answer.text == ""


def test_a_prefill_slower_than_measured_sends_less_and_answers(
    golden_bundles: dict[str, Path], large: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lrs_edge.load(golden_bundles["llama"], provider="cpu") as engine:
        whole = ask(engine, large)
        start = world.now
        ask(engine, large, timeout=1000.0)
        taken = world.now - start
        run, local = OnnxGraph.run, False

        def slower(
            self: OnnxGraph, feeds: Mapping[str, Any], outputs: Sequence[str], buffers: Any = None
        ) -> list[Any]:
            nonlocal local
            is_llm = "logits" in self.outputs and self.outputs["logits"].shape[-1] is not None
            if is_llm and local:
                world.now += 0.5 * taken
            local = is_llm and feeds["past_length"].item() >= 500
            return run(self, feeds, outputs, buffers)

        monkeypatch.setattr(OnnxGraph, "run", slower)
        answer = ask(engine, large, timeout=taken * 1.8)
    assert answer.text
    assert answer.tokens.sent <= whole.tokens.sent


def test_streams_of_one_thread_do_not_block_each_other(engine: Engine) -> None:
    with engine.open(IMAGE) as scene:
        alone = scene.ask(QUESTION, max_tokens=6)
        streams = [scene.stream(QUESTION, max_tokens=6) for _ in range(3)]
        assert scene.ask(QUESTION, max_tokens=2).token_ids == alone.token_ids[:2]
        for stream in reversed(streams):
            assert "".join(stream).strip() == alone.text
            assert stream.answer.token_ids == alone.token_ids


def test_closing_a_scene_ends_its_streams(engine: Engine) -> None:
    scene, other = engine.open(IMAGE), engine.open(IMAGE)
    streams = [scene.stream(QUESTION, max_tokens=64) for _ in range(3)]
    kept = other.stream(QUESTION, max_tokens=3)
    scene.close()
    for stream in streams:
        with pytest.raises(CancelledError, match="scene was closed"):
            list(stream)
    assert list(kept)
    other.close()


def test_closing_an_engine_ends_all_streams(golden_bundles: dict[str, Path]) -> None:
    engine = lrs_edge.load(golden_bundles["llama"], provider="cpu")
    streams = [engine.open(IMAGE).stream(QUESTION) for _ in range(3)]
    closers = [threading.Thread(target=engine.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(60)
    for stream in streams:
        with pytest.raises(CancelledError, match="closed"):
            list(stream)


def test_closing_inside_a_progress_callback_does_not_hang(engine: Engine) -> None:
    scene = engine.open(IMAGE)

    def close(_: Progress) -> None:
        scene.close()

    with pytest.raises(CancelledError):
        scene.ask(QUESTION, on_progress=close)


def test_an_interrupt_ends_the_question_between_tiles(engine: Engine, large: Path) -> None:
    events: list[Progress] = []

    def interrupt(event: Progress) -> None:
        events.append(event)
        raise KeyboardInterrupt

    before = engine.meter.read()
    with engine.open(large) as scene:
        with pytest.raises(KeyboardInterrupt):
            scene.ask(QUESTION, on_progress=interrupt)
        scene.close()
    done = engine.meter.since(before).get(engine.manifest.vision.path(Flavour.PLAIN))
    assert done is None or done.tiles < 41
    assert len(events) == 1


def test_a_full_queue_refuses_a_question(golden_bundles: dict[str, Path]) -> None:
    with (
        lrs_edge.load(golden_bundles["llama"], provider="cpu", max_waiting=1) as engine,
        engine.open(IMAGE) as scene,
    ):
        streams = [scene.stream(QUESTION, max_tokens=64) for _ in range(2)]
        with pytest.raises(QueueFullError):
            scene.ask(QUESTION)
        for stream in streams:
            stream.close()


def test_many_threads_on_several_scenes(engine: Engine, large: Path) -> None:
    scenes = [engine.open(IMAGE), engine.open(large), engine.open(IMAGE), engine.open(large)]
    options: dict[str, Any] = {"max_tokens": 3, "tiles_per_level": 2}
    alone = [scene.ask(QUESTION, **options).token_ids for scene in scenes]
    found: dict[int, tuple[int, ...]] = {}

    def work(number: int) -> None:
        found[number] = scenes[number % 4].ask(QUESTION, **options).token_ids

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(16)] == alone * 4
    for scene in scenes:
        scene.close()


def test_an_event_loop_asks_and_streams(engine: Engine) -> None:
    async def main() -> None:
        with engine.open(IMAGE) as scene:
            alone = await scene.aask(QUESTION, max_tokens=6)

            async def in_threads() -> str:
                stream, text = scene.stream(QUESTION, max_tokens=6), ""
                while (piece := await asyncio.to_thread(next, stream, None)) is not None:
                    text += piece
                return text.strip()

            async def in_loop() -> str:
                return "".join([p async for p in scene.astream(QUESTION, max_tokens=6)]).strip()

            texts = await asyncio.gather(*[in_threads() for _ in range(12)], in_loop(), in_loop())
            assert texts == [alone.text] * 14
            task = asyncio.create_task(scene.aask(QUESTION, max_tokens=64))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await scene.aask(QUESTION, max_tokens=6)).token_ids == alone.token_ids

    asyncio.run(main())


def test_room_for_the_answer_is_kept_in_the_models_length(
    golden_bundles: dict[str, Path], tmp_path: Path
) -> None:
    image = picture(tmp_path / "image.png", 1300, 1000)
    with lrs_edge.load(golden_bundles["llama"], provider="cpu") as engine:
        length = engine.manifest.limits.max_length
        question = "Where is it? " * 165
        with engine.open(image) as scene:
            few = scene.ask(question, max_tokens=8)
            many = scene.ask(question, max_tokens=200)
            most = scene.ask(question, max_tokens=10 * length)
    for answer, wanted in ((few, 8), (many, 200)):
        assert answer.tokens.sent + answer.tokens.text + wanted <= length
    assert few.tokens.sent > many.tokens.sent > most.tokens.sent
    used = most.tokens.sent + most.tokens.text + most.tokens.generated
    assert used <= length
    assert np.isfinite(most.timings.total)
