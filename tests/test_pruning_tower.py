"""VisionZip and PruMerge: their rules transcribed in torch, CLIP's attention in transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")
pytest.importorskip("transformers")

import torch
import transformers

import lrs_edge
from lrs_edge import Answer, BundleError, Engine
from lrs_edge.baselines.prumerge import CLUSTER, PruMerge, outliers
from lrs_edge.baselines.tower import OUTPUTS, Patches, TowerEncoder
from lrs_edge.baselines.visionzip import VisionZip, kept_counts
from lrs_edge.commands.main import run
from lrs_edge.errors import ExportError
from lrs_edge_export.bundle.writer import ExportOptions, export_bundle
from lrs_edge_export.graphs.sessions import open_session
from tests.checkpoints import GRID, PATCH, write_nano, write_qwen

PATCHES, TILE = GRID**2, GRID * PATCH


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("zip") / "qwen")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    target = checkpoint.parent / "bundle"
    export_bundle(str(checkpoint), target, ExportOptions(parity=False, vision_attention=True))
    return target


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[Engine]:
    with lrs_edge.load(bundle, provider="cpu", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(0).integers(0, 255, size=(90, 150, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def patches_of(count: int, seed: int) -> Patches:
    """Random patches; no two attentions are the same."""
    random = np.random.default_rng(seed)
    features, keys, next_keys = (random.normal(size=(count, width)) for width in (6, 4, 5))
    attention, following = (random.permutation(count) + 1.0 for _ in range(2))
    following = following**4 / np.sum(following**4)
    found = (features, attention, keys, following, next_keys)
    return Patches(*(values.astype(np.float32) for values in found))


def ask(engine: Engine, image: Path, **options: object) -> Answer:
    with engine.open(image) as scene:
        return scene.ask("How many ships?", max_tokens=4, **options)


# -- the rule ------------------------------------------------------------------------------------


def zipped(features: Any, attention: Any, keys: Any, dominant: int, contextual: int) -> Any:
    """The authors' rule without the class token, tokens in their order: dominant, contextual."""
    chosen = attention.topk(dominant).indices
    rest = torch.ones(len(features), dtype=torch.bool)
    rest[chosen] = False
    metric = torch.nn.functional.normalize(keys[rest], dim=-1)
    step = max(1, int(rest.sum()) // contextual)
    targets = torch.arange(0, len(metric), step)[:contextual]
    is_target = torch.zeros(len(metric), dtype=torch.bool)
    is_target[targets] = True
    similarity = metric[~is_target] @ metric[targets].T
    assigned = torch.nn.functional.one_hot(similarity.argmax(1), contextual).float()
    means = assigned.T @ features[rest][~is_target]
    means = means / assigned.sum(0).clamp(min=1)[:, None]
    return torch.cat([features[~rest], features[rest][targets] + means])


def test_the_defaults_are_the_papers() -> None:
    assert kept_counts(576, 8 / 9) == (54, 10)


@settings(deadline=None)
@given(st.integers(20, 120), st.floats(0.2, 0.85), st.integers(0, 2**31))
def test_the_rule_is_the_authors(count: int, dropped: float, seed: int) -> None:
    patches = patches_of(count, seed)
    dominant, contextual = kept_counts(count, dropped)
    found = VisionZip(dropped).compress(patches)
    assert len(found.places) == dominant + contextual
    if contextual == 0:
        return
    wanted = zipped(*map(torch.from_numpy, patches[:3]), dominant, contextual)
    order = np.lexsort(np.round(found.values, 3).T)
    other = np.lexsort(np.round(wanted.numpy(), 3).T)
    assert np.allclose(found.values[order], wanted.numpy()[other], atol=1e-3)


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0, 0.999), st.integers(0, 2**31))
def test_places_are_patches_and_the_most_attended_stay(
    count: int, dropped: float, seed: int
) -> None:
    patches = patches_of(count, seed)
    found = VisionZip(dropped).compress(patches)
    dominant, contextual = kept_counts(count, dropped)
    assert VisionZip(dropped).most(count) == dominant + contextual
    assert 1 <= len(found.places) <= dominant + contextual <= count
    assert np.array_equal(found.places, np.unique(found.places))
    best = np.argsort(-patches.attention)[:dominant]
    assert set(best) <= set(found.places)
    unchanged = np.isin(found.places, best)
    assert np.array_equal(found.values[unchanged], patches.features[np.sort(best)])


def prumerged(features: Any, attention: Any, keys: Any, left: int) -> Any:
    """The authors' rule, token by token: the kept ones by attention, then the sum of the others."""
    top = attention.topk(left).indices
    rest = torch.ones(len(features), dtype=torch.bool)
    rest[top] = False
    keys = torch.nn.functional.normalize(keys, dim=-1)
    found = []
    for place in top:
        others = torch.arange(len(features)) != place
        near = (keys[others] @ keys[place]).topk(CLUSTER).indices
        merged = (features[others][near] * attention[others][near, None]).sum(0)
        found.append(features[place] + merged)
    return torch.stack([*found, (features[rest] * attention[rest, None]).sum(0)])


@settings(deadline=None)
@given(st.integers(40, 90), st.sampled_from([None, 0.5, 0.875]), st.integers(0, 2**31))
def test_the_other_rule_is_the_authors_too(count: int, dropped: float | None, seed: int) -> None:
    patches, rule = patches_of(count, seed), PruMerge(dropped)
    found = rule.compress(patches)
    attention = patches.next_attention
    left = outliers(attention) if dropped is None else int(count * (1 - dropped))
    low, high = np.percentile(attention, (25, 75))
    assert outliers(attention) == (attention > high + 1.5 * (high - low)).sum() > 0
    assert len(found.places) == left + 1 <= rule.most(count)
    tensors = map(torch.from_numpy, (patches.features, attention, patches.next_keys))
    wanted = prumerged(*tensors, left).numpy()
    # The kept ones stand at their patches; the sum at the best of the others.
    ranks = np.argsort(-attention)[: left + 1]
    assert np.array_equal(found.places, np.sort(ranks))
    assert np.allclose(found.values, wanted[np.argsort(ranks)], atol=1e-4)


@settings(deadline=None)
@given(st.integers(1, 60), st.sampled_from([None, 0.0, 0.5, 0.99]), st.integers(0, 2**31))
def test_merging_never_leaves_more_than_planned(
    count: int, dropped: float | None, seed: int
) -> None:
    patches, rule = patches_of(count, seed), PruMerge(dropped)
    found = rule.compress(patches)
    assert 1 <= len(found.places) <= rule.most(count) <= count
    assert np.array_equal(found.places, np.unique(found.places))
    assert np.isfinite(found.values).all()
    flat = patches._replace(next_attention=np.full(count, 1 / count, np.float32))
    assert len(PruMerge().compress(flat).places) == 1


# -- the graphs ----------------------------------------------------------------------------------


def test_the_tower_gives_clips_attention_out(checkpoint: Path, bundle: Path) -> None:
    pixels = np.random.default_rng(2).normal(size=(2, 3, TILE, TILE)).astype(np.float32)
    tower = transformers.CLIPVisionModel.from_pretrained(
        checkpoint / "tower", attn_implementation="eager"
    ).eval()
    model = getattr(tower, "vision_model", tower)
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: outputs.update({name: output})

    last, behind = (model.encoder.layers[place].self_attn for place in (-2, -1))
    hooks = [
        layer.register_forward_hook(keep(name))
        for name, layer in (
            ("last", last.k_proj),
            ("query", behind.q_proj),
            ("key", behind.k_proj),
        )
    ]
    with torch.inference_mode():
        wanted = tower(torch.from_numpy(pixels), output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    attention = wanted.attentions[-2]
    heads = attention.shape[1]
    keys = outputs["last"].view(2, PATCHES + 1, heads, -1).mean(2)[:, 1:]
    query, next_keys = (outputs[name] for name in ("query", "key"))
    products = query @ next_keys.transpose(1, 2) * query.shape[-1] ** -0.5
    session = open_session(bundle / "vision_tower.onnx")
    found = session.run(list(OUTPUTS), {"pixel_values": pixels})
    expected = (
        wanted.hidden_states[-2][:, 1:],
        attention[:, :, 0, 1:].mean(1),
        keys,
        products.softmax(-1)[:, 0, 1:],
        next_keys[:, 1:],
    )
    for values, other in zip(found, expected, strict=True):
        assert values.shape == tuple(other.shape)
        assert np.abs(values - other.numpy()).max() < 1e-4 * np.abs(other.numpy()).max()
    projected = open_session(bundle / "projector.onnx").run(["tokens"], {"features": found[0]})
    whole = open_session(bundle / "vision.onnx").run(["tokens"], {"pixel_values": pixels})
    assert np.abs(projected[0] - whole[0]).max() < 1e-4 * np.abs(whole[0]).max()


def test_the_graphs_add_one_layer_s_queries_and_keys(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    export_bundle(str(checkpoint), plain, ExportOptions(parity=False))
    assert (plain / "vision.onnx").read_bytes() == (bundle / "vision.onnx").read_bytes()
    data, more = ((path / "vision.onnx.data").read_bytes() for path in (plain, bundle))
    assert more.startswith(data)
    assert json.loads((plain / "manifest.json").read_text())["vision"]["tower"] is None


def test_towers_without_attention_are_refused(tmp_path: Path) -> None:
    source = write_nano(tmp_path / "nano")
    options = ExportOptions(parity=False, vision_attention=True)
    with pytest.raises(ExportError, match="CLIP"):
        export_bundle(str(source), tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_the_command_writes_them(checkpoint: Path, tmp_path: Path) -> None:
    line = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "--no-parity", "-q"]
    assert run([*line, "--vision-attention"]) == 0
    assert (tmp_path / "b" / "projector.onnx").is_file()


# -- questions -----------------------------------------------------------------------------------


class FixedGraph:
    """A graph that gives the same arrays, whatever it is fed."""

    def __init__(self, inputs: tuple[str, ...], outputs: dict[str, np.ndarray]) -> None:
        self.inputs, self.outputs = dict.fromkeys(inputs), outputs

    def run(self, _feeds: object, outputs: tuple[str, ...]) -> list[np.ndarray]:
        return [self.outputs[name] for name in outputs]


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_tower_of_other_shapes_is_refused(engine: Engine, name: str) -> None:
    given = {part: np.ones((1, PATCHES, 5), np.float32) for part in OUTPUTS}
    given |= {part: given[part][..., 0] for part in OUTPUTS if part.endswith("attention")}
    spec, rule = engine.manifest.vision, VisionZip(0.5)
    tile, inside = np.zeros((3, TILE, TILE), np.float32), np.arange(PATCHES)
    tokens = np.ones((1, rule.most(PATCHES), 7), np.float32)
    projector = FixedGraph(("features",), {"tokens": tokens})

    def encode(outputs: dict[str, np.ndarray]) -> None:
        tower = FixedGraph(("pixel_values",), outputs)
        TowerEncoder(lambda: (tower, projector), spec, 7).encode(tile, inside, rule)  # type: ignore[arg-type, return-value]

    encode(given)
    for odd in (given[name][..., None], given[name][:, 1:]):
        with pytest.raises(BundleError, match="outputs do not have the shapes"):
            encode(given | {name: odd})


def test_every_tile_of_a_level_gives_some_tokens(engine: Engine, image: Path) -> None:
    kept = sum(kept_counts(PATCHES, 0.5))
    answer = ask(engine, image, prune="visionzip", prune_ratio=0.5)
    (level,) = answer.levels
    assert answer.token_ids
    assert answer.prune == "visionzip"
    assert level.tiles_encoded == level.tile_rows * level.tile_cols == len(answer.regions)
    assert level.tokens_kept == sum(region.tokens_kept for region in answer.regions)
    assert max(region.tokens_kept for region in answer.regions) == kept
    assert answer.tokens.sent == kept + 1 + level.tokens_kept
    for region in answer.regions:
        x0, y0, x1, y1 = region.bounds
        if region.tokens_kept:
            assert x0 <= region.peak[0] < region.peak[2] <= x1 + 1e-6
            assert y0 <= region.peak[1] < region.peak[3] <= y1 + 1e-6


def test_fewer_tokens_show_a_finer_level(engine: Engine, image: Path) -> None:
    none = ask(engine, image, prune="none", max_vision_tokens=150)
    few = ask(engine, image, prune="visionzip", max_vision_tokens=150)
    assert few.levels[0].width > none.levels[0].width
    assert few.tokens.sent <= 150


def test_budgets_hold(engine: Engine, image: Path) -> None:
    answer = ask(engine, image, prune="visionzip", max_tiles=9)
    assert 1 + len(answer.regions) <= 9
    assert answer.search_end == "max_tiles"
    alone = ask(engine, image, prune="visionzip", max_tiles=0)
    assert alone.regions == ()
    assert alone.tokens.sent == sum(kept_counts(PATCHES, 8 / 9)) + 1
    merged = ask(engine, image, prune="prumerge", max_tiles=9)
    assert 1 + len(merged.regions) <= 9
    late = ask(engine, image, prune="visionzip", timeout=1e-4)
    assert late.search_end == "timeout"


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_prumerge_answers_within_what_it_planned(
    engine: Engine, image: Path, ratio: float | None
) -> None:
    answer = ask(engine, image, prune="prumerge", prune_ratio=ratio)
    assert answer.token_ids
    assert answer.prune == "prumerge"
    most = PruMerge(ratio).most(PATCHES)
    counts = [region.tokens_kept for region in answer.regions]
    assert 1 <= max(counts) <= most
    assert answer.tokens.sent <= most * (1 + len(counts)) + 1


def test_other_questions_on_the_scene_are_unharmed(engine: Engine, image: Path) -> None:
    with engine.open(image) as scene:
        before = scene.ask("How many ships?", max_tokens=4)
        first = scene.ask("How many ships?", max_tokens=4, prune="visionzip")
        scene.ask("How many ships?", max_tokens=4, prune="prumerge")
        again = scene.ask("How many ships?", max_tokens=4, prune="visionzip")
        after = scene.ask("How many ships?", max_tokens=4)
    assert first.token_ids == again.token_ids
    assert before.token_ids == after.token_ids


def test_another_global_view_with_as_many_tokens_is_not_taken_for_the_shared_one(
    engine: Engine, image: Path, tmp_path: Path
) -> None:
    path = tmp_path / "trace.npz"

    def first_logits(scene: lrs_edge.Scene, **options: object) -> np.ndarray:
        answer = scene.ask("How many ships?", max_tokens=1, max_tiles=0, trace=path, **options)
        assert answer.tokens.sent == PATCHES + 1
        with np.load(path) as arrays:
            return np.asarray(arrays["prefill_last_logits"])

    merging = {"prune": "prumerge", "prune_ratio": 0.0}
    with engine.open(image) as scene:
        plain = first_logits(scene)
    with engine.open(image) as scene:
        merged = first_logits(scene, **merging)
        assert np.abs(first_logits(scene) - plain).max() < 1e-5
        assert np.abs(first_logits(scene, **merging) - merged).max() < 1e-5
        assert np.abs(first_logits(scene) - plain).max() < 1e-5
    assert np.abs(merged - plain).max() > 1e-3


@pytest.mark.parametrize("prune", ["visionzip", "prumerge"])
def test_a_bundle_without_the_tower_says_what_to_do(
    checkpoint: Path, image: Path, tmp_path: Path, prune: str
) -> None:
    export_bundle(str(checkpoint), tmp_path / "bundle", ExportOptions(parity=False))
    with (
        lrs_edge.load(tmp_path / "bundle", provider="cpu", threads=1) as engine,
        pytest.raises(BundleError, match="--vision-attention"),
    ):
        ask(engine, image, prune=prune)
