"""Tokens with three positions (Qwen's multimodal RoPE): decoders, sequences, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch", reason="export needs the `export` extra")
pytest.importorskip("transformers")

import torch
import transformers

from lrs_edge.bundle.layout import GlobalView, LocalRows, LocalTiles, PromptSpec, Question, Text
from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.errors import BundleError
from lrs_edge.language.decoder import Decoder
from lrs_edge.language.kv_cache import TokenKind
from lrs_edge.language.layout import SequenceBuilder
from lrs_edge.language.prompt import Prompt
from lrs_edge.pyramid.levels import Level, TileIndex, TokenGrid
from lrs_edge.search.result import LevelPass, SearchResult
from lrs_edge.search.search import trim
from lrs_edge_export.checkpoints.model import DecoderConfig, DecoderStage
from lrs_edge_export.checkpoints.tensors import Array, Scoped
from lrs_edge_export.graphs.decoder_graph import (
    LanguageHead,
    write_llm,
    write_llm_segments,
    write_rfm,
)
from lrs_edge_export.graphs.sessions import DecoderSession
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.torch_model import stages
from tests.checkpoints import byte_tokenizer
from tests.specs import decoder_spec
from tests.test_torch_model import InMemory

VOCABULARY, LENGTH = 13, 20

#: Of 8 frequencies: sections one after the other (Qwen2-VL), and interleaved (Qwen3-VL).
SECTIONS = (2, 3, 3)
BLOCKS = (0, 0, 1, 1, 1, 2, 2, 2)
INTERLEAVED = (0, 1, 2, 0, 1, 2, 1, 2)

QWEN2 = DecoderConfig(3, 64, 4, 2, 16, 40, 1e-6, 1e6, qkv_bias=True, rope_axes=BLOCKS)
QWEN3 = DecoderConfig(
    3, 48, 4, 2, 16, 40, 1e-6, 5e6, qkv_bias=False, rope_axes=INTERLEAVED, qk_norm=True, deepstack=2
)


def judge(kind: str, config: DecoderConfig) -> Any:
    """A random language model of transformers; its norms are not all ones."""
    torch.manual_seed(3)
    rope = {"rope_type": "default", "rope_theta": config.theta, "mrope_section": list(SECTIONS)}
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.eps,
        "rope_parameters": rope,
        "initializer_range": 0.2,
    }
    if kind == "Qwen3VL":
        sizes["head_dim"] = config.head_dim
        rope["mrope_interleaved"] = True
    text = getattr(transformers, f"{kind}TextConfig")(**sizes)
    text._attn_implementation = "eager"
    module = transformers.models.qwen2_vl.modeling_qwen2_vl
    if kind == "Qwen3VL":
        module = transformers.models.qwen3_vl.modeling_qwen3_vl
    found = getattr(module, f"{kind}TextModel")(text)
    with torch.no_grad():
        for name, value in found.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(torch.randn_like(value), alpha=0.3)
    return found.eval()


def scene(config: DecoderConfig) -> tuple[Array, np.ndarray]:
    """Tokens [L, width] and positions [3, L] of text, an image of 3 x 4 with gaps, text."""
    rng = np.random.default_rng(5)
    embeds = rng.standard_normal((LENGTH, config.width)).astype(np.float32)
    rows, cols = np.divmod(np.arange(40), 8)
    kept = np.sort(rng.choice(40, 12, replace=False))
    image = 700 + np.stack([np.zeros(12, np.int64), rows[kept], cols[kept]])
    text = np.tile(np.concatenate([np.arange(695, 700), np.arange(708, 711)]), (3, 1))
    positions = np.concatenate([text[:, :5], image, text[:, 5:]], axis=1)
    embeds[np.r_[0:5, 17:20], config.hidden :] = 0
    return embeds, positions


def of_transformers(
    model: Any,
    config: DecoderConfig,
    embeds: Array,
    places: np.ndarray,
    unseen: np.ndarray | None = None,
) -> Array:
    """Hidden states [L, D] after the final norm; the last three tokens do not see some others."""
    shown = torch.from_numpy(places[:, None])
    bias = np.triu(np.full((LENGTH, LENGTH), -np.inf, np.float32), 1)
    if unseen is not None:
        bias[-3:, unseen] = -np.inf
    more: dict[str, Any] = {"attention_mask": torch.from_numpy(bias)[None, None]}
    x = torch.from_numpy(embeds)
    if config.deepstack:
        seen = (x[:, config.hidden :] != 0).any(1)
        parts = x[:, config.hidden :].reshape(len(x), config.deepstack, -1)
        more["visual_pos_masks"] = seen[None]
        more["deepstack_visual_embeds"] = [parts[seen, i] for i in range(config.deepstack)]
    with torch.inference_mode():
        found = model(inputs_embeds=x[None, :, : config.hidden], position_ids=shown, **more)
    return found.last_hidden_state[0].numpy()


@pytest.fixture(params=["Qwen2VL", "Qwen3VL"])
def given(request: pytest.FixtureRequest) -> tuple[DecoderStage, Array, Array, np.ndarray, Array]:
    """A stage, its head, tokens, positions, and the logits that transformers gives."""
    config = QWEN2 if request.param == "Qwen2VL" else QWEN3
    model = judge(request.param, config)
    stage = DecoderStage(config, Scoped(InMemory(model.state_dict()), ""))
    stage.check("language model")
    head = np.random.default_rng(1).standard_normal((VOCABULARY, config.hidden))
    embeds, places = scene(config)
    wanted = of_transformers(model, config, embeds, places) @ head.T
    return stage, head.astype(np.float32), embeds, places, wanted.astype(np.float32)


def close(found: Array, wanted: Array, limit: float = 3e-5) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= limit * np.abs(wanted).max()


def test_logits_are_those_of_transformers(
    given: tuple[DecoderStage, Array, Array, np.ndarray, Array], tmp_path: Path
) -> None:
    stage, head, embeds, places, wanted = given
    x, at = torch.from_numpy(embeds), torch.from_numpy(places)
    close(stages.llm_logits(stage, head, x, LENGTH, at).numpy(), wanted)
    path = tmp_path / "llm.onnx"
    language = LanguageHead(VOCABULARY, lambda: head)
    with WeightFile(tmp_path / "llm.onnx.data") as weights:
        write_llm(stage, language, path, weights)
        cuts = [tmp_path / f"{i}.onnx" for i in range(2)]
        write_llm_segments(stage, language, [2], cuts, weights)
    session = DecoderSession(path, capacity=LENGTH)
    close(session.run(embeds[:9], places[:, :9]), wanted[8:9])
    close(session.run(embeds[9:], places[:, 9:]), wanted[-1:])
    states = DecoderSession(cuts[0], capacity=LENGTH).run(embeds, places)
    assert states.shape == (1, LENGTH, stage.config.hidden)
    close(DecoderSession(cuts[1], capacity=LENGTH).run(states[0], places), wanted[-1:])


@pytest.mark.parametrize(("kind", "config"), [("Qwen2VL", QWEN2), ("Qwen3VL", QWEN3)])
def test_tokens_dropped_from_the_cache_are_masked_ones(
    kind: str, config: DecoderConfig, tmp_path: Path
) -> None:
    """Keys keep the positions that they were turned by, whatever is dropped between them."""
    model = judge(kind, config)
    stage = DecoderStage(config, Scoped(InMemory(model.state_dict()), ""))
    head = np.random.default_rng(2).standard_normal((VOCABULARY, config.hidden)).astype(np.float32)
    embeds, places = scene(config)
    dropped = np.array([6, 7, 9, 12, 13])
    wanted = of_transformers(model, config, embeds, places, dropped)[-1:] @ head.T
    with WeightFile(tmp_path / "llm.onnx.data") as weights:
        write_llm(stage, LanguageHead(VOCABULARY, lambda: head), tmp_path / "llm.onnx", weights)
    session = DecoderSession(tmp_path / "llm.onnx", capacity=LENGTH)
    session.run(embeds[:17], places[:, :17])
    session.keep(np.setdiff1d(np.arange(17), dropped))
    close(session.run(embeds[17:], places[:, 17:]), wanted)


@pytest.mark.parametrize("flavour", ["gqa", "masked"])
@pytest.mark.parametrize("of_llm", [False, True])
def test_scores_are_those_of_the_model(
    given: tuple[DecoderStage, Array, Array, np.ndarray, Array],
    tmp_path: Path,
    flavour: str,
    of_llm: bool,
) -> None:
    stage, _, embeds, places, _ = given
    config = replace(stage.config, layers=1)
    scoring = DecoderStage(config, stage.tensors, scoring=True, of_llm=of_llm)
    x, at = torch.from_numpy(embeds), torch.from_numpy(places)
    wanted = stages.rfm_logits(scoring, x, at).numpy()
    with WeightFile(tmp_path / "rfm.onnx.data") as weights:
        write_rfm(scoring, flavour, tmp_path / "rfm.onnx", weights)  # type: ignore[arg-type]
    bias = None
    if flavour == "masked":
        bias = np.triu(np.full((LENGTH, LENGTH), -3e4, np.float32), 1)
    session = DecoderSession(tmp_path / "rfm.onnx", capacity=LENGTH)
    close(session.run(embeds, places, bias), wanted)


def test_one_position_on_all_axes_is_plain_rope() -> None:
    config = replace(QWEN2, rope_axes=())
    stage = DecoderStage(QWEN2, Scoped(InMemory({}), ""))
    places = torch.arange(30)
    turns = stages.rope(stage, 30)
    assert torch.equal(turns.cos, stages.rope(replace(stage, config=config), 30, places).cos)


def builder(local: LocalRows | LocalTiles) -> SequenceBuilder:
    """Sequences of three axes; embeddings hold the token's number."""
    parts = (Text("ab"), GlobalView(), Text("c"), local, Question("d{question}"))
    prompt = Prompt(byte_tokenizer().to_str(), PromptSpec(parts, (258,), (), 3), 259)
    return SequenceBuilder(
        prompt,
        lambda ids: np.tile(ids[:, None].astype(np.float32), (1, 2)),
        np.zeros(2, np.float32),
    )


def features(*tiles: TileIndex) -> dict[TileIndex, Array]:
    return {tile: np.full((4, 2), 1000 + number, np.float32) for number, tile in enumerate(tiles)}


def test_a_level_is_one_image() -> None:
    sequences = builder(LocalRows(newline=False))
    prefix = sequences.prefix(np.zeros((9, 2), np.float32))
    # Two of text, an image of 3 x 3 from position 2 on, a text at 5.
    rows, cols = np.divmod(np.arange(9), 3)
    assert prefix.positions[:, :2].tolist() == [[0, 1]] * 3
    assert np.array_equal(prefix.positions[:, 2:11], 2 + np.stack([rows * 0, rows, cols]))
    assert prefix.positions[:, 11].tolist() == [5] * 3
    grid = TokenGrid(4, 5, 2, 2, 3)
    local = sequences.local(grid, features(TileIndex(0, 2), TileIndex(1, 0)), 0)
    assert local.offsets.tolist() == [[0] * 6, [0, 1, 2, 2, 3, 3], [4, 4, 0, 1, 0, 1]]
    assert local.span == sequences.span(grid) == 5
    after = sequences.text(np.arange(3))
    whole = sequences.level(prefix, local, after)
    assert np.array_equal(whole.positions[:, 12:18], 6 + local.offsets)
    assert whole.positions[:, 18:].tolist() == [[11, 12, 13]] * 3
    assert (whole.tokens["kind"][12:18] == TokenKind.TILE).all()
    # What pruning keeps stays where it is, and so does the text.
    kept = sequences.final(prefix, local.take(np.array([1, 4])), after)
    assert np.array_equal(kept.positions[:, 12:], whole.positions[:, [13, 16, 18, 19, 20]])


def test_gaps_of_a_level_that_is_far_too_large_close() -> None:
    sequences = builder(LocalRows(newline=False))
    grid = TokenGrid(40_000, 60_000, 2, 20_000, 30_000)
    tiles = TileIndex(7000, 20), TileIndex(7000, 29_000), TileIndex(19_000, 20)
    local = sequences.local(grid, features(*tiles), 0, close_gaps=True)
    assert local.span == 4
    assert local.offsets[1].tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 2
    assert local.offsets[2].tolist() == [0, 1, 2, 3] * 2 + [0, 1] * 2


def test_marked_tiles_are_an_image_each() -> None:
    sequences = builder(LocalTiles(before="<", after=">"))
    prefix = sequences.prefix(np.zeros((1, 2), np.float32))
    assert prefix.positions[0].tolist() == [0, 1, 2, 3]
    # The right column of tiles is half padding.
    grid = TokenGrid(4, 3, 2, 2, 2)
    local = sequences.local(grid, features(TileIndex(1, 0), TileIndex(0, 1)), 0)
    first = [[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]]
    second = [[4, 5, 5, 5, 5, 7], [4, 5, 5, 6, 6, 7], [4, 5, 6, 5, 6, 7]]
    assert local.offsets.tolist() == [a + b for a, b in zip(first, second, strict=True)]
    assert local.span == 8
    whole = sequences.level(prefix, local, sequences.text(np.arange(2)))
    assert whole.positions[:, -2:].tolist() == [[12, 13]] * 3
    assert sequences.span(grid) >= local.span


def test_a_manifest_that_says_other_axes_or_widths_than_the_graph_is_refused(
    given: tuple[DecoderStage, Array, Array, np.ndarray, Array], tmp_path: Path
) -> None:
    stage, head, _, _, _ = given
    config, path = stage.config, tmp_path / "llm.onnx"
    with WeightFile(tmp_path / "llm.onnx.data") as weights:
        write_llm(stage, LanguageHead(VOCABULARY, lambda: head), path, weights)
    graph = OnnxGraph.load(path, BackendOptions("cpu"))
    sizes = config.layers, config.heads, config.kv_heads, config.head_dim, config.hidden
    spec = decoder_spec("llm.onnx", *sizes, vocabulary=VOCABULARY)
    spec = msgspec.structs.replace(spec, deepstack=config.deepstack)
    Decoder(graph, spec, scoring=False, axes=3)
    with pytest.raises(BundleError, match="position_ids"):
        Decoder(graph, spec, scoring=False)
    wider = msgspec.structs.replace(spec, deepstack=config.deepstack + 1)
    with pytest.raises(BundleError, match="inputs_embeds"):
        Decoder(graph, wider, scoring=False, axes=3)


def test_rows_may_stand_between_texts() -> None:
    """The text is there while any token is, whatever is pruned, and its positions are text's."""
    sequences = builder(LocalRows(newline=False, before="<<", after=">"))
    prefix = sequences.prefix(np.zeros((1, 2), np.float32))
    grid = TokenGrid(4, 5, 2, 2, 3)
    assert len(sequences.local(grid, {}, 0)) == 0
    local = sequences.local(grid, features(TileIndex(1, 0)), 0)
    assert local.embeds[:, 0].tolist() == [27, 27, 1000, 1000, 1000, 1000, 29]
    assert local.offsets.tolist() == [
        [0, 1, 2, 2, 2, 2, 7],
        [0, 1, 4, 4, 5, 5, 7],
        [0, 1, 2, 3, 2, 3, 7],
    ]
    assert local.span == sequences.span(grid) == 8
    assert sequences.count(grid) == 23
    assert np.all(np.diff(local.indices) > 0)
    assert np.flatnonzero(local.is_frame).tolist() == [0, 1, 6]
    assert np.array_equal(local.is_frame, local.is_structure)
    kept = local.take(np.union1d([3], local.structure_of(np.array([3]))))
    whole = sequences.final(prefix, kept, sequences.text(np.arange(1)))
    assert whole.positions[:, -5:].tolist() == [
        [4, 5, 6, 11, 12],
        [4, 5, 8, 11, 12],
        [4, 5, 7, 11, 12],
    ]
    assert np.sum(whole.tokens["kind"] == TokenKind.MARK) == 3


def test_text_around_rows_stays_where_tokens_do_not_fit() -> None:
    sequences = builder(LocalRows(newline=False, before="<<", after=">"))
    grid = TokenGrid(4, 4, 2, 2, 2)
    local = sequences.local(grid, features(TileIndex(0, 0), TileIndex(1, 1)), 0)
    level = Level(4, 4, 2, 2, 2)
    scores = np.linspace(0, 1, len(local), dtype=np.float32)
    places = np.arange(len(local))
    scored = LevelPass(
        0, level, grid, (), 0, local, np.zeros((1, len(local)), np.float32), scores, places, places,
        np.zeros((1, 1), np.float32),
    )  # fmt: skip
    for budget, left in ((5, 2), (4, 1), (3, 0), (0, 0)):
        result = SearchResult([scored], local, scores)
        trim(result, budget, "a limit", "timeout")
        assert len(result.final) == (left + 3 if left else 0)
        assert result.final.is_frame.sum() == (3 if left else 0)
