"""InternVL in transformers' layout, judged by transformers: tiles without marks, the view last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("transformers", reason="exporting needs the `export` extra")

import transformers
from tokenizers import AddedToken

from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.registry import read_model
from tests import transformers_parity as parity
from tests.checkpoints import edit_json
from tests.transformers_parity import QUESTION

TILE, PATCH = 56, 14
TOKENS = (TILE // PATCH // 2) ** 2
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": [TILE, TILE],
    "patch_size": [PATCH, PATCH],
    "layer_scale_init_value": 0.5,
}
#: InternVL3's tower, and that of the 6B, whose queries and keys have norms.
PLAIN = {"attention_bias": True}
LARGE = {"use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False}


def written(folder: Path, vision: dict[str, Any], *, tied: bool = True, **text: Any) -> Any:
    """A model and its checkpoint, with everything that transformers writes beside it."""
    folder.mkdir()
    made = parity.byte_level_tokenizer(folder, image="<IMG_CONTEXT>")
    more = [AddedToken(t, special=True, normalized=False) for t in ("<img>", "</img>")]
    made.add_special_tokens(more)
    made.save(str(folder / "tokenizer.json"))
    stop = made.token_to_id("<|im_end|>")
    config = transformers.InternVLConfig(
        vision_config=VISION | vision,
        text_config={**TEXT, "vocab_size": made.get_vocab_size(), "eos_token_id": stop, **text},
        image_token_id=made.token_to_id("<IMG_CONTEXT>"),
        tie_word_embeddings=tied,
    )
    model = parity.seeded(transformers.InternVLForConditionalGeneration, config)
    model.tie_weights()
    parity.saved(model, folder)
    parity.chat_template(folder, TEMPLATE)
    processor(folder)
    return model


def processor(folder: Path | None = None) -> Any:
    return parity.image_processor(
        "GotOcr2",
        folder,
        size={"height": TILE, "width": TILE},
        crop_to_patches=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def ids_of(folder: Path, views: int) -> list[int]:
    """Ids of the prompt as the processor writes it; a whole one wants torchvision."""
    shown = f"<img>{'<IMG_CONTEXT>' * TOKENS * views}</img>"
    text = f"<|im_start|>user\n{shown}\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    found: list[int] = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return found


@pytest.mark.parametrize(
    ("vision", "tied", "text"),
    [(PLAIN, True, {}), (LARGE, False, {"model_type": "llama"})],
    ids=["internvl3", "norms everywhere, llama"],
)
def test_the_whole_image_and_what_is_kept_of_it(
    tmp_path: Path, vision: dict[str, Any], tied: bool, text: dict[str, Any]
) -> None:
    folder = tmp_path / "hf"
    model = written(folder, vision, tied=tied, **text)
    parity.assert_documented(folder)
    bundle = parity.exported(folder, tmp_path / "bundle", rfm_layers=1)
    image = parity.image_file(tmp_path / "image.png", 3 * TILE, 2 * TILE)
    found = parity.asked(bundle, image, prune="none", resampling="processor")
    ids = ids_of(folder, 7)
    text_places = np.array(ids) != model.config.image_token_id
    table = model.get_input_embeddings().weight.detach().numpy()
    assert len(found.sequence) == len(ids)
    np.testing.assert_allclose(
        found.sequence.embeds[text_places], table[np.array(ids)[text_places]], atol=1e-6
    )
    pixels = processor()(Image.open(image), return_tensors="pt")
    assert len(pixels["pixel_values"]) == 7
    wanted = parity.generated(model, ids, pixel_values=pixels["pixel_values"])
    parity.assert_same(found, wanted)
    pruned = parity.asked(bundle, image, resampling="processor")
    assert len(pruned.sequence) < len(found.sequence)
    parity.assert_continued(model, pruned, open_bundle(bundle).manifest.prompt.stop_ids)


def test_an_image_of_one_tile_is_its_own_view(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    model = written(folder, PLAIN)
    bundle = parity.exported(folder, tmp_path / "bundle")
    image = parity.image_file(tmp_path / "image.png", TILE, TILE)
    found = parity.asked(bundle, image, max_tiles=0, resampling="processor")
    ids = ids_of(folder, 1)
    assert found.input_ids == parity.collapsed(ids, model.config.image_token_id)
    pixels = processor()(Image.open(image), return_tensors="pt")["pixel_values"]
    parity.assert_same(found, parity.generated(model, ids, pixel_values=pixels))


def test_what_the_folder_does_not_hold(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    written(folder, PLAIN)
    whole = read_model(find_checkpoint(str(folder)))
    for name in ("preprocessor_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    found = read_model(find_checkpoint(str(folder)))
    assert found.prompt == whole.prompt
    assert (found.vision.mean, found.vision.std) == (whole.vision.mean, whole.vision.std)
    assert len(found.notes) == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"downsample_ratio": 0.3}, "downsample_ratio"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"vision_config": VISION | PLAIN | {"image_size": [56, 28]}}, "image_size"),
        ({"vision_config": VISION}, "k_proj.bias, which the exported model would leave out"),
    ],
)
def test_what_is_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    folder = tmp_path / "hf"
    written(folder, PLAIN)
    edit_json(folder / "config.json", **values)
    with pytest.raises(ExportError, match=words):
        read_model(find_checkpoint(str(folder)))
