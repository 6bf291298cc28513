"""Questions, evidence, choice of tiles, and files: the bookkeeping of `distill`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="distilling needs the `export` extra")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lrs_edge.errors import ExportError, UsageError
from lrs_edge.pyramid.levels import TileIndex, build_pyramid, token_grid
from lrs_edge_export.checkpoints.sequences import TextEmbeddings
from lrs_edge_export.distill.chance import seeded
from lrs_edge_export.distill.collect import Targets
from lrs_edge_export.distill.evidence import (
    evidence_tiles,
    evidence_tokens,
    localisation,
    top_quarter,
)
from lrs_edge_export.distill.guidance import choose_tiles
from lrs_edge_export.distill.localise import Row, choose_layers
from lrs_edge_export.distill.loss import LossWeights, distillation_loss, divergence
from lrs_edge_export.distill.questions import image_folder, question_files, read_questions
from lrs_edge_export.distill.safetensors_copy import copy_with, dtype_of
from lrs_edge_export.distill.sequences import QuestionGroup
from lrs_edge_export.distill.start import check_layer_list
from lrs_edge_export.distill.work import Work
from tests.sequences import rows_builder

SIZES = st.integers(20, 700)


def line(**changes: object) -> str:
    values = {"question_id": 1, "image": "a.png", "text": "What is it?", "hbox": [0, 0, 5, 5]}
    merged = {key: value for key, value in (values | changes).items() if value is not None}
    return json.dumps(merged) + "\n"


def questions(tmp_path: Path, text: str) -> list[object]:
    (tmp_path / "q.jsonl").write_text(text)
    return list(read_questions(question_files(tmp_path)))


# -- questions -----------------------------------------------------------------------------------


def test_boxes_come_in_two_forms(tmp_path: Path) -> None:
    lists = [[0, 0, 5, 5], [[0, 0, 5, 5], [1, 2.5, 3, 4]], [], None]
    found = questions(tmp_path, "".join(line(hbox=value) for value in lists) + "\n")
    assert [len(question.boxes) for question in found] == [1, 2, 0, 0]
    assert found[1].boxes[1] == (1.0, 2.5, 3.0, 4.0)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"image": "/etc/passwd"}, "not a path inside"),
        ({"image": "../a.png"}, "not a path inside"),
        ({"image": "C:\\a.png"}, "not a path inside"),
        ({"image": 5}, "must be text"),
        ({"text": "  "}, "must be text"),
        ({"hbox": [5, 0, 0, 5]}, "x0 < x1"),
        ({"hbox": [0, 0, 5]}, "must be x0"),
        ({"hbox": [0, 0, True, 5]}, "must be x0"),
        ({"hbox": "0 0 5 5"}, "must be x0"),
        ({"hbox": [0, 0, 10**400, 5]}, "must be x0"),
        ({"hbox": [0, 0, 1e308, 5]}, "must be x0"),
        ({"hbox": [[0, 0, 5, 5]] * 300}, "more than 256 boxes"),
        ({"image": "\ud800.png"}, "not a path inside"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, changes: dict[str, object], word: str) -> None:
    with pytest.raises(UsageError, match="line 2") as caught:
        questions(tmp_path, line() + line(**changes))
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "[1]\n", "", '{"image": "a.png"}\n', "[" * 100_000, "x" * (1 << 20) + "\n"]
)
def test_no_questions(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError):
        questions(tmp_path, text)


def test_images_are_looked_for_in_two_places(tmp_path: Path) -> None:
    found = questions(tmp_path, line())
    with pytest.raises(UsageError, match="--images"):
        image_folder(tmp_path, None, found)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    assert image_folder(tmp_path, None, found) == tmp_path / "images"
    assert image_folder(tmp_path / "q.jsonl", None, found) == tmp_path / "images"
    with pytest.raises(UsageError, match="holds no question file"):
        question_files(tmp_path / "images")


# -- evidence ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(height=SIZES, width=SIZES, data=st.data())
def test_evidence_tokens_lie_under_the_box(height: int, width: int, data: st.DataObject) -> None:
    pyramid = build_pyramid(height, width, tile=16, base_side=48)
    index = data.draw(st.integers(0, len(pyramid.levels) - 1))
    level = pyramid.levels[index]
    x0 = data.draw(st.integers(0, width - 1))
    y0 = data.draw(st.integers(0, height - 1))
    x1 = data.draw(st.integers(x0 + 1, width))
    y1 = data.draw(st.integers(y0 + 1, height))
    box = (float(x0), float(y0), float(x1), float(y1))
    grid = token_grid(level, 2, (height, width) if index == 0 else (level.height, level.width))
    features = {tile: np.zeros((4, 3), np.float32) for tile in level.tiles()}
    local = rows_builder(np.zeros(3, np.float32)).local(grid, features, index)
    found = evidence_tokens(local, grid, level, (height, width), [box])
    assert not (found & local.is_newline).any()
    tiles = set(evidence_tiles(level, (height, width), [box]))
    cell_h, cell_w = 8 * height / level.height, 8 * width / level.width
    for place in np.flatnonzero(found):
        row, col = divmod(int(local.indices[place]), grid.width)
        assert row * cell_h < y1
        assert (row + 1) * cell_h > y0
        assert col * cell_w < x1
        assert (col + 1) * cell_w > x0
        assert TileIndex(int(local.tile_rows[place]), int(local.tile_cols[place])) in tiles


def test_localisation_of_known_scores() -> None:
    scores = np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.0], np.float32)
    shown = np.array([True] * 7 + [False])
    evidence = np.zeros(8, bool)
    assert localisation(scores, evidence, shown) is None
    evidence[[0, 6]] = True
    found = localisation(scores, evidence, shown)
    assert found is not None
    assert (found.best, found.recall) == (True, 1.0)  # one token in the top quarter of seven
    assert found.share == pytest.approx(2 / 7)
    assert found.mass == pytest.approx(0.55)
    assert top_quarter(scores[shown]).tolist() == [0]
    assert localisation(scores, shown, shown) is None


def test_the_layer_of_highest_recall_is_chosen() -> None:
    rows = [Row(9, 0.1, 0.1, recall, 0.1) for recall in (0.9, 0.2, 0.3, 0.7, 0.7, 0.1)]
    rows[4] = Row(9, 0.1, 0.2, 0.7, 0.1)
    assert choose_layers(rows, 1) == (4,)
    assert choose_layers(rows, 2) == (3, 4)
    assert choose_layers(rows, 5) == (1, 2, 3, 4, 5)  # five lead to no other
    with pytest.raises(UsageError, match="--layers"):
        choose_layers(rows, 6)
    with pytest.raises(UsageError, match="hbox"):
        choose_layers([Row.of([])] * 4, 2)


@pytest.mark.parametrize("layers", [(0, 1), (2, 1), (1, 1), (3, 5), ()])
def test_layer_lists_that_cannot_be(layers: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="--layer-list"):
        check_layer_list(layers, 5)
    check_layer_list((1, 4), 5)


# -- tiles ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 20), size=st.integers(50, 400), data=st.data())
def test_tiles_of_a_group(count: int, size: int, data: st.DataObject) -> None:
    level = build_pyramid(size, size, tile=16, base_side=48).levels[-1]
    everything = level.tiles()
    picked = data.draw(st.sets(st.sampled_from(everything), max_size=4))
    totals = None
    if data.draw(st.booleans()):
        totals = np.zeros((level.tile_rows, level.tile_cols))
        best = data.draw(st.sampled_from(everything))
        totals[best.row, best.col] = 1.0
    chosen = choose_tiles(level, picked, totals, count, seeded("tiles"))
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == min(count, len(everything))
    assert set(chosen) <= set(everything)
    assert chosen == choose_tiles(level, picked, totals, count, seeded("tiles"))
    if picked:
        assert set(chosen) & picked
    if totals is not None and count - max(count // 2, 1) - max(count // 8, 1) >= 1:
        assert best in chosen


# -- loss ----------------------------------------------------------------------------------------


def test_loss_of_known_distributions() -> None:
    target = torch.tensor([[[0.5, 0.5, 0.0]]])
    same = distillation_loss(
        target, [target[0]], torch.zeros(1, 3, dtype=torch.bool), LossWeights()
    )
    assert float(same) == pytest.approx(0.0, abs=1e-6)
    other = torch.tensor([[0.25, 0.75, 0.0]])
    kl = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert float(divergence(target[0], other)) == pytest.approx(kl)
    evidence = torch.tensor([[True, False, False]])
    loss = distillation_loss(target, [other], evidence, LossWeights(1.0, 2.0, 3.0))
    assert float(loss) == pytest.approx(kl + 2 * 2 * 0.25**2 - 3 * np.log(0.25), rel=1e-5)


# -- files ---------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(keep=st.sets(st.sampled_from("abcd")), add=st.sets(st.sampled_from("cdef")))
def test_safetensors_copies(
    keep: set[str], add: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tensors")
    types = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "d": torch.int64}
    old = {n: torch.arange(6).reshape(2, 3).to(t) for n, t in types.items()}
    save_file(old, folder / "old.safetensors", metadata={"format": "pt"})
    new = {name: torch.full((3,), 7.0).to(torch.bfloat16) for name in add}
    copy_with(folder / "old.safetensors", folder / "new.safetensors", keep.__contains__, new)
    found = load_file(folder / "new.safetensors") if keep | add else {}
    assert set(found) == keep | add
    for name, tensor in found.items():
        wanted = new[name] if name in new else old[name]
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)
    assert dtype_of(folder / "old.safetensors", "b") == torch.bfloat16
    assert dtype_of(folder / "old.safetensors", "d") is None


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10" + bytes(7) + b"[" * 16])
def test_a_damaged_file_is_not_copied(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ExportError):
        copy_with(tmp_path / "bad", tmp_path / "out", lambda _: True, {})


def test_targets_come_back(tmp_path: Path) -> None:
    targets = Targets(tmp_path / "t")
    group = QuestionGroup("n-0-0", "a.png", 1, (TileIndex(0, 1), TileIndex(2, 0)), (3, 5))
    scores = np.random.default_rng(0).random((2, 2, 9), np.float32)
    targets.put(group, scores)
    assert not targets.has("a.png")
    targets.finish("a.png", (10, 20), [group])
    assert targets.groups("a.png") == ((10, 20), [group])
    np.testing.assert_array_equal(targets.get(group), scores)
    for path in (tmp_path / "t").glob("*.json"):
        path.write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        targets.groups("a.png")


def test_a_work_folder_belongs_to_one_run(tmp_path: Path) -> None:
    Work(tmp_path / "w", {"seed": 1, "sizes": (1, 2)})
    Work(tmp_path / "w", {"seed": 1, "sizes": (1, 2)})
    with pytest.raises(UsageError, match="another seed"):
        Work(tmp_path / "w", {"seed": 2, "sizes": (1, 2)})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").touch()
    with pytest.raises(UsageError, match="not from `distill`"):
        Work(tmp_path / "other", {})


def test_text_embeddings_are_those_of_the_table() -> None:
    table = np.random.default_rng(0).random((50, 4), np.float32)
    ids = np.array([7, 3, 3, 49])
    np.testing.assert_array_equal(TextEmbeddings(table).lookup(ids), table[ids])
