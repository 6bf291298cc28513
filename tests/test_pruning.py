"""Other ways to choose tokens and tiles: scores, whole levels, every tile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import lrs_edge
from lrs_edge import Answer, BundleError, Engine
from lrs_edge.answer import report
from lrs_edge.baselines.unpruned import spread_scores
from lrs_edge.language.kv_cache import TokenKind, make_tokens
from lrs_edge.language.sequence import TokenSequence
from lrs_edge.pyramid.levels import TileIndex, TokenGrid
from lrs_edge.search.context import spread
from lrs_edge.search.exhaustive import _Canvas
from lrs_edge.search.rfm import RegionFocus, token_scores
from lrs_edge.search.scorers import NormScorer, RandomScorer
from tests.checkpoints import GRID, write_qwen
from tests.sequences import rows_builder

EXAMPLES = Path(__file__).parent.parent / "examples"
QUESTION = "How many ships?"
#: Global view, separator; 2 x 2 tokens per local tile after pooling.
FIXED, PER_TILE = GRID**2 + 1, 4


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from lrs_edge_export.bundle.writer import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("pruning")
    export_bundle(str(write_qwen(folder / "qwen")), folder / "bundle", ExportOptions(parity=False))
    with lrs_edge.load(folder / "bundle", provider="cpu", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def embedded() -> Iterator[Engine]:
    with lrs_edge.load(provider="cpu", threads=1) as loaded:
        yield loaded


def picture(path: Path, width: int, height: int) -> Path:
    pixels = np.random.default_rng(width).integers(0, 255, size=(height, width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four search levels; the finest has 25 x 17 tiles."""
    return picture(tmp_path_factory.mktemp("large") / "large.png", 400, 260)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One search level of 3 x 3 tiles."""
    return picture(tmp_path_factory.mktemp("small") / "small.png", 46, 40)


def ask(engine: Engine, path: Path, **options: object) -> Answer:
    with engine.open(path) as scene:
        return scene.ask(QUESTION, max_tokens=3, **options)


def prefix_of(embeds: np.ndarray) -> TokenSequence:
    kinds = [TokenKind.SYSTEM, *[TokenKind.GLOBAL] * (len(embeds) - 2), TokenKind.SEPARATOR]
    return TokenSequence(embeds, make_tokens(np.arange(len(embeds)), np.array(kinds, np.int8)))


# -- scorers -------------------------------------------------------------------------------------


def test_random_scores_are_uniform_and_repeatable() -> None:
    random = np.random.default_rng(0)
    prefix = prefix_of(random.normal(size=(6, 8)).astype(np.float32))
    questions = [random.normal(size=(3, 8)).astype(np.float32) for _ in range(2)]
    grid = TokenGrid(40, 40, 40, 1, 1)
    tile = random.normal(size=(1600, 8)).astype(np.float32)
    local = rows_builder(np.zeros(8, np.float32)).local(grid, {TileIndex(0, 0): tile}, 0)

    def drawn(seed: int, question: int) -> np.ndarray:
        return token_scores(RandomScorer(seed, prefix, questions[question]).local(local).local)

    scores = drawn(1, 0)
    assert np.array_equal(scores, drawn(1, 0))
    assert not np.array_equal(scores, drawn(2, 0))
    assert not np.array_equal(scores, drawn(1, 1))
    # The softmax of the logarithms is the number's share: uniform from 0 to twice the mean.
    share = scores * len(scores)
    assert abs(share.mean() - 1) < 1e-3
    assert share.max() < 2.2
    assert abs(np.quantile(share, 0.25) - 0.5) < 0.1


def test_norm_scores_are_shares_of_the_norms() -> None:
    embeds = np.array([[3, 4], [0, 0], [6, 8], [0, 5]], np.float32)
    grid = TokenGrid(2, 2, 2, 1, 1)
    local = rows_builder(np.array([1, 0], np.float32)).local(grid, {TileIndex(0, 0): embeds}, 0)
    scorer = NormScorer(prefix_of(np.array([[9, 9], [2, 0], [0, 6], [1, 1]], np.float32)))
    norms = np.array([5, 0, 1, 10, 5, 1])
    assert np.allclose(token_scores(scorer.local(local).local), norms / norms.sum(), atol=1e-6)
    assert np.allclose(token_scores(scorer.global_view()), [0.25, 0.75])


@pytest.mark.parametrize("prune", ["random", "norm", "none"])
def test_without_the_rfm_its_graph_does_not_run(
    engine: Engine, large: Path, prune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> None:
        raise AssertionError("the RFM ran")

    for name in ("logits", "fill_prefix"):
        monkeypatch.setattr(RegionFocus, name, run)
    answer = ask(engine, large, prune=prune)
    assert answer.prune == prune
    assert answer.token_ids


@pytest.mark.parametrize("prune", ["random", "norm"])
def test_scorers_change_the_choice_and_nothing_else(
    engine: Engine, large: Path, prune: str
) -> None:
    usual, other = ask(engine, large), ask(engine, large, prune=prune)
    assert other.levels[0].tiles_encoded == usual.levels[0].tiles_encoded
    assert all(level.tiles_encoded <= 16 for level in other.levels[1:])
    assert [level.tiles_encoded for level in other.levels][-2:] == [16, 16]
    assert {r.bounds for r in other.regions} != {r.bounds for r in usual.regions}
    assert other.search_end == usual.search_end
    # Scored tokens are tile tokens and one newline per row; a quarter of the former are kept.
    for level in other.levels:
        regions = [region for region in other.regions if region.level == level.level]
        kept = sum(region.tokens_kept for region in regions)
        newlines = level.tokens_kept - kept
        assert kept == int(0.25 * (level.tokens_scored - newlines))


def test_random_follows_the_seed(engine: Engine, large: Path) -> None:
    first, again = (ask(engine, large, prune="random", seed=5) for _ in range(2))
    other = ask(engine, large, prune="random", seed=6)
    assert first.regions == again.regions
    assert first.regions != other.regions


# -- no pruning ----------------------------------------------------------------------------------


def test_none_sends_every_token_of_the_finest_level_that_fits(engine: Engine, large: Path) -> None:
    answer = ask(engine, large, prune="none")
    (level,) = answer.levels
    assert level.tiles_encoded == level.tile_rows * level.tile_cols == len(answer.regions)
    assert answer.tokens.scored == level.tokens_scored == 0
    assert answer.tokens.sent == FIXED + level.tokens_kept
    assert answer.tokens.sent + answer.tokens.text <= engine.manifest.limits.max_length
    # The finest level, of 25 x 17 tiles, is too large for the model's 512 tokens.
    assert level.width < 400
    assert answer.search_end == "max_vision_tokens"
    assert any("not at its finest" in warning for warning in answer.warnings)


def test_none_at_the_original_resolution_warns_of_nothing(engine: Engine, small: Path) -> None:
    answer = ask(engine, small, prune="none")
    assert answer.search_end == "finest_level"
    assert not answer.warnings
    assert answer.tokens.sent == FIXED + answer.levels[0].tokens_kept


def test_none_under_a_tile_budget(engine: Engine, large: Path) -> None:
    answer = ask(engine, large, prune="none", max_tiles=10)
    assert answer.search_end == "max_tiles"
    assert 1 + len(answer.regions) <= 10
    assert any("--max-tiles" in warning for warning in answer.warnings)
    part = ask(engine, large, prune="none", max_tiles=4)
    assert len(part.regions) == 3
    assert any("cannot show the whole image" in warning for warning in part.warnings)


def test_none_over_a_token_budget_sends_an_even_spread(engine: Engine, small: Path) -> None:
    answer = ask(engine, small, prune="none", max_vision_tokens=FIXED + 12)
    assert answer.tokens.sent == FIXED + 12
    assert any("even spread" in warning for warning in answer.warnings)
    kept = {region.row for region in answer.regions if region.kept}
    assert kept == {0, 1, 2}


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 60))
def test_spread_takes_as_many_as_asked_in_order(count: int, items: int) -> None:
    taken = spread(range(items), count)
    assert len(taken) == min(count, items)
    assert taken == sorted(set(taken))
    if 1 < len(taken) < items:
        steps = np.diff(taken)
        assert steps.max() - steps.min() <= 1


@settings(deadline=None)
@given(st.integers(1, 400), st.data())
def test_the_best_of_spread_scores_are_spread(count: int, data: st.DataObject) -> None:
    scores = spread_scores(count)
    assert scores.shape == (count,)
    kept = data.draw(st.integers(1, count))
    places = np.sort(np.argsort(-scores, kind="stable")[:kept])
    gaps = np.diff(np.concatenate([[-1], places, [count]]))
    # Three lengths of gaps, by Steinhaus; none much longer than an even spread's.
    assert gaps.max() <= 3 * count / kept + 2


# -- the global view alone -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prune": "none"}, {"search": "exhaustive"}])
def test_no_tiles_leave_the_global_view(
    engine: Engine, large: Path, options: dict[str, object]
) -> None:
    answer = ask(engine, large, max_tiles=0, **options)
    assert answer.token_ids
    assert answer.regions == answer.levels == ()
    assert answer.tokens.sent == FIXED
    assert answer.tokens.scored == 0
    assert answer.tokens.encoded == answer.tokens.seen == GRID**2
    assert answer.search_end == "max_tiles"
    assert ask(engine, large, max_tiles=1, **options).token_ids == answer.token_ids
    assert ask(engine, large, max_tiles=0, kv_budget=5, **options).tokens.evicted > 0


# -- every tile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", ["rfm", "random", "norm"])
def test_exhaustive_looks_at_every_tile_once(engine: Engine, large: Path, prune: str) -> None:
    answer = ask(engine, large, search="exhaustive", prune=prune, tiles_per_level=7)
    (level,) = answer.levels
    assert (level.tile_rows, level.tile_cols, level.level) == (17, 25, 3)
    assert level.tiles_encoded == 17 * 25
    places = [(region.row, region.col) for region in answer.regions]
    assert sorted(places) == [(row, col) for row in range(17) for col in range(25)]
    assert answer.search_end == "finest_level"
    assert not answer.warnings
    assert sum(region.tokens_kept for region in answer.regions) == 7 * PER_TILE // 4
    assert abs(sum(region.score for region in answer.regions) - 1) < 0.5
    assert answer.tokens.sent == FIXED + level.tokens_kept


def test_exhaustive_equals_the_search_where_that_sees_all(engine: Engine, small: Path) -> None:
    search, exhaustive = ask(engine, small), ask(engine, small, search="exhaustive")
    assert exhaustive.regions == search.regions
    assert exhaustive.levels == search.levels
    assert exhaustive.token_ids == search.token_ids


def test_exhaustive_does_not_depend_on_the_groups_where_scores_do_not(
    engine: Engine, small: Path
) -> None:
    whole = ask(engine, small, search="exhaustive", prune="norm")
    parts = ask(engine, small, search="exhaustive", prune="norm", tiles_per_level=4)
    scores = [{(r.row, r.col): r.score for r in answer.regions} for answer in (whole, parts)]
    ratios = [scores[1][place] / scores[0][place] for place in scores[0]]
    # A newline that several groups hold counts several times: one factor for all tiles.
    assert np.ptp(ratios) < 1e-5


def test_exhaustive_under_budgets(engine: Engine, large: Path) -> None:
    few = ask(engine, large, search="exhaustive", max_tiles=40)
    assert len(few.regions) == 39
    assert few.search_end == "max_tiles"
    assert {region.row for region in few.regions} == set(range(17))
    late = ask(engine, large, search="exhaustive", timeout=1e-4)
    assert late.search_end == "timeout"


grids = st.builds(
    lambda rows, cols, per_tile: TokenGrid(
        rows * per_tile, cols * per_tile - (per_tile > 1), per_tile, rows, cols
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
)


@settings(deadline=None)
@given(grids, st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_groups_together_are_one_softmax(
    grid: TokenGrid, size: int, closed: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    tiles = [TileIndex(r, c) for r in range(grid.tile_rows) for c in range(grid.tile_cols)]
    sequences = rows_builder(np.ones(4, np.float32))
    canvas = _Canvas(sequences.places(grid, tiles, 2))
    indices, weights = [], []
    for start in range(0, len(tiles), size):
        group = tiles[start : start + size]
        features = {t: random.normal(size=(grid.per_tile**2, 4)).astype(np.float32) for t in group}
        local = sequences.local(grid, features, 2, close_gaps=closed)
        logits = random.normal(size=(3, len(local))).astype(np.float32)
        canvas.add(local, logits)
        indices.append(local.indices)
        weights.append(np.exp(logits.astype(np.float64)))
    local, logits = canvas.tokens()
    assert np.array_equal(local.indices, np.arange(grid.count))
    assert np.array_equal(local.is_newline, local.indices % grid.width == grid.cols)
    assert np.all(local.embeds[local.is_newline] == 1)
    joint = np.concatenate(weights, axis=1)
    joint /= joint.sum(axis=1, keepdims=True)
    wanted = np.zeros(grid.count)
    np.add.at(wanted, np.concatenate(indices), joint.mean(axis=0))
    assert np.allclose(token_scores(logits), wanted, atol=1e-5)


# -- what is told --------------------------------------------------------------------------------


def test_answers_say_how_they_were_found(engine: Engine, small: Path) -> None:
    answer = ask(engine, small, search="exhaustive", prune="norm")
    facts = report.ImageFacts(str(small), 46, 40)
    told = json.loads(report.to_json(answer, facts))
    assert (told["search"], told["prune"], told["segments"]) == ("exhaustive", "norm", [])
    assert "exhaustive search, --prune norm" in report.evidence(answer)
    assert "(no search, --prune none" in report.evidence(ask(engine, small, prune="none"))
    assert "(full search, model" in report.evidence(ask(engine, small))


# -- the embedded model --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"prune": "random"},
        {"prune": "norm"},
        {"prune": "none"},
        {"prune": "fastv"},
        {"prune": "visionzip"},
        {"search": "exhaustive"},
        {"max_tiles": 0},
    ],
    ids=str,
)
def test_the_embedded_model_answers_or_says_what_it_needs(
    embedded: Engine, options: dict[str, object]
) -> None:
    manifest = embedded.manifest
    needs = {"fastv": manifest.llm.segments, "visionzip": manifest.vision.tower}
    with embedded.open(EXAMPLES / "coast.tif") as scene:
        if needs.get(str(options.get("prune")), True):
            assert scene.ask("What kind of place is this?", **options).text
        else:
            with pytest.raises(BundleError, match=r"--(attention-layers|vision-attention)"):
                scene.ask("What kind of place is this?", **options)
