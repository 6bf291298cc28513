"""Exported golden checkpoints against the arrays of the authors' code."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.golden_data import ROOT, checkpoint, load_run, run_names

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.bundle.layout import GlobalView, LocalRows
from lrs_edge.bundle.manifest import Flavour, Manifest
from lrs_edge_export.bundle.tokenizer_json import from_byte_level
from lrs_edge_export.graphs.sessions import DecoderSession, open_session

VARIANTS = ("qwen", "llama")
IMAGE_TOKEN = -200

Bundles = dict[str, Path]


@pytest.fixture(params=VARIANTS)
def bundle(request: pytest.FixtureRequest, golden_bundles: Bundles) -> tuple[str, Path, Manifest]:
    variant = request.param
    if variant not in golden_bundles:
        pytest.skip(f"the golden checkpoint of {variant} is not here")
    return variant, golden_bundles[variant], open_bundle(golden_bundles[variant]).manifest


def first_run(variant: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    run = load_run(f"{variant}_img_300x200_q0")
    return run.arrays, run.info


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def checkpoint_of(bundle: Path) -> Path:
    source = checkpoint(bundle.name)
    assert source is not None
    return source


def test_vision_tokens(bundle: tuple[str, Path, Manifest]) -> None:
    variant, path, manifest = bundle
    stage = ROOT / "image_stage" / "img_300x200.npz"
    if not stage.is_file():
        pytest.skip("the golden image stage is not here")
    with np.load(stage) as data:
        tile = data["global_tile_full"]
    arrays, _ = first_run(variant)
    tokens = open_session(path / manifest.vision.path(Flavour.PLAIN)).run(
        ["tokens"], {"pixel_values": tile[None]}
    )
    assert relative(tokens[0][0, ::32], arrays["proj_global_rows32"]) < 1e-4
    # 300 x 200 has one base tile, and it is the global view.
    pooled = tokens[0].reshape(12, 2, 12, 2, -1).mean((1, 3)).reshape(144, -1)
    assert relative(pooled[::24], arrays["proj_base_pooled_rows24"][0]) < 1e-4


@pytest.mark.parametrize("flavour", ["gqa", "masked"])
def test_rfm_logits(bundle: tuple[str, Path, Manifest], flavour: str) -> None:
    variant, path, manifest = bundle
    arrays, info = first_run(variant)
    embeds = arrays["seq1_embeds_full"]
    bias, graph = None, manifest.rfm.path(Flavour.GQA)
    if flavour == "masked":
        graph = manifest.rfm.path(Flavour.MASKED)
        bias = np.triu(np.full((len(embeds),) * 2, -3e4, np.float32), 1)
    logits = DecoderSession(path / graph, capacity=len(embeds) + 5).run(embeds, bias=bias)
    local = logits[:, info["rfm1_local_begin"] : info["rfm1_local_end"]]
    assert relative(local, arrays["rfm1_logits_heads"]) < 1e-4


def test_llm_logits(bundle: tuple[str, Path, Manifest]) -> None:
    variant, path, manifest = bundle
    arrays, _ = first_run(variant)
    embeds = arrays["final_embeds_full"]
    logits = DecoderSession(path / manifest.llm.path(Flavour.GQA), capacity=len(embeds)).run(embeds)
    assert relative(logits[0], arrays["prefill_last_logits"]) < 1e-4
    assert manifest.llm.vocabulary == arrays["step_logits"].shape[1]


def check_input_ids(name: str, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Prompt ids made with nothing but the manifest and the `tokenizers` library."""
    run, spec = load_run(name), manifest.prompt
    question = run.info["question"]
    *bos, text, view, separator, rows, asked = spec.parts
    assert (view, rows) == (GlobalView(), LocalRows())
    assert asked.newline
    question += "\n" + run.info["end_str"]
    before = tokenizer.encode(text.text, add_special_tokens=False).ids
    suffix = asked.text.replace("{question}", question)
    after = tokenizer.encode(suffix, add_special_tokens=False).ids
    first = [token for part in bos for token in part.ids]
    assert [*first, *before, IMAGE_TOKEN, *after] == run.arrays["input_ids"].tolist()
    assert text.text + "<image>" + suffix == run.info["prompt"]
    assert separator.ids == (run.info["sep_token_id"],)
    assert tokenizer.get_vocab_size() == run.info["tokenizer_len"]


def test_input_ids_of_every_run(bundle: tuple[str, Path, Manifest]) -> None:
    variant, path, manifest = bundle
    tokenizer = Tokenizer.from_file(str(path / manifest.tokenizer))
    names = [name for name in run_names() if name.startswith(variant)]
    assert names
    for name in names:
        check_input_ids(name, manifest, tokenizer)


def test_generated_ids_become_the_same_text(bundle: tuple[str, Path, Manifest]) -> None:
    variant, path, manifest = bundle
    tokenizer = Tokenizer.from_file(str(path / manifest.tokenizer))
    for run in (load_run(name) for name in run_names() if name.startswith(variant)):
        text = tokenizer.decode(run.arrays["new_ids"].tolist(), skip_special_tokens=True)
        # Random weights give bytes that are not text; what stands for those differs by library.
        if "\ufffd" not in text:
            assert text.strip() == run.info["text"].strip()


def test_qwen_tokenizer_from_its_parts(golden_bundles: Bundles, tmp_path: Path) -> None:
    if "qwen" not in golden_bundles:
        pytest.skip("the golden checkpoint of qwen is not here")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(checkpoint_of(golden_bundles["qwen"]) / name, tmp_path)
    manifest = open_bundle(golden_bundles["qwen"]).manifest
    tokenizer = from_byte_level(tmp_path).tokenizer
    for name in (name for name in run_names() if name.startswith("qwen")):
        check_input_ids(name, manifest, tokenizer)


def test_stop_ids_and_limits(bundle: tuple[str, Path, Manifest]) -> None:
    variant, _, manifest = bundle
    stops, longest = {"qwen": ((1502, 1500), 8192), "llama": ((2,), 2048)}[variant]
    assert manifest.prompt.stop_ids == stops
    assert manifest.limits.max_length == longest
    assert manifest.search.base_side == 1008
    assert (manifest.vision.tile, manifest.vision.grid, manifest.vision.local_pool) == (336, 24, 2)
