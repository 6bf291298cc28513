"""The prompt's layout is data: a family with marked tiles is described, not programmed.

The expected sequences are built here by hand, part by part, from the vision graph's own output.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="exporting needs the `export` extra")

from tokenizers import Tokenizer

import lrs_edge
from lrs_edge.bundle.bundle import Embeddings, open_bundle
from lrs_edge.bundle.layout import (
    GlobalView,
    LocalRows,
    LocalTiles,
    Part,
    Question,
    Separator,
    Text,
    TokenIds,
)
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.errors import BundleError
from lrs_edge.language.kv_cache import KVCache, TokenKind, make_tokens, position_ids
from lrs_edge.language.llm import LanguageModel
from lrs_edge.pyramid.levels import TileIndex, TokenGrid
from lrs_edge.search.rfm import RegionFocus
from lrs_edge_export.bundle import writer
from lrs_edge_export.bundle.writer import ExportOptions, export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.sequences import model_sequences
from lrs_edge_export.distill.features import open_encoder
from lrs_edge_export.distill.questions import TrainingQuestion
from lrs_edge_export.distill.sequences import Assembler, QuestionGroup
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.graphs.sessions import open_session
from lrs_edge_export.parity.sequences import PromptSequence
from tests.checkpoints import write_qwen
from tests.golden_data import checkpoint
from tests.sequences import tiles_builder

QUESTION = "How many ships?"

#: As InternVL lays its tiles out: a mark in text before each, text between and after them.
MARKED: tuple[Part, ...] = (
    TokenIds((256,)),
    Text("<|im_start|>user\n"),
    Text("<img>"),
    GlobalView(),
    Separator((58, 59)),
    Text("</img>"),
    LocalTiles(before="\n<tile {number}: {row}_{col}>", after=";"),
    Text("\n"),
    Question("{question}<|im_end|>\n<|im_start|>assistant\n"),
)
PLAIN_ROWS = tuple(
    LocalRows(newline=False) if isinstance(part, LocalTiles) else part for part in MARKED
)


def marked(model: Model, parts: tuple[Part, ...] = MARKED) -> Model:
    import msgspec

    return replace(model, prompt=msgspec.structs.replace(model.prompt, parts=parts))


def export(source: Path, target: Path, parts: tuple[Part, ...] = MARKED) -> Path:
    """A bundle of the checkpoint, as a family with another layout would write it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "read_model", lambda *given: marked(read_model(*given), parts))
        export_bundle(str(source), target, ExportOptions(parity=False))
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("marked") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    return export(source, source.parent / "bundle")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 x 3 tiles of 16 pixels at the base level, and finer ones."""
    path = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


class Seen:
    """What the stages are given while a question is answered."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.scored: list[tuple[np.ndarray, np.ndarray]] = []
        self.prompts: list[tuple[np.ndarray, np.ndarray]] = []
        for owner, name, seen in (
            (RegionFocus, "logits", self.scored),
            (LanguageModel, "prefill", self.prompts),
        ):
            patch.setattr(owner, name, self._spy(getattr(owner, name), seen))

    @staticmethod
    def _spy(run: Any, seen: list[tuple[np.ndarray, np.ndarray]]) -> Any:
        def spied(owner: Any, cache: Any, embeds: Any, tokens: Any, *more: Any) -> Any:
            seen.append((embeds, tokens))
            return run(owner, cache, embeds, tokens, *more)

        return spied


class ByHand:
    """The sequence of MARKED, straight from tokenizer, table and tiles' tokens."""

    def __init__(self, bundle: Path) -> None:
        manifest = open_bundle(bundle).manifest
        self._tokenizer = Tokenizer.from_file(str(bundle / manifest.tokenizer))
        self._embeddings = Embeddings(
            bundle / manifest.embeddings, manifest.llm.hidden, manifest.llm.vocabulary
        )
        self.grid = manifest.vision.grid

    def text(self, text: str) -> np.ndarray:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._embeddings.lookup(np.array(ids, np.int64))

    def prefix(self, view: np.ndarray) -> np.ndarray:
        bos = self._embeddings.lookup(np.array([256]))
        separator = self._embeddings.lookup(np.array([58, 59]))
        opened = [bos, self.text("<|im_start|>user\n"), self.text("<img>")]
        return np.concatenate([*opened, view, separator, self.text("</img>")])

    def pooled(self, tokens: np.ndarray) -> np.ndarray:
        half = self.grid // 2
        split = tokens.reshape(half, 2, half, 2, -1)
        cells = [(row, col) for row in range(half) for col in range(half)]
        return np.stack([split[row, :, col].mean((0, 1)) for row, col in cells])

    def tile(self, row: int, col: int, cols: int, tokens: np.ndarray) -> np.ndarray:
        mark = f"\n<tile {row * cols + col + 1}: {row + 1}_{col + 1}>"
        return np.concatenate([self.text(mark), tokens, self.text(";")])

    def level(self, view: np.ndarray, tiles: np.ndarray, side: int) -> np.ndarray:
        """All side * side tiles of a level."""
        shown = [
            self.tile(number // side, number % side, side, self.pooled(tokens))
            for number, tokens in enumerate(tiles)
        ]
        after = [self.text("\n"), self.text(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n")]
        return np.concatenate([self.prefix(view), *shown, *after])


def base_tokens(bundle: Path, image: Path) -> np.ndarray:
    """Tokens [10, 16, D] of the global view and the nine tiles of the base level, by the graph."""
    with lrs_edge.load(bundle) as engine, engine.open(image) as scene:
        vision = engine._loaded().vision
        views = [scene.raster.read((16, 16), lrs_edge.pyramid.LevelWindow(0, 0, 16, 16))]
        for row in range(3):
            for col in range(3):
                window = lrs_edge.pyramid.LevelWindow(row * 16, col * 16, 16, 16)
                views.append(scene.raster.read((48, 48), window))
        tiles = np.stack([vision.normalise(view) for view in views])
    graph = bundle / open_bundle(bundle).manifest.vision.path(Flavour.PLAIN)
    tokens: np.ndarray = open_session(graph).run(["tokens"], {"pixel_values": tiles})[0]
    return tokens


def test_all_who_build_sequences_build_the_same(
    source: Path, bundle: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = base_tokens(bundle, image)
    wanted = ByHand(bundle).level(tokens[0], tokens[1:], 3)
    seen = Seen(monkeypatch)
    with lrs_edge.load(bundle) as engine, engine.open(image) as scene:
        assert scene.ask(QUESTION, max_tokens=2).token_ids
    embeds, labels = seen.scored[0]
    np.testing.assert_allclose(embeds, wanted, atol=1e-5)
    assert np.array_equal(position_ids(labels), np.arange(len(wanted))[None])
    model = marked(read_model(find_checkpoint(str(source))))
    calibrated = PromptSequence(model, model_sequences(model), tokens, question=QUESTION)
    np.testing.assert_allclose(calibrated.whole.values, wanted, atol=1e-5)
    encoder, _ = open_encoder(model, tmp_path, None)
    asked = [TrainingQuestion(image.name, QUESTION, ())]
    assembler = Assembler(model, encoder, asked, image.parent, tmp_path)
    tiles = tuple(TileIndex(row, col) for row in range(3) for col in range(3))
    made = assembler.build(QuestionGroup("g", image.name, 0, tiles, (0,)))
    # Tokens of tiles are kept as float16 on disk.
    np.testing.assert_allclose(made.packed.embeds, wanted, rtol=2e-3, atol=2e-3)
    assert np.array_equal(made.packed.positions, np.arange(len(wanted)))
    assert int(made.shown.sum()) == 9 * 4


def test_what_is_kept_stands_between_its_marks(
    bundle: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    with lrs_edge.load(bundle) as engine, engine.open(image) as scene:
        answer = scene.ask(QUESTION, max_tokens=2, tiles_per_level=4)
        again = scene.ask(QUESTION, max_tokens=2, tiles_per_level=4)
    assert len(answer.levels) > 2
    assert answer.search_end == "finest_level"
    assert again.token_ids == answer.token_ids
    _, labels = seen.prompts[0]
    assert np.array_equal(labels["position"], np.arange(len(labels)))
    assert not (labels["kind"] == TokenKind.NEWLINE).any()
    shown, marks = (
        {(int(t["row"]), int(t["col"])) for t in labels[labels["kind"] == kind]}
        for kind in (TokenKind.TILE, TokenKind.MARK)
    )
    assert shown == marks
    # Tiles in row-major order, each begun and ended by a mark.
    local = labels[np.isin(labels["kind"], (TokenKind.TILE, TokenKind.MARK))]
    owners = local["row"].astype(int) * 1000 + local["col"]
    assert np.all(np.diff(owners) >= 0)
    for owner in np.unique(owners):
        kinds = local["kind"][owners == owner]
        assert kinds[0] == kinds[-1] == TokenKind.MARK
    kept = {(r.row, r.col) for r in answer.regions if r.level == len(answer.levels) - 1 and r.kept}
    assert kept == shown


@pytest.mark.parametrize(
    "options",
    [
        {"search": "exhaustive"},
        {"prune": "none"},
        {"prune": "norm", "max_vision_tokens": 60},
        {"kv_budget": 60},
        {"max_vision_tokens": 40},
    ],
)
def test_other_ways_work_with_marked_tiles(
    bundle: Path, image: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    with lrs_edge.load(bundle) as engine, engine.open(image) as scene:
        answer = scene.ask(QUESTION, max_tokens=2, **options)
    assert answer.token_ids
    if "max_vision_tokens" in options:
        assert answer.tokens.sent <= options["max_vision_tokens"]
        labels = seen.prompts[0][1]
        tiles, marks = (
            {(int(t["row"]), int(t["col"])) for t in labels[labels["kind"] == kind]}
            for kind in (TokenKind.TILE, TokenKind.MARK)
        )
        assert marks <= tiles


def test_the_reference_policy_needs_rows_with_newlines(bundle: Path, image: Path) -> None:
    with (
        lrs_edge.load(bundle) as engine,
        engine.open(image) as scene,
        pytest.raises(BundleError, match="policy full"),
    ):
        scene.ask(QUESTION, policy="reference")


def test_rows_without_newlines(source: Path, image: Path, tmp_path: Path) -> None:
    bundle = export(source, tmp_path / "bundle", PLAIN_ROWS)
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        with lrs_edge.load(bundle) as engine, engine.open(image) as scene:
            assert scene.ask(QUESTION, max_tokens=2).token_ids
    tokens, hand = base_tokens(bundle, image), ByHand(bundle)
    pooled = np.stack([hand.pooled(tile) for tile in tokens[1:]]).reshape(3, 3, 2, 2, -1)
    rows = pooled.transpose(0, 2, 1, 3, 4).reshape(36, -1)
    embeds, labels = seen.scored[0]
    start = len(hand.prefix(tokens[0]))
    np.testing.assert_allclose(embeds[start : start + 36], rows, atol=1e-5)
    assert np.array_equal(labels["position"], np.arange(len(labels)))


@pytest.mark.parametrize("variant", ["qwen", "llama"])
def test_a_golden_checkpoint_answers_with_marked_tiles(variant: str, tmp_path: Path) -> None:
    source = checkpoint(variant)
    if source is None:
        pytest.skip(f"the golden checkpoint of {variant} is not here")
    parts = (
        *MARKED[1:3],
        GlobalView(),
        LocalTiles(before="\n<tile {number}>"),
        Question("\n{question}", newline=True),
    )
    bundle = export(source, tmp_path / "bundle", parts)
    pixels = np.random.default_rng(1).integers(0, 256, (2100, 1400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    with lrs_edge.load(bundle) as engine, engine.open(tmp_path / "image.png") as scene:
        answer = scene.ask(QUESTION, max_tokens=3, tiles_per_level=4)
    assert len(answer.levels) == 2
    assert answer.token_ids
    assert answer.regions


def test_a_mark_of_many_digits_is_one_text() -> None:
    """Numbers count the whole level's tiles, whichever of them are shown."""
    sequences = tiles_builder(LocalTiles(before="<{number}/{row},{col}>"), 2)
    grid = TokenGrid(400, 400, 2, 200, 200)
    tile = TileIndex(99, 149)
    local = sequences.local(grid, {tile: np.full((4, 2), -1, np.float32)}, 3)
    text = "<19950/100,150>"
    assert local.is_mark.sum() == len(text)
    assert np.all(local.embeds[~local.is_mark] == -1)
    assert np.array_equal(local.cells[~local.is_mark] // grid.width, [198, 198, 199, 199])
    assert sequences.count(TokenGrid(2, 2, 2, 1, 1)) == 4 + len("<1/1,1>")


def test_tokens_may_have_several_positions() -> None:
    """RoPE over time, rows and columns: labels hold three positions, graphs take [3, L]."""

    class Buffers:
        capacity, nbytes, doubling = 64, 64, False

        def gather(self, *_: object) -> None: ...

    cache = KVCache(Buffers())  # type: ignore[arg-type]
    places = np.array([[0, 1, 2, 2, 2, 2], [0, 1, 2, 2, 3, 3], [0, 1, 2, 3, 2, 3]])
    tokens = make_tokens(places, TokenKind.GLOBAL)
    marks = np.arange(1, 7, dtype=np.uint64)
    cache.append(tokens, marks)
    assert np.array_equal(position_ids(cache.tokens), places)
    assert cache.next_position == 4
    assert np.array_equal(cache.text_positions(2), [[4, 5]] * 3)
    assert cache.common_prefix(tokens, marks) == 6
    other = make_tokens(places + np.array([[0], [0], [1]]), TokenKind.GLOBAL)
    assert cache.common_prefix(other, marks) == 0
    cache.keep(np.array([0, 3, 5]))
    assert np.array_equal(position_ids(cache.tokens), places[:, [0, 3, 5]])
    with pytest.raises(ValueError, match="ascend"):
        cache.append(make_tokens(np.zeros((3, 1), np.int64), TokenKind.QUESTION))
