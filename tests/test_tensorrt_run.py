"""What runs TensorRT engines, over a simulated GPU (`fake_tensorrt.py`): no engine is real here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lrs_edge
from lrs_edge.bundle.bundle import Bundle, default_bundle_path, open_bundle
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.engines.base import BackendOptions, HostTensor
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.engines.tensorrt.building import OnProgress
from lrs_edge.engines.tensorrt.device import open_device
from lrs_edge.engines.tensorrt.engine_cache import EngineCache
from lrs_edge.engines.tensorrt.graph import TensorRTGraph
from lrs_edge.engines.tensorrt.library import find_library
from lrs_edge.engines.tensorrt.loading import load_engine
from lrs_edge.engines.tensorrt.stages import STAGES, Plan, build_stages
from lrs_edge.engines.tensorrt.targets import choose_target
from lrs_edge.errors import BackendError, OutOfMemoryError
from lrs_edge.language.decoder import Decoder
from lrs_edge.language.kv_cache import KVCache, TokenKind, make_tokens
from lrs_edge.vision.on_device import DeviceTiles
from tests.fake_tensorrt import FakeCuda, FakeTensorRT, put_in_place

EXAMPLES = Path(__file__).parent.parent / "examples"
CAPACITY = 1024


def build(bundle: Bundle, capacity: int = CAPACITY) -> None:
    library, device = find_library("tensorrt"), open_device()
    target = choose_target(library, None, device.gpu)
    plan = Plan(bundle, STAGES, target, capacity, 1 << 20, masked=True)

    def silent(_name: str, _plan: Plan) -> OnProgress | None:
        return None

    assert all(
        not built.known for built in build_stages(library, plan, EngineCache(), device, silent)
    )


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patched:
        yield patched
    open_device.cache_clear()


@pytest.fixture(scope="module")
def bundle(golden_bundles: dict[str, Path]) -> Bundle:
    """Float32, so that what differs is float16."""
    return open_bundle(golden_bundles["qwen"])


#: Of JetPack 7.2 and of 6.2, whose graphs have other operators and buffers.
VERSIONS = ("10.16.1", "10.3.0")


@pytest.fixture(scope="module", params=VERSIONS)
def trt(
    bundle: Bundle,
    patch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> FakeTensorRT:
    fake = put_in_place(patch, tmp_path_factory.mktemp("cache"), version=request.param)
    build(bundle)
    return fake


def engine(bundle: Bundle, stage: str, flavour: str) -> TensorRTGraph:
    return load_engine("tensorrt", bundle.graph(getattr(bundle.manifest, stage).path(flavour)))


def on_cpu(bundle: Bundle, stage: str, flavour: str) -> OnnxGraph:
    path = bundle.graph(getattr(bundle.manifest, stage).path(flavour))
    return OnnxGraph.load(path, BackendOptions("cpu"))


@pytest.fixture(scope="module")
def decoders(bundle: Bundle, trt: FakeTensorRT) -> list[Decoder]:
    """The language model on TensorRT and on the CPU."""
    assert trt
    graphs = [load(bundle, "llm", Flavour.GQA) for load in (engine, on_cpu)]
    return [Decoder(graph, bundle.manifest.llm, scoring=False) for graph in graphs]


def embeds(count: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def forward(decoder: Decoder, cache: KVCache, count: int, seed: int = 0) -> np.ndarray:
    tokens = make_tokens(np.arange(count) + cache.next_position, TokenKind.QUESTION)
    return decoder.forward(cache, embeds(count, decoder.spec.hidden, seed), tokens)


def alike(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 2e-2 * max(np.abs(theirs).max(), 1)


def test_tokens_kept_dropped_and_copied_are_as_on_the_cpu(decoders: list[Decoder]) -> None:
    caches = [decoder.new_cache() for decoder in decoders]
    for number, count in enumerate((300, 1, 40)):
        alike(*(forward(d, c, count, number) for d, c in zip(decoders, caches, strict=True)))
    kept = np.sort(np.random.default_rng(1).permutation(341)[:120])
    for cache in caches:
        cache.keep(kept)
        cache.truncate(100)
    others = [cache.copy(60) for cache in caches]
    alike(*(forward(d, c, 5) for d, c in zip(decoders, caches, strict=True)))
    alike(*(forward(d, c, 7) for d, c in zip(decoders, others, strict=True)))
    for cache in caches:
        cache.release(3)
    alike(*(forward(d, c, 2) for d, c in zip(decoders, caches, strict=True)))
    for name in caches[0].buffers.names:
        ours, theirs = (cache.buffers.read(name)[:, :, :5] for cache in caches)
        alike(ours, theirs)


def test_more_tokens_than_the_profile_has_go_in_pieces(
    bundle: Bundle, trt: FakeTensorRT, decoders: list[Decoder]
) -> None:
    graph = engine(bundle, "llm", Flavour.GQA)
    buffers = graph.new_buffers(decoders[0].new_cache().buffers.names)
    count, width = 600, bundle.manifest.llm.hidden
    feeds = {
        "inputs_embeds": embeds(count, width)[None],
        "position_ids": np.arange(count)[None],
        "past_length": np.array([0]),
    }
    before = len(trt.runs)
    (at_once,) = graph.run(feeds, ["logits"], buffers)
    assert [run["position_ids"][1] for run in trt.runs[before:]] == [256, 256, 88]
    on_device = {**feeds, "inputs_embeds": graph.upload(feeds["inputs_embeds"])}
    (again,) = graph.run(on_device, ["logits"], graph.new_buffers(buffers.names))
    np.testing.assert_array_equal(at_once, again)
    cache = decoders[1].new_cache()
    alike(at_once, forward(decoders[1], cache, count))


@pytest.mark.parametrize("flavour", [Flavour.GQA, Flavour.MASKED])
def test_scores_are_those_of_the_filled_places(
    bundle: Bundle, trt: FakeTensorRT, flavour: str
) -> None:
    assert trt
    spec = bundle.manifest.rfm
    assert spec is not None
    graphs = [load(bundle, "rfm", flavour) for load in (engine, on_cpu)]
    names = [f"{part}_{i}" for i in range(spec.layers) for part in ("key", "value")]
    buffers = [graph.new_buffers([*names, f"key_{spec.layers}"]) for graph in graphs]
    for buffer in buffers:
        buffer.gather(np.arange(0), 512)
    rng, past = np.random.default_rng(2), 0
    for count in (200, 30):
        feeds = {
            "inputs_embeds": embeds(count, spec.hidden, count)[None],
            "position_ids": past + np.arange(count)[None],
            "past_length": np.array([past]),
        }
        if flavour == Flavour.MASKED:
            causal = np.arange(past + count) > past + np.arange(count)[:, None]
            bias = np.where(causal, -np.inf, rng.standard_normal(causal.shape))
            feeds["attention_bias"] = bias[None, None].astype(np.float32)
        found = [
            graph.run(feeds, ["logits"], buffer)[0]
            for graph, buffer in zip(graphs, buffers, strict=True)
        ]
        past += count
        assert found[0].shape == (spec.heads, past)
        alike(*found)


def test_tiles_go_together_up_to_sixteen(bundle: Bundle, trt: FakeTensorRT) -> None:
    assert trt
    graphs = [load(bundle, "vision", Flavour.PLAIN) for load in (engine, on_cpu)]
    side = bundle.manifest.vision.tile
    tiles = np.random.default_rng(3).standard_normal((3, 3, side, side)).astype(np.float32)
    alike(*(graph.run({"pixel_values": tiles}, ["tokens"])[0] for graph in graphs))
    assert graphs[0].device == "tensorrt"
    assert list(graphs[0].nodes) == ["tensorrt"]
    many = np.concatenate([tiles] * 6)
    found = [graph.run({"pixel_values": many}, ["tokens"])[0] for graph in graphs]
    assert found[0].shape[0] == 18
    alike(*found)
    np.testing.assert_array_equal(found[0][:3], found[0][15:])
    with pytest.raises(BackendError, match=r"built for pixel_values up to .16"):
        graphs[0].run({"pixel_values": tiles[:, :, :-1]}, ["tokens"])


def test_one_token_costs_three_copies_up_and_one_down(
    trt: FakeTensorRT, decoders: list[Decoder]
) -> None:
    cache = decoders[0].new_cache()
    forward(decoders[0], cache, 20)
    before = trt.cuda.copies.copy()
    forward(decoders[0], cache, 1)
    forward(decoders[0], cache, 1)
    assert trt.cuda.copies - before == {"HostToDevice": 6, "DeviceToHost": 2}


def test_lengths_that_shapes_are_made_of_stay_on_the_host(
    bundle: Bundle, trt: FakeTensorRT, decoders: list[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "on_host", {"past_length"})
    decoder = Decoder(engine(bundle, "llm", Flavour.GQA), bundle.manifest.llm, scoring=False)
    caches = [decoder.new_cache(), decoders[1].new_cache()]
    for count in (20, 1, 1):
        alike(*(forward(d, c, count) for d, c in zip((decoder, decoders[1]), caches, strict=True)))


def test_a_batch_of_tiles_costs_one_copy_up_and_one_for_each_output(
    bundle: Bundle, trt: FakeTensorRT
) -> None:
    graph = engine(bundle, "vision", Flavour.PLAIN)
    side = bundle.manifest.vision.tile
    tiles = np.zeros((4, 3, side, side), np.float32)
    before = trt.cuda.copies.copy()
    graph.run({"pixel_values": tiles}, ["tokens"])
    assert trt.cuda.copies - before == {"HostToDevice": 1, "DeviceToHost": 1}
    before = trt.cuda.copies.copy()
    graph.run_on_device({"pixel_values": tiles}, ["tokens"])
    assert trt.cuda.copies - before == {"HostToDevice": 1}


def test_compacting_stays_on_the_gpu(trt: FakeTensorRT, decoders: list[Decoder]) -> None:
    cache = decoders[0].new_cache()
    forward(decoders[0], cache, 50)
    before, runs = trt.cuda.copies.copy(), len(trt.runs)
    cache.keep(np.arange(1, 50, 2))
    # The places go up; the rest is a run of the engine for each buffer.
    assert trt.cuda.copies - before == {"HostToDevice": 1}
    assert len(trt.runs) - runs == len(cache.buffers.names)
    cache.keep(np.arange(10))
    assert len(trt.runs) - runs == len(cache.buffers.names)


def test_memory_of_buffers_is_had_late_and_given_back(
    trt: FakeTensorRT, decoders: list[Decoder]
) -> None:
    open_device().trim()
    used = trt.cuda.used()
    cache = decoders[0].new_cache()
    assert trt.cuda.used() == used
    forward(decoders[0], cache, 4)
    assert trt.cuda.used() >= used + cache.buffers.nbytes
    cache.release(0)
    open_device().trim()
    assert trt.cuda.used() < used + cache.buffers.nbytes
    alike(*(forward(d, d.new_cache(), 4) for d in decoders))


def test_more_places_than_the_engine_has_are_refused(decoders: list[Decoder]) -> None:
    cache = decoders[0].new_cache()
    assert cache.buffers.capacity == CAPACITY
    forward(decoders[0], cache, 1000)
    with pytest.raises(BackendError, match="--context 1280"):
        forward(decoders[0], cache, 25)


def test_rows_are_gathered_on_the_gpu(bundle: Bundle, trt: FakeTensorRT) -> None:
    graph = engine(bundle, "llm", Flavour.GQA)
    tables = [embeds(5, 8, 1), embeds(3, 8, 2)]
    held = [graph.upload(table) for table in tables]
    before = trt.cuda.copies.copy()
    places = np.array([0, 1, 2, 4, 5, 6, 7, 7, 3])
    found = graph.gather_rows(held, places)
    assert set(trt.cuda.copies - before) == {"DeviceToDevice"}
    np.testing.assert_array_equal(found.numpy()[0], np.concatenate(tables)[places])
    assert graph.gather_rows(held, places[:0]).shape == (1, 0, 8)


def test_tokens_are_pooled_on_the_gpu(bundle: Bundle, trt: FakeTensorRT) -> None:
    """By small graphs, of which engines are built once for all."""
    graph, spec = engine(bundle, "vision", Flavour.PLAIN), bundle.manifest.vision
    around = DeviceTiles(graph, spec, None, half=True)
    host = DeviceTiles(on_cpu(bundle, "vision", Flavour.PLAIN), spec, None, half=True)
    assert around.device == graph.device
    tiles = list(np.random.default_rng(4).standard_normal((2, 3, spec.tile, spec.tile)))
    tiles = [tile.astype(np.float16) for tile in tiles]
    (tokens,) = graph.run_on_device({"pixel_values": around.pixels(tiles)}, ["tokens"])
    before = trt.cuda.copies.copy()
    pooled = [around.tokens(role, tokens, 1, None) for role in ("global", "local")]
    # The tile's number goes up.
    assert trt.cuda.copies - before == {"HostToDevice": 2}
    for role, ours in zip(("global", "local"), pooled, strict=True):
        theirs = host.tokens(role, HostTensor(tokens.numpy()), 1, None)
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5)
    built = trt.built
    again = DeviceTiles(graph, spec, None, half=True)
    (other,) = graph.run_on_device({"pixel_values": around.pixels(tiles[:1])}, ["tokens"])
    np.testing.assert_array_equal(
        again.tokens("local", other, 0, None).numpy(),
        around.tokens("local", tokens, 0, None).numpy(),
    )
    assert trt.built == built


def test_times_of_kernels_are_kept_for_the_next_build(trt: FakeTensorRT) -> None:
    assert trt
    (timings,) = EngineCache().folder.glob("*.timings")
    assert timings.name == f"sm_87-{trt.__version__}.timings"
    # Each build begins with those before it: the fake adds a byte.
    assert len(timings.read_bytes()) > 1


def test_a_full_gpu_is_an_error_that_says_so(
    bundle: Bundle, trt: FakeTensorRT, decoders: list[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bundle
    open_device().trim()
    monkeypatch.setattr(trt.cuda, "memory", trt.cuda.used() + 1000)
    with pytest.raises(OutOfMemoryError, match="the GPU's memory is full"):
        forward(decoders[0], decoders[0].new_cache(), 4)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_embedded_model_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    """The whole way, its two decoders sharing layers; INT8 on the CPU is not float16 exactly."""
    fake = put_in_place(monkeypatch, tmp_path, FakeCuda(1 << 30), version)
    build(open_bundle(default_bundle_path()), 4096)
    answers, more = [], []
    for device in ("tensorrt", "cpu"):
        with lrs_edge.load(device=device) as loaded:
            scene = loaded.open(EXAMPLES / "islands.tif")
            answers.append(scene.ask("Is there a ship?"))
            budget = scene.ask("Is there a ship?", kv_budget=60)
            as_released = scene.ask("Is there a ship?", policy="reference", max_tokens=2)
            more.append((budget.text, as_released.text))
    ours, theirs = answers
    assert more[0] == more[1]
    assert ours.text == theirs.text == "yes"
    assert ours.confidence == pytest.approx(theirs.confidence, abs=0.05)
    # What an answer brings down: scores, tokens' logits, the detector's maps; never vision tokens.
    assert fake.cuda.bytes["DeviceToHost"] < fake.cuda.bytes["HostToDevice"] / 10
    open_device.cache_clear()
