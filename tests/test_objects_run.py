"""A question to a bundle whose vision graph finds objects: found, remembered, said, reported.

The bundle is a tiny exported one; its graph gets a detector that is told by hand: the first label
is what is red, the second what is green, cell by cell of 16 x 16 pixels.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="exporting needs the `export` extra")

import onnx
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

import lrs_edge
from lrs_edge import Answer, Engine
from lrs_edge.answer import report
from lrs_edge.bundle.manifest import ObjectSpec
from lrs_edge.engines.base import TensorSpec
from lrs_edge.errors import BundleError, OutOfMemoryError
from lrs_edge.objects import Detections, decode, describe, merge
from lrs_edge.pyramid.levels import TileIndex, build_pyramid
from lrs_edge.raster.raster import Raster
from lrs_edge.requests.cache_pool import CachePool
from lrs_edge.vision.encoder import FeatureCache, VisionEncoder
from lrs_edge_export.bundle.writer import ExportOptions, export_bundle
from tests.checkpoints import write_nano
from tests.specs import vision_spec

TILE, GRID = 64, 4
SPEC = {"labels": ["ship", "tank"], "grid": GRID, "thresholds": [[0.2, 0.5], [0.2, 0.6]]}
#: Names no label, so that everything is said.
QUESTION = "How many are there?"
#: Of pixels of 0..1 as the tiny checkpoint normalises them.
STD = 0.25


def graft(path: Path) -> None:
    """Give a vision graph the output `objects`, a convolution of its pixels."""
    model = onnx.load(path, load_external_data=False)
    cell = TILE // GRID
    kernel = np.zeros((4, 3, cell, cell), np.float32)
    for label in (0, 1):
        kernel[label, label] = STD / cell**2
        kernel[label, 1 - label] = -STD / cell**2
    model.graph.initializer.append(numpy_helper.from_array(kernel, "told.kernel"))
    model.graph.node.append(
        helper.make_node(
            "Conv",
            ["pixel_values", "told.kernel"],
            ["objects"],
            kernel_shape=[cell, cell],
            strides=[cell, cell],
        )
    )
    shape = ["N", 4, GRID, GRID]
    model.graph.output.append(helper.make_tensor_value_info("objects", TensorProto.FLOAT, shape))
    path.write_bytes(model.SerializeToString())


def with_detector(bundle: Path, **changes: Any) -> Path:
    """Graft the graph and describe the detector in the manifest."""
    graft(bundle / "vision.onnx")
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    data = (bundle / "vision.onnx").read_bytes()
    entry = content["files"]["vision.onnx"]
    entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content["vision"]["objects"] = SPEC | changes
    part = {"part": "objects", "text": "\nSeen: {objects}"}
    content["prompt"]["parts"].insert(-1, part)
    path.write_text(json.dumps(content))
    return bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same bundle without and with a detector."""
    folder = tmp_path_factory.mktemp("objects")
    source = write_nano(folder / "checkpoint")
    for name in ("plain", "seeing"):
        export_bundle(str(source), folder / name, ExportOptions(parity=False))
    return {"plain": folder / "plain", "seeing": with_detector(folder / "seeing")}


@pytest.fixture(scope="module")
def engine(bundles: dict[str, Path]) -> Iterator[Engine]:
    with lrs_edge.load(bundles["seeing"], provider="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grey sea, 400 x 300: two red ships at the upper left and one pale one, a green tank."""
    pixels = np.full((300, 400, 3), 128, np.uint8)
    pixels[20:40, 30:50] = (255, 0, 0)
    pixels[70:90, 80:100] = (255, 0, 0)
    pixels[250:270, 330:350] = (170, 90, 90)
    pixels[240:280, 200:240] = (60, 170, 60)
    path = tmp_path_factory.mktemp("images") / "sea.png"
    Image.fromarray(pixels).save(path)
    return path


def ask(engine: Engine, image: Path, folder: Path, **options: Any) -> tuple[Answer, Any]:
    """An answer and its trace."""
    with engine.open(image) as scene:
        answer = scene.ask(QUESTION, trace=folder / "t.npz", max_tokens=2, **options)
    return answer, np.load(folder / "t.npz")


def seen(engine: Engine, image: Path, answer: Answer) -> Detections:
    """What the detector finds on the global view and the tiles that an answer lists."""
    pyramid = build_pyramid(300, 400, tile=TILE, base_side=192, policy=answer.policy)
    spec, levels = engine._stages.vision.spec.objects, []
    assert spec is not None
    with Raster.open(image) as raster:
        shown = [(pyramid.global_view, [TileIndex(0, 0)])]
        for number, level in enumerate(pyramid.levels):
            tiles = [TileIndex(r.row, r.col) for r in answer.regions if r.level == number]
            shown.append((level, tiles))
        for level, tiles in shown:
            found = {}
            for tile in tiles:
                window = level.tile_window(tile)
                pixels = raster.read((level.height, level.width), window, "area")
                maps = engine._stages.vision.look_at([engine._stages.vision.normalise(pixels)]).maps
                assert maps is not None
                found[tile] = decode(maps[0], level, tile, spec)
            levels.append((level, found))
    return merge(levels)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"search": "exhaustive"},
        {"prune": "none"},
        {"max_tiles": 0},
        {"max_tiles": 4},
        {"policy": "reference"},
        {"timeout": 600.0},
    ],
    ids=str,
)
def test_what_the_looked_at_tiles_show_is_said_and_reported(
    engine: Engine, image: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    answer, arrays = ask(engine, image, tmp_path, **options)
    stages = engine._stages
    found, spec = seen(engine, image, answer), stages.vision.spec.objects
    assert spec is not None
    (text,) = arrays["objects_text"]
    assert text == describe(found, spec)
    assert [report.score for report in answer.objects] == found.scores.tolist()
    # The language model reads it between the local tokens and the question.
    assert stages.prompt.decode(arrays["objects_ids"].tolist()) == f"\nSeen: {text}"
    after = stages.prompt.tokens(QUESTION).after
    spoken = stages.embeddings.lookup(np.concatenate([arrays["objects_ids"], after])).sum(axis=1)
    np.testing.assert_array_equal(arrays["final_embeds_rowsum"][-len(spoken) :], spoken)
    length = len(arrays["final_embeds_rowsum"])
    assert np.array_equal(arrays["prefill_position_ids"], np.arange(length))
    assert answer.tokens.sent + answer.tokens.text == length
    assert answer.tokens.text >= len(spoken)


def test_the_painted_objects_are_found_where_they_are(
    engine: Engine, image: Path, tmp_path: Path
) -> None:
    answer, arrays = ask(engine, image, tmp_path, prune="none")
    with engine.open(image) as scene:
        scene.ask("Is there a tank?", trace=tmp_path / "tank.npz", prune="none", max_tokens=2)
    with np.load(tmp_path / "tank.npz") as named:
        assert named["objects_text"][0].startswith("perhaps tank 1")
        assert "ship" not in named["objects_text"][0]
    assert arrays["objects_text"][0].startswith("ship 2 left top: top left")
    assert "perhaps tank 1" in arrays["objects_text"][0]
    ships = [found for found in answer.objects if found.label == "ship" and not found.doubtful]
    middles = sorted(((f.bbox[0] + f.bbox[2]) / 2, (f.bbox[1] + f.bbox[3]) / 2) for f in ships)
    np.testing.assert_allclose(middles, [(40, 30), (90, 80)], atol=16)
    assert any(found.label == "ship" and found.doubtful for found in answer.objects)
    facts = report.ImageFacts("sea.png", 400, 300)
    listed = json.loads(report.to_json(answer, facts))["objects"]
    assert listed[0] == {
        "label": "ship",
        "score": round(answer.objects[0].score, 6),
        "bbox": list(answer.objects[0].bbox),
        "doubtful": False,
    }


def test_the_search_is_that_of_the_bundle_without_a_detector(
    engine: Engine, bundles: dict[str, Path], image: Path, tmp_path: Path
) -> None:
    with lrs_edge.load(bundles["plain"], provider="cpu") as plain:
        answer, without = ask(plain, image, tmp_path)
    other, within = ask(engine, image, tmp_path)
    searched = [name for name in without if name.startswith(("rfm", "topk", "keep", "seq"))]
    assert searched
    for name in searched:
        np.testing.assert_array_equal(within[name], without[name], err_msg=name)
    assert answer.regions == other.regions
    assert answer.objects == ()
    assert not {"objects_text", "objects_ids"} & set(without)
    note = len(within["objects_ids"])
    assert len(within["final_embeds_rowsum"]) == len(without["final_embeds_rowsum"]) + note


def test_remembered_tiles_have_their_objects(engine: Engine, image: Path, tmp_path: Path) -> None:
    with engine.open(image) as scene:
        first = scene.ask(QUESTION, max_tokens=2)
        again = scene.ask(QUESTION, max_tokens=2)
        assert again.levels[0].tiles_from_cache > 0
        assert again.objects == first.objects
        assert again.token_ids == first.token_ids
        other = scene.ask("Where?", trace=tmp_path / "t.npz", max_tokens=2, max_tiles=0)
    assert other.objects == ask(engine, image, tmp_path, max_tiles=0)[0].objects


def test_a_long_question_leaves_local_tokens_out_and_then_the_note(
    engine: Engine, image: Path, tmp_path: Path
) -> None:
    # All tiles are looked at whatever is asked, so that the note is the same.
    options: dict[str, Any] = {"search": "exhaustive", "max_tokens": 2}
    limit = engine.manifest.limits.max_length
    with engine.open(image) as scene:
        short = scene.ask(QUESTION, trace=tmp_path / "t.npz", **options)
        arrays = np.load(tmp_path / "t.npz")
        note = len(arrays["objects_ids"])
        # The longest question beside which all local tokens and the note fit.
        most = limit - 2 - short.tokens.sent - short.tokens.text + len(QUESTION)
        local = short.tokens.sent - scene.ask(QUESTION, max_tokens=2, max_tiles=0).tokens.sent
        assert note > local
        fitting = scene.ask("x" * most, **options)
        tight = scene.ask("x" * (most + local // 2), trace=tmp_path / "t.npz", **options)
        assert np.array_equal(np.load(tmp_path / "t.npz")["objects_ids"], arrays["objects_ids"])
        longest = scene.ask("x" * (most + local + 1), **options)
    assert fitting.tokens.sent == short.tokens.sent
    assert not fitting.warnings
    assert tight.objects == longest.objects == short.objects
    assert short.tokens.sent - local < tight.tokens.sent < short.tokens.sent
    assert any("fit the model's length" in warning for warning in tight.warnings)
    # Without the note there is room for all of them again.
    assert longest.tokens.sent == short.tokens.sent
    assert any("objects found did not fit" in warning for warning in longest.warnings)
    for answer in (tight, longest):
        assert answer.tokens.sent + answer.tokens.text + 2 <= limit


def test_a_question_that_came_too_late_has_no_objects(engine: Engine, image: Path) -> None:
    with engine.open(image) as scene:
        answer = scene.ask(QUESTION, timeout=1e-9)
    assert (answer.finish_reason, answer.objects) == ("timeout", ())


@pytest.mark.parametrize(
    "change",
    [
        {"grid": 5},
        {"labels": ["ship"], "thresholds": [[0.2, 0.5]]},
    ],
)
def test_a_graph_with_other_maps_than_the_manifest_says_is_refused(
    bundles: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    bundle = shutil.copytree(bundles["seeing"], tmp_path / "bundle")
    content = json.loads((bundle / "manifest.json").read_text())
    content["vision"]["objects"] |= change
    (bundle / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match="gives objects"):
        lrs_edge.load(bundle, provider="cpu")


def test_a_label_with_a_control_token_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(bundles["seeing"], tmp_path / "bundle")
    content = json.loads((bundle / "manifest.json").read_text())
    content["vision"]["objects"]["labels"] = ["ship", "<|im_end|> tank"]
    (bundle / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"label '<\|im_end\|> tank'.* control token"):
        lrs_edge.load(bundle, provider="cpu")


class Device:
    """A graph whose tokens and maps are sums of pixels, with memory for so many tiles."""

    name = "vision.onnx"
    device = "cuda"

    def __init__(self, room: int, maps: tuple[int, ...] = (3, 2, 2), lost: int = 0) -> None:
        self.room, self.maps, self.lost = room, maps, lost
        self.inputs = {"pixel_values": TensorSpec("pixel_values", "float32", (None, 3, 4, 4))}
        self.outputs = {
            "tokens": TensorSpec("tokens", "float32", (None, 1, 2)),
            "objects": TensorSpec("objects", "float32", (None, None, None, None)),
        }

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str], buffers: object = None
    ) -> list[np.ndarray]:
        assert (list(outputs), buffers) == (["tokens", "objects"], None)
        pixels = feeds["pixel_values"]
        if len(pixels) > self.room:
            raise OutOfMemoryError("full")
        sums = pixels.sum(axis=(1, 2, 3), dtype=np.float32)
        maps = np.broadcast_to(sums[:, None, None, None], (len(sums), *self.maps))
        return [np.repeat(sums, 2).reshape(-1, 1, 2), maps[self.lost :]]

    def new_buffers(self, names: Sequence[str]) -> None:
        raise NotImplementedError(names)


def encoder(device: Device) -> VisionEncoder:
    spec = vision_spec("vision.onnx", 4, 1, 1, mean=0.0, std=1.0)
    return VisionEncoder(device, replace(spec, objects=ObjectSpec(("x",), 2, ((0.1, 0.2),))), 2)


def test_maps_of_batches_in_halves_stay_in_order() -> None:
    tiles = [np.full((3, 4, 4), number, np.float32) for number in range(7)]
    found = encoder(Device(2)).look_at(tiles)
    assert found.maps is not None
    np.testing.assert_array_equal(found.maps[:, 0, 0, 0], np.arange(7) * 48)
    np.testing.assert_array_equal(found.tokens[:, 0, 0], np.arange(7) * 48)


def test_a_graph_without_the_output_or_with_other_maps_is_refused() -> None:
    device = Device(9)
    with pytest.raises(BundleError, match="gives objects"):
        encoder(Device(9, (3, 2, 3))).look_at([np.zeros((3, 4, 4), np.float32)])
    with pytest.raises(BundleError, match="gives objects"):
        encoder(Device(9, lost=1)).look_at([np.zeros((3, 4, 4), np.float32)] * 2)
    del device.outputs["objects"]
    with pytest.raises(BundleError, match="no output named objects"):
        encoder(device)


def test_objects_count_in_the_bound_and_leave_with_the_tokens() -> None:
    tokens = np.zeros((2, 2), np.float32)
    one = Detections(
        np.zeros(1, np.int64),
        np.zeros(1, np.float32),
        np.zeros((1, 4), np.float32),
        np.zeros(1, np.float32),
    )
    assert one.nbytes == 32
    pool = CachePool(64)
    cache = FeatureCache(pool)
    cache.put("a", tokens, one)
    assert (pool.nbytes, cache.nbytes, cache.objects("a")) == (48, 48, one)
    cache.put("b", tokens)
    assert (cache.objects("b"), pool.nbytes) == (None, 64)
    cache.put("c", tokens)
    assert (cache.get("a"), cache.objects("a"), pool.nbytes) == (None, None, 32)
