"""The engine as a developer uses it, on a bundle exported from a golden checkpoint."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lrs_edge
from lrs_edge import Answer, Engine, Progress, UsageError
from tests.golden_data import ROOT

IMAGE = ROOT / "images" / "img_1500x900.png"
QUESTION = "How many ships are there?"


@pytest.fixture(scope="module")
def engine(golden_bundles: dict[str, Path]) -> Engine:
    with lrs_edge.load(golden_bundles["llama"], provider="cpu") as loaded:
        yield loaded


def picture(path: Path, width: int, height: int) -> Path:
    """A picture with a smooth gradient and some noise."""
    random = np.random.default_rng(width * 7919 + height)
    across = np.linspace(0, 200, width)[None, :, None]
    pixels = across + random.integers(0, 55, size=(height, width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three search levels."""
    return picture(tmp_path_factory.mktemp("large") / "large.png", 4100, 3000)


def ask(engine: Engine, path: Path, **options: object) -> Answer:
    with engine.open(path) as scene:
        return scene.ask(QUESTION, max_tokens=4, **options)


def test_an_answer_tells_where_it_looked(engine: Engine, large: Path) -> None:
    answer = ask(engine, large)
    assert answer.text
    assert answer.search_end == "finest_level"
    assert not answer.warnings
    assert [level.level for level in answer.levels] == [0, 1, 2]
    assert answer.levels[-1].width >= 4100 / 1.5
    for region in answer.regions:
        x0, y0, x1, y1 = region.bounds
        assert 0 <= x0 < x1 <= 4100 + 1e-6
        assert 0 <= y0 < y1 <= 3000 + 1e-6
        assert x0 <= region.peak[0] < region.peak[2] <= x1 + 1e-6
        assert 0 <= region.score <= 1
        assert region.kept == (region.tokens_kept > 0)
    finest = [region for region in answer.regions if region.level == 2]
    assert answer.regions[: len(finest)] == tuple(finest)
    assert [r.score for r in finest] == sorted((r.score for r in finest), reverse=True)
    looked_at = sum(level.tiles_encoded + level.tiles_from_cache for level in answer.levels)
    assert len(answer.regions) == looked_at
    kept = sum(region.tokens_kept for region in finest)
    newlines = answer.levels[-1].tokens_kept - kept
    assert newlines > 0
    assert answer.tokens.sent == 576 + 1 + kept + newlines
    assert answer.tokens.encoded == 576 + 144 * looked_at
    assert answer.peak_memory > 1 << 20
    parts = answer.timings
    assert parts.read + parts.encode + parts.score + parts.prefill + parts.decode <= parts.total


def test_no_level_looks_at_more_tiles_than_allowed(engine: Engine, large: Path) -> None:
    answer = ask(engine, large, tiles_per_level=3)
    assert [level.tiles_encoded for level in answer.levels][1:] == [3, 3]


def test_a_second_question_reuses_tiles_and_prefixes(engine: Engine) -> None:
    with engine.open(IMAGE) as scene:
        first = scene.ask(QUESTION, max_tokens=4)
        scene.ask("Is there a river?", max_tokens=4)
        again = scene.ask(QUESTION, max_tokens=4)
    assert again.token_ids == first.token_ids
    assert again.regions == first.regions
    assert sum(level.tiles_encoded for level in again.levels) == 0
    assert again.timings.read == again.timings.encode == 0


@pytest.mark.parametrize("limit", [1, 4, 6, 12])
def test_the_tile_budget_holds_and_is_reported(engine: Engine, large: Path, limit: int) -> None:
    answer = ask(engine, large, max_tiles=limit)
    assert 1 + len(answer.regions) <= limit
    assert answer.search_end == "max_tiles"
    assert any("--max-tiles" in warning for warning in answer.warnings)
    assert answer.text


def test_a_small_budget_still_reaches_the_finest_level(engine: Engine, large: Path) -> None:
    assert len(ask(engine, large, max_tiles=14).levels) == 3


@pytest.mark.parametrize("limit", [577, 600, 700])
def test_the_vision_token_budget_holds(engine: Engine, limit: int) -> None:
    answer = ask(engine, IMAGE, max_vision_tokens=limit)
    assert answer.tokens.sent == limit
    assert answer.search_end == "max_vision_tokens"
    assert any("--max-vision-tokens" in warning for warning in answer.warnings)


def test_the_kv_budget_evicts_and_the_next_question_is_unharmed(engine: Engine) -> None:
    with engine.open(IMAGE) as scene:
        before = scene.ask(QUESTION, max_tokens=4)
        small = scene.ask(QUESTION, max_tokens=4, kv_budget=200)
        after = scene.ask(QUESTION, max_tokens=4)
    assert small.tokens.sent + small.tokens.text - small.tokens.evicted == 200
    assert after.token_ids == before.token_ids


def test_a_kv_budget_below_the_text_keeps_the_text(engine: Engine) -> None:
    answer = ask(engine, IMAGE, kv_budget=3)
    # The separator is never dropped, as text is not.
    assert answer.tokens.evicted == answer.tokens.sent - 1
    assert any("KV budget" in warning for warning in answer.warnings)


def test_time_ends_the_search_and_the_answer(engine: Engine, large: Path) -> None:
    answer = ask(engine, large, timeout=0.001)
    assert answer.finish_reason == "timeout"
    assert answer.search_end == "timeout"
    assert any("time" in warning for warning in answer.warnings)


@pytest.mark.parametrize("policy", ["full", "reference"])
@pytest.mark.parametrize(
    "size",
    [(336, 336), (336, 200), (2000, 50), (50, 2000), (40, 40), (200, 40), (1, 1), (1, 700)],
)
def test_every_shape_gets_an_answer(
    engine: Engine, tmp_path: Path, policy: str, size: tuple[int, int]
) -> None:
    answer = ask(engine, picture(tmp_path / "image.png", *size), policy=policy)
    assert answer.finish_reason in ("stop", "length")
    assert answer.regions
    x0, y0, x1, y1 = answer.regions[0].bounds
    assert 0 <= x0 < x1 <= size[0] + 1e-6
    assert 0 <= y0 < y1 <= size[1] + 1e-6


def test_where_the_reference_fails_the_full_policy_answers(engine: Engine, tmp_path: Path) -> None:
    path = picture(tmp_path / "image.png", 336, 336)
    answer = ask(engine, path, policy="reference")
    assert answer.policy == "full"
    assert any("reference" in warning for warning in answer.warnings)
    assert answer.token_ids == ask(engine, path).token_ids


def test_streamed_pieces_are_the_answer(engine: Engine) -> None:
    with engine.open(IMAGE) as scene:
        stream = scene.stream(QUESTION, max_tokens=12)
        with pytest.raises(UsageError, match="not finished"):
            _ = stream.answer
        pieces = list(stream)
        assert len(pieces) > 1
        assert "".join(pieces).strip() == stream.answer.text
        assert scene.ask(QUESTION, max_tokens=12).text == stream.answer.text


def test_a_closed_engine_leaves_memory_without_the_garbage_collector(
    golden_bundles: dict[str, Path],
) -> None:
    gc.collect()
    gc.disable()
    try:
        engine = lrs_edge.load(golden_bundles["llama"], provider="cpu")
        held = weakref.ref(engine._stages)
        with engine.open(IMAGE) as scene:
            scene.ask(QUESTION, max_tokens=1)
        engine.close()
        assert held() is None
    finally:
        gc.enable()


def test_max_tokens_cuts_the_same_answer_short(engine: Engine) -> None:
    with engine.open(IMAGE) as scene:
        whole = scene.ask(QUESTION, max_tokens=12)
        limited = scene.ask(QUESTION, max_tokens=3)
    assert limited.finish_reason == "length"
    assert whole.token_ids[:3] == limited.token_ids


def test_the_global_view_is_read_again_under_another_resampling(
    engine: Engine, tmp_path: Path
) -> None:
    with engine.open(IMAGE) as scene:
        scene.ask(QUESTION, max_tokens=1)
        scene.ask(QUESTION, max_tokens=1, resampling="reference", trace=tmp_path / "used.npz")
    with engine.open(IMAGE) as scene:
        scene.ask(QUESTION, max_tokens=1, resampling="reference", trace=tmp_path / "fresh.npz")
    with np.load(tmp_path / "used.npz") as used, np.load(tmp_path / "fresh.npz") as fresh:
        for key in ("rfm1_attn", "rfm2_attn", "step_logits"):
            assert np.abs(used[key] - fresh[key]).max() <= 1e-5 * np.abs(fresh[key]).max()


@pytest.mark.parametrize("size", [(300, 3000), (100, 9000), (3000, 120)])
def test_newlines_cannot_crowd_out_the_image(
    engine: Engine, tmp_path: Path, size: tuple[int, int]
) -> None:
    answer = ask(engine, picture(tmp_path / "strip.png", *size))
    assert answer.search_end == "finest_level"
    assert answer.levels[-1].height >= size[1] / 1.5
    assert sum(region.tokens_kept for region in answer.regions if region.level == 1) > 0


def test_a_tight_budget_still_sends_image(engine: Engine) -> None:
    answer = ask(engine, IMAGE, max_vision_tokens=620)
    finest = answer.levels[-1].level
    sent = sum(region.tokens_kept for region in answer.regions if region.level == finest)
    assert sent > 20


def test_a_budget_below_the_global_view_is_answered_with_a_warning(engine: Engine) -> None:
    answer = ask(engine, IMAGE, max_vision_tokens=100)
    assert answer.tokens.sent == 577
    assert any("always sent" in warning for warning in answer.warnings)


def test_memory_of_old_questions_is_given_back(engine: Engine) -> None:
    with engine.open(IMAGE) as scene:
        scene.ask(QUESTION, max_tokens=1)
        caches = scene._caches
        assert caches is not None
        for cache in (caches.rfm, caches.llm):
            assert len(cache) > 576
            assert cache.buffers.capacity < len(cache) + 256


def test_the_cut_of_the_reference_is_counted(engine: Engine) -> None:
    with engine.open(IMAGE) as scene:
        answer = scene.ask("Where is it? " * 170, policy="reference", max_tokens=1)
    assert answer.tokens.sent + answer.tokens.text == engine.manifest.limits.max_length
    assert any("cut" in warning for warning in answer.warnings)


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (None, {}),
        (5, {}),
        (b"x", {}),
        ("x", {"end_str": None}),
        ("x", {"end_str": "</s>"}),
        ("x", {"temperature": "0.5"}),
        ("x", {"max_tokens": True}),
        ("x", {"seed": 1.5}),
        ("x", {"options": {"max_tokens": 2}}),
        ("x", {"trace": ""}),
        ("x", {"trace": "/nowhere/at/all.npz"}),
    ],
)
def test_arguments_of_the_wrong_kind_are_usage_errors(
    engine: Engine, question: object, options: dict[str, object]
) -> None:
    with engine.open(IMAGE) as scene, pytest.raises(UsageError):
        scene.ask(question, **options)


@pytest.mark.parametrize("threads", [0, -1, "2"])
def test_threads_are_a_sensible_number(threads: object) -> None:
    with pytest.raises(UsageError, match="threads"):
        lrs_edge.load(threads=threads)


def test_sampling_is_repeatable(engine: Engine) -> None:
    with engine.open(IMAGE) as scene:
        options = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 8}
        texts = [scene.ask(QUESTION, seed=seed, **options).token_ids for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_threads_share_an_engine(engine: Engine) -> None:
    with engine.open(IMAGE) as scene:
        questions = [QUESTION, "Is there a river?", "What color is the roof?"]
        alone = [scene.ask(question, max_tokens=3).token_ids for question in questions]
        together: dict[int, tuple[int, ...]] = {}

        def work(number: int) -> None:
            together[number] = scene.ask(questions[number], max_tokens=3).token_ids

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [together[i] for i in range(3)] == alone


def test_progress_counts_up_to_what_was_announced(engine: Engine, large: Path) -> None:
    events: list[Progress] = []
    with engine.open(large) as scene:
        scene.ask(QUESTION, max_tokens=2, on_progress=events.append)
    stages = [event.stage for event in events]
    assert set(stages) == {"read", "encode", "score", "prefill", "decode"}
    assert stages.index("prefill") < stages.index("decode")
    assert events[-1].tiles_encoded == events[-1].tiles_read == events[-1].tiles_total
    encoded = [event.tiles_encoded for event in events]
    assert encoded == sorted(encoded)


def test_a_closed_scene_or_engine_says_so(golden_bundles: dict[str, Path]) -> None:
    engine = lrs_edge.load(golden_bundles["llama"], provider="cpu")
    scene = engine.open(IMAGE)
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        scene.ask(QUESTION)
    with pytest.raises(UsageError, match="closed"):
        engine.open(IMAGE)


def test_the_question_is_never_cut(engine: Engine) -> None:
    question = "Where is it? " * 170
    with engine.open(IMAGE) as scene:
        answer = scene.ask(question, max_tokens=2)
        assert answer.search_end == "max_vision_tokens"
        assert answer.tokens.sent + answer.tokens.text <= engine.manifest.limits.max_length
        with pytest.raises(UsageError, match="shorter question"):
            scene.ask("Where is it? " * 700, max_tokens=2)


def test_the_reference_policy_has_no_tile_budget(engine: Engine) -> None:
    with pytest.raises(UsageError, match="--max-tiles"):
        ask(engine, IMAGE, policy="reference", max_tiles=4)


def test_the_public_names_are_the_promised_ones() -> None:
    assert set(lrs_edge.__all__) <= set(dir(lrs_edge))
    for name in lrs_edge.__all__:
        assert getattr(lrs_edge, name) is not None
    with pytest.raises(AttributeError):
        _ = lrs_edge.nothing
