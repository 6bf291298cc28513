"""LLaVA-1.5 in the layouts of transformers 4 and 5, judged by transformers itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("transformers", reason="exporting needs the `export` extra")

import torch
import transformers
from safetensors.torch import load_file, save_file

from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.commands.main import run
from lrs_edge.errors import ExportError
from lrs_edge_export.bundle.writer import export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.registry import read_model
from tests import transformers_parity as parity
from tests.checkpoints import edit_json, write_json
from tests.transformers_parity import QUESTION, V4_LLAVA

TILE, PATCH = 56, 14
TOKENS = (TILE // PATCH) ** 2
#: Rows of the vocabulary, more than the tokenizer has tokens.
ROWS = 384

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": TILE,
    "patch_size": PATCH,
    "projection_dim": 16,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": ROWS,
    "max_position_embeddings": 512,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
SLOW = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


def llava(
    image_id: int, text: dict[str, Any] | None = None, side: int = TILE, **config: Any
) -> Any:
    described = transformers.LlavaConfig(
        vision_config=VISION | {"image_size": side},
        text_config=TEXT | (text or {}),
        image_token_index=image_id,
        **config,
    )
    return parity.seeded(transformers.LlavaForConditionalGeneration, described)


def written(
    folder: Path, *, scheme: str = "first", side: int = TILE, **saving: Any
) -> tuple[Any, Path]:
    """A model and its checkpoint, with everything that transformers writes beside it."""
    folder.mkdir()
    image_id = parity.llama_tokenizer(folder, scheme=scheme).token_to_id("<image>")
    text = saving.pop("text", None)
    model = llava(image_id, text, side)
    parity.saved(model, folder, **saving)
    size = {"height": side, "width": side}
    parity.image_processor("Clip", folder, size={"shortest_edge": side}, crop_size=size)
    return model, folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity.image_file(tmp_path_factory.mktemp("image") / "image.png", TILE, TILE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("checkpoint") / "hf")[1]


def pixels_of(folder: Path, image: Path) -> torch.Tensor:
    """What transformers' processor makes of an image."""
    module = transformers.models.clip.image_processing_pil_clip
    processor = module.CLIPImageProcessorPil.from_pretrained(folder)
    found: torch.Tensor = processor(Image.open(image), return_tensors="pt")["pixel_values"]
    return found


@pytest.mark.parametrize(
    ("scheme", "saving"),
    [
        ("first", {}),
        ("always", {"names": V4_LLAVA, "dtype": torch.bfloat16, "shards": "60KB"}),
        ("first", {"text": {"tie_word_embeddings": True, "head_dim": 32}}),
        ("first", {"text": {"head_dim": 8, "num_key_value_heads": 4, "rope_parameters": YARN}}),
        ("first", {"text": {"head_dim": 20, "num_key_value_heads": 1, "rope_parameters": SLOW}}),
    ],
    ids=[
        "transformers 5",
        "transformers 4, sharded, bf16",
        "tied, wide heads",
        "heads of half of sixteen, yarn",
        "heads that buffers fill up, linear",
    ],
)
def test_the_whole_image(tmp_path: Path, image: Path, scheme: str, saving: dict[str, Any]) -> None:
    model, folder = written(tmp_path / "hf", scheme=scheme, **saving)
    bundle = parity.exported(folder, tmp_path / "bundle")
    found = parity.asked(bundle, image, max_tiles=0)
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
    ids = parity.prompt_ids(folder, prompt, TOKENS)
    image_id = model.config.image_token_id
    assert found.input_ids == parity.collapsed(ids, image_id)
    parity.assert_same(found, parity.generated(model, ids, pixel_values=pixels_of(folder, image)))


def test_pixels_beyond_the_last_patch(tmp_path: Path) -> None:
    model, folder = written(tmp_path / "hf", side=60)
    image = parity.image_file(tmp_path / "image.png", 60, 60)
    found = parity.asked(parity.exported(folder, tmp_path / "bundle"), image, max_tiles=0)
    ids = parity.prompt_ids(folder, f"USER: <image>\n{QUESTION} ASSISTANT:", TOKENS)
    parity.assert_same(found, parity.generated(model, ids, pixel_values=pixels_of(folder, image)))


@pytest.mark.parametrize(
    ("layers", "tower"),
    [
        ([-1, 0, -3], {}),
        ([-3, -2], {"model_type": "siglip_vision_model", "vision_use_head": False}),
    ],
    ids=["clip", "siglip"],
)
def test_several_hidden_states_side_by_side(
    tmp_path: Path, image: Path, layers: list[int], tower: dict[str, Any]
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    image_id = parity.llama_tokenizer(folder).token_to_id("<image>")
    config = transformers.LlavaConfig(
        vision_config=VISION | tower,
        text_config=TEXT,
        image_token_index=image_id,
        vision_feature_layer=layers,
        vision_feature_select_strategy="full" if tower else "default",
    )
    model = parity.seeded(transformers.LlavaForConditionalGeneration, config)
    parity.saved(model, folder)
    size = {"height": TILE, "width": TILE}
    parity.image_processor("Clip", folder, size={"shortest_edge": TILE}, crop_size=size)
    # With export's own check, which runs the tower layer by layer.
    export_bundle(str(folder), tmp_path / "bundle")
    found = parity.asked(tmp_path / "bundle", image, max_tiles=0)
    ids = parity.prompt_ids(folder, f"USER: <image>\n{QUESTION} ASSISTANT:", TOKENS)
    parity.assert_same(found, parity.generated(model, ids, pixel_values=pixels_of(folder, image)))
    with pytest.raises(ExportError, match="--vision-attention"):
        parity.exported(folder, tmp_path / "other", vision_attention=True)


def test_a_folder_with_nothing_beside_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = written(tmp_path / "hf")
    (folder / "preprocessor_config.json").unlink()
    (folder / "generation_config.json").unlink()
    assert run(["export", str(folder), "-o", str(tmp_path / "bundle"), "--no-parity"]) == 0
    told = capsys.readouterr().err
    assert "no chat template" in told
    assert "no preprocessor_config.json" in told
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.vision.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert manifest.prompt.stop_ids == (2,)
    parity.assert_documented(folder)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_model_without_tokenizer_json(
    tmp_path: Path, image: Path, legacy: bool
) -> None:
    _, folder = written(tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    image_id = parity.sentencepiece_tokenizer(folder, legacy=legacy)
    model = llava(image_id)
    parity.saved(model, folder)
    bundle = parity.exported(folder, tmp_path / "bundle")
    found = parity.asked(bundle, image, max_tiles=0)
    ids = parity.prompt_ids(folder, f"USER: <image>\n{QUESTION} ASSISTANT:", TOKENS)
    assert found.input_ids == parity.collapsed(ids, image_id)
    parity.assert_same(found, parity.generated(model, ids, pixel_values=pixels_of(folder, image)))


def test_siglip_qwen2_and_what_transformers_5_writes_of_a_processor(
    tmp_path: Path, image: Path
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    config = transformers.LlavaConfig(
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=TEXT | {"model_type": "qwen2", "eos_token_id": 258},
        image_token_index=parity.byte_level_tokenizer(folder).token_to_id("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = parity.seeded(transformers.LlavaForConditionalGeneration, config)
    parity.saved(model, folder)
    size = {"height": TILE, "width": TILE}
    made = parity.image_processor(
        "Clip", folder, size=size, crop_size=size, image_mean=[0.4] * 3, image_std=[0.3] * 3
    )
    path = folder / "preprocessor_config.json"
    write_json(folder / "processor_config.json", {"image_processor": json.loads(path.read_text())})
    path.unlink()
    bundle = parity.exported(folder, tmp_path / "bundle")
    found = parity.asked(bundle, image, max_tiles=0)
    prompt = f"<|im_start|>user <image>\n{QUESTION}<|im_end|><|im_start|>assistant\n"
    ids = parity.prompt_ids(folder, prompt, TOKENS)
    pixels = made(Image.open(image), return_tensors="pt")["pixel_values"]
    parity.assert_same(found, parity.generated(model, ids, pixel_values=pixels))


def test_a_repetition_penalty_counts_the_prompt(tmp_path: Path, image: Path) -> None:
    model, folder = written(tmp_path / "hf")
    edit_json(folder / "generation_config.json", repetition_penalty=1.5)
    model.generation_config.repetition_penalty = 1.5
    bundle = parity.exported(folder, tmp_path / "bundle")
    found = parity.asked(bundle, image, max_tiles=0)
    ids = parity.prompt_ids(folder, f"USER: <image>\n{QUESTION} ASSISTANT:", TOKENS)
    wanted = parity.generated(model, ids, pixel_values=pixels_of(folder, image))
    parity.assert_same(found, wanted)
    model.generation_config.repetition_penalty = 1.0
    plain = parity.generated(model, ids, pixel_values=pixels_of(folder, image))
    assert plain.ids != wanted.ids


def test_its_own_chat_template(tmp_path: Path, image: Path) -> None:
    model, folder = written(tmp_path / "hf")
    parity.chat_template(
        folder,
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {% for c in m.content %}"
        "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %} [/{{ messages[0].role }}]{% endif %}",
    )
    bundle = parity.exported(folder, tmp_path / "bundle")
    found = parity.asked(bundle, image, max_tiles=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = f"<s>[user] {'<image>' * TOKENS}\n{QUESTION} [/user]"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert found.input_ids == parity.collapsed(ids, model.config.image_token_id)
    parity.assert_same(found, parity.generated(model, ids, pixel_values=pixels_of(folder, image)))


def test_tiles_are_further_images_and_pruning_keeps_what_it_keeps(tmp_path: Path) -> None:
    model, folder = written(tmp_path / "hf")
    bundle = parity.exported(folder, tmp_path / "bundle", rfm_layers=1)
    wide = parity.image_file(tmp_path / "wide.png", 2 * TILE, 2 * TILE, seed=1)
    found = parity.asked(bundle, wide, prune="none")
    assert found.input_ids.count(-200) == 1
    whole = np.asarray(Image.open(wide), np.float32) / 255
    view = whole.reshape(TILE, 2, TILE, 2, 3).mean((1, 3))
    tiles = whole.reshape(2, TILE, 2, TILE, 3).transpose(0, 2, 1, 3, 4).reshape(4, TILE, TILE, 3)
    spec = open_bundle(bundle).manifest.vision
    pixels = (np.concatenate([view[None], tiles]) - spec.mean) / np.array(spec.std)
    shown = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
    images = "\n".join(["<image>" * TOKENS] * 5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"USER: {images}\n{QUESTION} ASSISTANT:")["input_ids"]
    parity.assert_same(found, parity.generated(model, ids, pixel_values=shown))
    pruned = parity.asked(bundle, wide)
    assert len(pruned.sequence) < len(found.sequence)
    parity.assert_continued(model, pruned, stops=(2,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_feature_select_strategy": "full"}, ("select_strategy", "default")),
        ({"vision_config": VISION | {"patch_size": 28}}, ("patch_embedding",)),
        ({"vision_feature_layer": [-2, -9]}, ("vision_feature_layer", "-4..3")),
        ({"projector_hidden_act": "tanh"}, ("projector_hidden_act",)),
        ({"multimodal_projector_bias": False}, ("projector", "0.bias")),
        ({"text_config": {"model_type": "gemma"}}, ("text_config.model_type", "llama")),
        ({"vision_config": {"model_type": "pixtral"}}, ("vision_config.model_type", "clip")),
        ({"text_config": TEXT | {"hidden_size": 68}}, ("head_dim",)),
    ],
)
def test_what_is_not_taken(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint, folder)
    edit_json(folder / "config.json", **change)
    with pytest.raises(ExportError) as error:
        read_model(find_checkpoint(str(folder)))
    for word in words:
        assert word in str(error.value)


def test_an_image_processor_of_another_size(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint, folder)
    edit_json(folder / "preprocessor_config.json", crop_size={"height": 84, "width": 84})
    with pytest.raises(ExportError, match=r"crop_size.*56"):
        read_model(find_checkpoint(str(folder)))


@pytest.mark.parametrize(("number", "name"), [(1, "lanczos"), (2, "bilinear"), (None, "bicubic")])
def test_the_filter_that_images_are_resized_by(
    checkpoint: Path, tmp_path: Path, number: int | None, name: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint, folder)
    edit_json(folder / "preprocessor_config.json", resample=number)
    assert read_model(find_checkpoint(str(folder))).vision.filter == name
    edit_json(folder / "preprocessor_config.json", resample=0)
    with pytest.raises(ExportError, match="resample"):
        read_model(find_checkpoint(str(folder)))


def test_weights_that_nothing_reads(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"adapter.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ExportError, match=r"adapter\.weight"):
        read_model(find_checkpoint(str(folder)))


def test_a_tower_from_elsewhere(checkpoint: Path) -> None:
    with pytest.raises(ExportError, match="holds its own tower"):
        read_model(find_checkpoint(str(checkpoint)), "openai/clip-vit-large-patch14-336")
