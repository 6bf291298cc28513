"""Tokens that stay on a device: equal answers, and few copies (`fake_device.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lrs_edge
from lrs_edge import Answer, Engine, Scene
from lrs_edge.bundle.bundle import default_bundle_path
from lrs_edge.engines import onnx
from lrs_edge.engines.base import BackendOptions, Tensor
from lrs_edge.engines.onnx import OnnxGraph, OrtTensor
from lrs_edge.errors import OutOfMemoryError
from lrs_edge.language.kv_cache import TokenKind, make_tokens
from lrs_edge.pyramid.levels import TileIndex, build_pyramid
from lrs_edge.requests.clock import Clock
from lrs_edge.vision.on_device import DeviceTiles
from lrs_edge.vision.pooling import pooled
from lrs_edge.vision.positions import ImagePositions
from tests.fake_device import DEVICE, REAL_LOAD, Copies, FakeGraph, fake_device
from tests.sequences import recognisable
from tests.specs import vision_spec

QUESTION = "Is there a river?"

#: Copies of one run of the decoder over a token: embedding, position, lengths, no more.
MOST_UP_A_TOKEN = 4


@pytest.fixture(scope="module", params=["llama", "qwen"])
def engines(
    request: pytest.FixtureRequest, golden_bundles: dict[str, Path]
) -> Iterator[tuple[Engine, Engine, Copies]]:
    """One on the CPU, the same on the device, and what crosses there."""
    if request.param not in golden_bundles:
        pytest.skip("only a part of the golden data is here")
    bundle = golden_bundles[request.param]
    with lrs_edge.load(bundle, provider="cpu", threads=1) as host:
        # The graph of the reference policy is loaded when it is needed: for this one, now.
        focus = host._loaded().focus
        assert focus is not None
        focus._decoder._masked_graph()
        with fake_device() as copies, lrs_edge.load(bundle, provider="cpu", threads=1) as device:
            yield host, device, copies


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of three levels of noise with a gradient."""
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (760, 1300, 3)) // 2 + np.arange(1300)[None, :, None] // 12
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def alike(found: Answer, wanted: Answer) -> None:
    assert found.token_ids == wanted.token_ids
    assert [(r.level, r.row, r.col) for r in found.regions] == [
        (r.level, r.row, r.col) for r in wanted.regions
    ]
    scores = [[region.score for region in answer.regions] for answer in (found, wanted)]
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("policy", ["full", "reference"])
def test_answers_are_those_of_the_host(
    engines: tuple[Engine, Engine, Copies], picture: Path, policy: str
) -> None:
    host, device, _ = engines
    with host.open(picture) as wanted, device.open(picture) as found:
        for question in (QUESTION, "What is this?", QUESTION):
            for more in ({}, {"kv_budget": 60}):
                options = {"policy": policy, "max_tokens": 5, **more}
                alike(found.ask(question, **options), wanted.ask(question, **options))


@pytest.mark.parametrize("on_host", [("vision",), ("rfm", "llm"), ("llm",)])
def test_stages_may_be_on_either_side(
    golden_bundles: dict[str, Path], picture: Path, on_host: tuple[str, ...]
) -> None:
    if "llama" not in golden_bundles:
        pytest.skip("only a part of the golden data is here")
    answers = []
    for hosts in (("",), on_host):
        with (
            fake_device(hosts) as copies,
            lrs_edge.load(golden_bundles["llama"], provider="cpu", threads=1) as engine,
            engine.open(picture) as scene,
        ):
            answers += [scene.ask(question, max_tokens=4) for question in (QUESTION, "What?")]
    for found, wanted in zip(answers[2:], answers[:2], strict=True):
        alike(found, wanted)
    # What is on the device gives its tokens, and what it scores, to the host.
    came = {name for name, _ in copies.down}
    assert ("tokens" in came) is ("vision" not in on_host)
    assert ("logits" in came) is ("rfm" not in on_host)


def test_onnxruntime_s_own_tensors_answer_alike(
    golden_bundles: dict[str, Path], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does on a GPU, in the CPU's memory: outputs are kept, rows gathered there."""
    if "qwen" not in golden_bundles:
        pytest.skip("only a part of the golden data is here")

    def answers() -> list[Answer]:
        with (
            lrs_edge.load(golden_bundles["qwen"], provider="cpu", threads=1) as engine,
            engine.open(picture) as scene,
        ):
            return [scene.ask(question, max_tokens=4) for question in (QUESTION, "What?", QUESTION)]

    # Whatever device others play meanwhile.
    monkeypatch.setattr(OnnxGraph, "load", classmethod(REAL_LOAD))
    wanted = answers()
    kept: list[int] = []

    def run(self: OnnxGraph, *arguments: Any) -> list[Tensor]:
        kept.append(1)
        return self._run_kept(*arguments, *[None] * (3 - len(arguments)))

    def upload(self: OnnxGraph, array: np.ndarray) -> OrtTensor:
        assert self.device == DEVICE
        return OrtTensor(onnx.ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))

    monkeypatch.setattr(OrtTensor, "device", DEVICE)
    monkeypatch.setattr(OnnxGraph, "device", DEVICE)
    monkeypatch.setattr(OnnxGraph, "run_on_device", run)
    monkeypatch.setattr(OnnxGraph, "upload", upload)
    for found, one in zip(answers(), wanted, strict=True):
        alike(found, one)
    assert len(kept) > 10


def test_only_logits_come_down(engines: tuple[Engine, Engine, Copies], picture: Path) -> None:
    _, device, copies = engines
    with device.open(picture) as scene:
        before = copies.count()
        answer = scene.ask(QUESTION, max_tokens=5)
        assert {name for name, _ in copies.down[before[1] :]} == {"logits"}
        # Embeddings of text go up once for every text, those of the image never.
        width = device.manifest.llm.hidden * 4
        text = [size for name, size in copies.up[before[0] :] if name == "upload"]
        assert sum(text) <= (answer.tokens.text + 40) * width * 4


def decoding(scene: Scene, copies: Copies, tokens: int) -> tuple[list[int], list[int]]:
    before = copies.count()
    answer = scene.ask(QUESTION, max_tokens=tokens)
    assert len(answer.token_ids) == tokens
    return copies.since(before)


def test_what_crosses_for_a_decoded_token(
    engines: tuple[Engine, Engine, Copies], picture: Path
) -> None:
    _, device, copies = engines
    with device.open(picture) as scene:
        scene.ask(QUESTION, max_tokens=2)
        (up, down), (more_up, more_down) = (decoding(scene, copies, count) for count in (3, 10))
        llm = device.manifest.llm
        assert len(more_down) - len(down) == 7
        assert sum(more_down) - sum(down) == 7 * llm.vocabulary * 4
        assert len(more_up) - len(up) <= 7 * MOST_UP_A_TOKEN
        assert sum(more_up) - sum(up) <= 7 * (llm.hidden * 4 + 64)


def tiles_crossed(engine: Engine, copies: Copies, picture: Path) -> tuple[float, float, float]:
    """Copies up, bytes up beside the pixels, and bytes down, for each of some tiles."""
    with engine.open(picture) as scene:
        session = scene._tiles.session("area", Clock(None), lambda *_: None)
        spec = engine.manifest.vision
        pyramid = build_pyramid(
            scene.raster.height,
            scene.raster.width,
            tile=spec.tile,
            base_side=engine.manifest.search.base_side,
        )
        level = pyramid.levels[-1]
        tiles = level.tiles()[:16]
        assert len(tiles) > 3
        before = copies.count()
        tokens = session.local_tokens(level, tiles)
        up, down = copies.since(before)
        assert set(tokens) == set(tiles)
    pixels = len(tiles) * 3 * spec.tile**2 * 4
    return len(up) / len(tiles), (sum(up) - pixels) / len(tiles), sum(down) / len(tiles)


def test_what_crosses_for_a_tile(
    engines: tuple[Engine, Engine, Copies], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, device, copies = engines
    calls, beside, down = tiles_crossed(device, copies, picture)
    assert calls <= 2
    assert beside <= 64
    assert down == 0
    # The bounds can fail: tokens that do not stay come down whole.
    monkeypatch.setattr(device._loaded().vision, "_device", None)
    spec = device.manifest.vision
    whole = spec.grid**2 * device.manifest.llm.hidden * 4
    assert tiles_crossed(device, copies, picture)[2] == whole


def test_a_prompt_that_does_not_fit_runs_in_shorter_parts(
    engines: tuple[Engine, Engine, Copies], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, device, copies = engines
    llm = device._loaded().llm
    decoder = llm._decoder
    monkeypatch.setattr(decoder, "_device_chunk", 2048)
    run, lengths = FakeGraph.run_on_device, []

    def small(self: FakeGraph, feeds, outputs, buffers=None):  # type: ignore[no-untyped-def]
        lengths.append(feeds["position_ids"].shape[1])
        if lengths[-1] > 300:
            raise OutOfMemoryError("full")
        return run(self, feeds, outputs, buffers)

    monkeypatch.setattr(FakeGraph, "run_on_device", small)
    rng = np.random.default_rng(0)
    embeds = recognisable(rng.standard_normal((700, device.manifest.llm.hidden)).astype("f"))
    tokens = make_tokens(np.arange(700, dtype=np.int64), TokenKind.TILE)
    cache = llm.new_cache()
    before, moves = copies.count(), copies.moves
    llm.prefill(cache, embeds, tokens, 600)
    assert (len(cache), decoder.chunk) == (700, 300)
    assert lengths == [600, 300, 300, 100]
    # The buffers grew once, for all that they have to hold.
    assert copies.moves == moves + 1
    # Of all parts only the last one's logits are asked for.
    assert copies.since(before)[1] == [device.manifest.llm.vocabulary * 4]


@pytest.mark.parametrize(
    ("side", "pool", "pooling"),
    [(6, 1, "mean"), (6, 2, "mean"), (7, 2, "bilinear"), (7, 3, "bilinear")],
)
@pytest.mark.parametrize("placed", [False, True])
def test_tokens_are_pooled_as_on_the_host(side: int, pool: int, pooling: str, placed: bool) -> None:
    rng = np.random.default_rng(0)
    graph = OnnxGraph.load(
        default_bundle_path() / "llm_segment0.onnx", BackendOptions("cpu", threads=1)
    )
    device = FakeGraph(graph, Copies())
    spec = vision_spec("vision.onnx", 12, side, pool, pooling=pooling)
    tables = [rng.standard_normal((5, 8)).astype(np.float32) for _ in range(2)]
    positions = ImagePositions(*tables) if placed else None
    around = DeviceTiles(device, spec, positions, half=True)
    tokens = rng.standard_normal((3, side**2, 8)).astype(np.float32)
    level = build_pyramid(100, 150, tile=12, base_side=60).levels[-1]
    tile = TileIndex(1, 2)
    for role in ("global", "local"):
        wanted = tokens[1] if role == "global" else pooled(tokens[1], pool, pooling)
        across, mixed = round(len(wanted) ** 0.5), None
        if positions is not None:
            wanted = wanted + positions.of_tile(level, tile, across)
            mixed = positions.mixed(level, tile, across)
        found = around.tokens(role, device.upload(tokens), 1, mixed)
        assert found.device == DEVICE
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6)
    pixels = [rng.standard_normal((3, 4, 4)).astype(np.float16) for _ in range(2)]
    np.testing.assert_array_equal(around.pixels(pixels).numpy(), np.stack(pixels).astype("f"))
