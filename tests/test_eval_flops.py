"""Operations: formulas against PyTorch's own counter, and what the meter counts in the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.bundle.manifest import Flavour, SegmentSpec
from lrs_edge.engines.metered import GraphWork, Meter, MeteredGraph
from lrs_edge.evaluation.flops import count_flops, graph_costs
from lrs_edge.requests.options import Prune
from tests.checkpoints import write_nano, write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lrs_edge
from lrs_edge_export import ExportOptions, export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.torch_model import stages, vision
from tests.test_engine import picture

NO_PARITY = ExportOptions(parity=False)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and bundle of two families."""
    folder = tmp_path_factory.mktemp("flops")
    made = {}
    for name, write in (("qwen", write_qwen), ("nano", write_nano)):
        checkpoint = write(folder / name)
        export_bundle(str(checkpoint), folder / f"{name}-bundle", NO_PARITY)
        made[name] = (checkpoint, folder / f"{name}-bundle")
    return made


@pytest.mark.parametrize("name", ["qwen", "nano"])
def test_formulas_equal_what_torch_counts(bundles: dict[str, tuple[Path, Path]], name: str) -> None:
    source, target = bundles[name]
    model = read_model(find_checkpoint(str(source)), None)
    manifest = open_bundle(target).manifest
    costs = graph_costs(manifest)
    assert costs is not None

    def counted(run: object) -> int:
        # The counter does not know the fused attention of CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()  # type: ignore[operator]
        return counter.get_total_flops()

    tile = manifest.vision.tile
    pixels = torch.zeros(1, 3, tile, tile)
    towers = counted(lambda: vision.vision_tokens(model.vision, pixels))
    assert costs["vision.onnx"].per_tile == manifest.vision.flops == towers
    length = 7
    embeds = torch.randn(length, manifest.llm.hidden)
    # Torch counts all pairs of a causal attention; here only those that are seen count.
    work = GraphWork(runs=1, tokens=length, pairs=length * length)
    llm = counted(lambda: stages.llm_logits(model.llm, model.lm_head(), embeds, 1))
    assert costs["llm.onnx"].of(work) == llm
    rfm = counted(lambda: stages.rfm_logits(model.region_focus, embeds))
    scores = 2 * manifest.rfm.heads * manifest.rfm.head_dim * length
    assert costs["rfm.onnx"].of(work) + scores == rfm
    assert costs["rfm_masked.onnx"] == costs["rfm.onnx"]


def test_segments_cost_what_the_whole_costs_and_their_attention(
    bundles: dict[str, tuple[Path, Path]],
) -> None:
    manifest = open_bundle(bundles["qwen"][1]).manifest
    llm = manifest.llm
    parts = (SegmentSpec("a.onnx", 0, 1), SegmentSpec("b.onnx", 1, llm.layers - 1))
    cut = msgspec.structs.replace(manifest, llm=msgspec.structs.replace(llm, segments=parts))
    costs = graph_costs(cut)
    assert costs is not None
    work = GraphWork(runs=1, tokens=9, pairs=45)
    together = costs["a.onnx"].of(work) + costs["b.onnx"].of(work)
    between = 2 * llm.hidden * llm.head_dim * (9 * llm.kv_heads + llm.heads)
    assert together == costs[llm.path(Flavour.GQA)].of(work) + between


def test_a_tower_and_a_projector_of_their_own_are_counted(
    bundles: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    options = ExportOptions(parity=False, vision_attention=True)
    export_bundle(str(bundles["qwen"][0]), tmp_path / "bundle", options)
    manifest = open_bundle(tmp_path / "bundle").manifest
    costs, tower = graph_costs(manifest), manifest.vision.tower
    assert costs is not None
    assert tower is not None
    patches = manifest.vision.grid**2
    projected = costs[tower.projector].of(GraphWork(runs=1, tokens=patches))
    # The tower goes on into one layer more, for its attention.
    assert costs[tower.graph].per_tile + projected > manifest.vision.flops
    assert projected < manifest.vision.flops
    uncounted = msgspec.structs.replace(
        manifest,
        vision=msgspec.structs.replace(
            manifest.vision, tower=msgspec.structs.replace(tower, flops=0)
        ),
    )
    work = {tower.graph: GraphWork(runs=1, tiles=1)}
    assert count_flops(graph_costs(uncounted), work) is None
    meter = Meter()
    graph = MeteredGraph(Recorded(), tower.projector, meter)  # type: ignore[arg-type]
    graph.run({"features": np.zeros((2, 3, 4))}, [])
    assert meter.read()[tower.projector] == GraphWork(runs=1, tokens=6)


def test_sizes_that_are_not_there_give_no_figure(bundles: dict[str, tuple[Path, Path]]) -> None:
    manifest = open_bundle(bundles["nano"][1]).manifest
    old = msgspec.structs.replace(
        manifest, vision=msgspec.structs.replace(manifest.vision, flops=0)
    )
    assert graph_costs(old) is None
    assert count_flops(None, {}) is None
    costs = graph_costs(manifest)
    assert count_flops(costs, {"unknown.onnx": GraphWork(runs=1)}) is None
    nothing = count_flops(costs, {})
    assert nothing is not None
    assert nothing.total == 0


@pytest.fixture(scope="module")
def complete(
    bundles: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle with every graph that a way to prune can need."""
    target = tmp_path_factory.mktemp("complete") / "bundle"
    options = ExportOptions(parity=False, vision_attention=True, attention_layers=(1,))
    export_bundle(str(bundles["qwen"][0]), target, options)
    return target


@pytest.mark.parametrize("prune", get_args(Prune))
def test_every_way_to_prune_has_a_cost(complete: Path, tmp_path: Path, prune: Prune) -> None:
    image = picture(tmp_path / "image.png", 100, 60)
    with lrs_edge.load(complete, provider="cpu") as engine, engine.open(image) as scene:
        scene.ask("How many ships?", max_tokens=2, prune=prune)
        found = count_flops(graph_costs(engine.manifest), engine.meter.read())
    assert found is not None
    assert found.vision > 0
    assert found.llm > 0


class Recorded:
    """A graph that computes nothing."""

    def run(self, *_: object) -> list[np.ndarray]:
        return []

    def new_buffers(self, names: object) -> object:
        return names


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_chunks_count_like_one_pass(lengths: list[int]) -> None:
    meter = Meter()
    graph = MeteredGraph(Recorded(), "llm.onnx", meter)  # type: ignore[arg-type]
    past = 0
    for length in lengths:
        feeds = {"position_ids": np.zeros((1, length)), "past_length": np.array([past])}
        graph.run(feeds, [])
        past += length
    (work,) = meter.read().values()
    assert work == GraphWork(len(lengths), 0, past, past * (past + 1) // 2)


def test_since_tells_the_difference() -> None:
    meter = Meter()
    meter.add("a", GraphWork(1, 2, 0, 0))
    before = meter.read()
    assert meter.since(before) == {}
    meter.add("a", GraphWork(1, 3, 0, 0))
    meter.add("b", GraphWork(1, 0, 5, 15))
    assert meter.since(before) == {"a": GraphWork(1, 3, 0, 0), "b": GraphWork(1, 0, 5, 15)}


def test_a_second_question_costs_only_what_is_new(
    bundles: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    image = picture(tmp_path / "image.png", 300, 200)
    with lrs_edge.load(bundles["nano"][1], provider="cpu") as engine, engine.open(image) as scene:
        first = scene.ask("How many ships?", max_tokens=2, temperature=0)
        one = engine.meter.read()
        scene.ask("How many ships?", max_tokens=2, temperature=0)
        two = engine.meter.since(one)
    looked_at = sum(level.tiles_encoded for level in first.levels)
    assert one["vision.onnx"].tiles == looked_at + 1
    assert "vision.onnx" not in two
    views = engine.manifest.vision.grid**2
    # The global view and the text before it stay in both caches.
    for graph in ("rfm.onnx", "llm.onnx"):
        assert 0 < two[graph].tokens <= one[graph].tokens - views
    generated = len(first.token_ids)
    sequence = first.tokens.sent + first.tokens.text
    assert sequence <= one["llm.onnx"].tokens <= sequence + generated
