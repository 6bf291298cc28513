"""Layouts whose global view comes last, and tiles with text between their rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrs_edge.bundle.layout import GlobalView, LocalTiles, Part, PromptSpec, Question, Text
from lrs_edge.language.kv_cache import TokenKind
from lrs_edge.language.layout import SequenceBuilder
from lrs_edge.language.prompt import Prompt
from lrs_edge.language.sequence import LocalTokens
from lrs_edge.pyramid.levels import TileIndex, TokenGrid
from lrs_edge.search.result import SearchResult
from lrs_edge.search.search import trim
from tests.checkpoints import byte_tokenizer

#: Tokens along a tile's side, and what stands for a token of a tile.
SIDE, SHOWN, VIEWS = 2, 1000, 3
#: What the first token of a byte-level tokenizer stands for.
BYTES = ord("!")
MARKED = LocalTiles(before="<{row},{col}>", row="/", end="!", most=6)


def builder(local: LocalTiles = MARKED) -> SequenceBuilder:
    """Embeddings hold the token's number; the view's are negative."""
    parts: tuple[Part, ...] = (Text("ab"), local, Text("v"), GlobalView(), Question("q{question}"))
    prompt = Prompt(byte_tokenizer().to_str(), PromptSpec(parts, (258,)), 259)
    return SequenceBuilder(
        prompt, lambda ids: ids[:, None].astype(np.float32), np.zeros(1, np.float32), VIEWS
    )


def level(rows: int, cols: int) -> TokenGrid:
    return TokenGrid(rows * SIDE, cols * SIDE, SIDE, rows, cols)


def features(tiles: list[TileIndex]) -> dict[TileIndex, np.ndarray]:
    return {tile: np.full((SIDE * SIDE, 1), SHOWN, np.float32) for tile in tiles}


def text_of(local: LocalTokens) -> str:
    """Text of local tokens, a dot for a token of a tile."""
    numbers = local.embeds[:, 0].astype(int).tolist()
    return "".join("." if number == SHOWN else chr(number + BYTES) for number in numbers)


def wanted(kept: dict[TileIndex, int]) -> str:
    """What should stand for tiles with so many kept tokens each."""
    rows: dict[int, str] = {}
    for tile in sorted(kept):
        mark = f"<{tile.row + 1},{tile.col + 1}>"
        rows[tile.row] = rows.get(tile.row, "") + mark + "." * kept[tile]
    return "/".join(rows.values()) + "!" if rows else ""


grids = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(grids, st.data())
def test_what_is_kept_is_as_if_the_rest_had_never_been(
    size: tuple[int, int], data: st.DataObject
) -> None:
    grid = level(*size)
    every = [TileIndex(row, col) for row in range(size[0]) for col in range(size[1])]
    tiles = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    local = builder().local(grid, features(tiles), 0)
    assert (np.diff(local.indices) > 0).all()
    assert len(local) <= builder().count(grid)
    if len(tiles) == len(every):
        assert text_of(local) == wanted(dict.fromkeys(every, SIDE * SIDE))
        assert len(local) == builder().count(grid)
    shown = np.flatnonzero(~local.is_structure)
    top = np.array(data.draw(st.lists(st.sampled_from(shown.tolist()), min_size=1, unique=True)))
    kept = local.take(np.union1d(top, local.structure_of(top)))
    counts: dict[TileIndex, int] = {}
    for place in top:
        tile = TileIndex(int(local.tile_rows[place]), int(local.tile_cols[place]))
        counts[tile] = counts.get(tile, 0) + 1
    assert text_of(kept) == wanted(counts)
    # Trimmed to any number, it is again.
    budget = data.draw(st.integers(0, len(kept)))
    scores = np.where(kept.is_structure, 0, np.arange(len(kept))).astype(np.float32)
    last = SimpleNamespace(grid=grid, is_scored=True)
    result = SearchResult([last], kept, scores)  # type: ignore[list-item]
    trim(result, budget, "the test", "max_vision_tokens")
    left = result.final
    assert len(left) <= budget
    remaining: dict[TileIndex, int] = {}
    for place in np.flatnonzero(~left.is_structure):
        tile = TileIndex(int(left.tile_rows[place]), int(left.tile_cols[place]))
        remaining[tile] = remaining.get(tile, 0) + 1
    assert text_of(left) == wanted(remaining)


def test_marks_of_a_large_level_count_its_sixths() -> None:
    grid = level(12, 3)
    tiles = [TileIndex(0, 0), TileIndex(1, 2), TileIndex(11, 2)]
    text = text_of(builder().local(grid, features(tiles), 0))
    assert text == "<1,1>..../<1,3>..../<6,3>....!"


def test_the_view_comes_last_and_is_known_as_such() -> None:
    sequences = builder()
    view = np.full((VIEWS, 1), -1, np.float32)
    prefix = sequences.prefix(view)
    assert prefix.embeds[:, 0].tolist() == [ord(letter) - BYTES for letter in "ab"]
    asked = sequences.prompt.tokens("?")
    after = sequences.after(asked.after, view)
    numbers = [ord(letter) - BYTES for letter in "vq?"]
    assert after[:, 0].tolist() == [numbers[0], -1, -1, -1, *numbers[1:]]
    assert sequences.views_after == VIEWS
    alone = sequences.without_local(prefix, after)
    kinds = alone.tokens["kind"]
    assert np.flatnonzero(kinds == TokenKind.GLOBAL).tolist() == [3, 4, 5]
    assert alone.tokens["position"].tolist() == list(range(8))
    local = sequences.local(level(1, 1), features([TileIndex(0, 0)]), 0)
    whole = sequences.final(prefix, local, after)
    assert whole.tokens["position"].tolist() == list(range(len(whole)))
    views = np.flatnonzero(whole.tokens["kind"] == TokenKind.GLOBAL)
    assert (whole.embeds[views] == -1).all()
    assert len(views) == VIEWS


@pytest.mark.parametrize("local", [LocalTiles(), LocalTiles(row="/")])
def test_tiles_without_marks(local: LocalTiles) -> None:
    tiles = [TileIndex(0, 0), TileIndex(1, 1)]
    text = text_of(builder(local).local(level(2, 2), features(tiles), 0))
    assert text == "...." + local.row + "...."
