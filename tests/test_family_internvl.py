"""InternVL in transformers' layout and its own, judged by transformers: the view comes last.

A checkpoint in the model's own layout is one of transformers' with the tensors named back, by the
inverse of transformers' conversion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("transformers", reason="exporting needs the `export` extra")

import torch
import transformers
from tokenizers import AddedToken

from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.registry import read_model
from tests import transformers_parity as parity
from tests.checkpoints import edit_json, write_json
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
#: InternVL3's tower and RoPE, and the tower of the 6B, whose queries and keys have norms.
PLAIN = {"attention_bias": True}
#: RoPE as InternVL3 has it: its base is another only beyond the longest sequence here.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
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


#: Names of transformers' tensors, and those that they had; the first rule that fits is taken.
_LAYER = r"(?:model\.)?vision_tower\.encoder\.layer\.(\d+)\."
_OLD = r"vision_model.encoder.layers.\1."
ORIGINAL = (
    (r"(?:model\.)?vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
    (
        r"(?:model\.)?vision_tower\.embeddings\.position_embeddings",
        "vision_model.embeddings.position_embedding",
    ),
    (
        r"(?:model\.)?vision_tower\.embeddings\.patch_embeddings\.projection\.",
        "vision_model.embeddings.patch_embedding.",
    ),
    (_LAYER + r"attention\.projection_layer\.", _OLD + "attn.proj."),
    (_LAYER + r"attention\.", _OLD + "attn."),
    (_LAYER + r"layernorm_before\.", _OLD + "norm1."),
    (_LAYER + r"layernorm_after\.", _OLD + "norm2."),
    (_LAYER + r"lambda_(\d)", _OLD + r"ls\2"),
    (_LAYER, _OLD),
    (r"(?:model\.)?multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"(?:model\.)?language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)


def written_originally(folder: Path, converted: Path) -> None:
    """A checkpoint of transformers in the layout that the model came in.

    Args:
        folder: Made anew; holds no chat template, as the folders that were published.
        converted: The checkpoint.
    """
    folder.mkdir()
    tensors = load_file(converted / "model.safetensors")
    tensors = {parity.renamed(name, ORIGINAL): values for name, values in tensors.items()}
    for name in [name for name in tensors if ".attn.q_proj." in name]:
        parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        tensors[name.replace("q_proj", "qkv")] = torch.cat(parts)
    save_file(tensors, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((converted / name).read_bytes())
    # What folders of InternVL3 have, made by CLIP's class.
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": TILE,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "size": TILE,
        },
    )
    new = json.loads((converted / "config.json").read_text())
    text, vision = new["text_config"], new["vision_config"]
    llm = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[text["model_type"]]
    rope = text.pop("rope_parameters")
    kept = ("num_channels", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act")
    write_json(
        folder / "config.json",
        {
            "architectures": ["InternVLChatModel"],
            "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
            "model_type": "internvl_chat",
            "downsample_ratio": 0.5,
            "dynamic_image_size": True,
            "force_image_size": TILE,
            "pad2square": False,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internvl2_5",
            "tie_word_embeddings": new["tie_word_embeddings"],
            "use_backbone_lora": 0,
            "use_llm_lora": 0,
            "use_thumbnail": True,
            "llm_config": {
                **text,
                "architectures": [llm],
                "moe_config": None,
                # As in the base model: no answer of a conversation ends so.
                "eos_token_id": 0,
                "rope_theta": rope["rope_theta"],
                "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            },
            "vision_config": {
                **{name: vision[name] for name in (*kept, "num_hidden_layers")},
                "architectures": ["InternVisionModel"],
                "model_type": "intern_vit_6b",
                "image_size": TILE,
                "patch_size": PATCH,
                "norm_type": vision["norm_type"],
                "layer_norm_eps": vision["layer_norm_eps"],
                "qk_normalization": vision["use_qk_norm"],
                "qkv_bias": vision["attention_bias"],
                "drop_path_rate": 0.1,
                "num_experts": 8,
                "use_moe": False,
            },
        },
    )


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
    [
        (PLAIN, True, {}),
        (LARGE, False, {"model_type": "llama"}),
        (PLAIN, False, {"model_type": "qwen3", "head_dim": 32}),
        (PLAIN, False, {"rope_parameters": DYNAMIC}),
    ],
    ids=["internvl3", "norms everywhere, llama", "internvl3.5", "rope that grows later"],
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
        found.sequence.values[text_places], table[np.array(ids)[text_places]], atol=1e-6
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


@pytest.mark.parametrize(
    ("vision", "tied", "text"),
    [
        (PLAIN, False, {"rope_parameters": DYNAMIC}),
        (PLAIN, True, {"model_type": "qwen3", "head_dim": 32}),
        (LARGE | {"use_mean_pooling": True, "attention_bias": False}, False, {}),
    ],
    ids=["internvl3", "internvl3.5, tied", "norms of InternViT-6B"],
)
def test_its_own_layout_is_the_same_bundle(
    tmp_path: Path, vision: dict[str, Any], tied: bool, text: dict[str, Any]
) -> None:
    written(tmp_path / "hf", vision, tied=tied, **text)
    written_originally(tmp_path / "own", tmp_path / "hf")
    parity.assert_documented(tmp_path / "own")
    bundles = {
        name: parity.exported(tmp_path / name, tmp_path / f"{name}.bundle", rfm_layers=1)
        for name in ("hf", "own")
    }
    ours, theirs = (open_bundle(bundles[name]).manifest for name in ("own", "hf"))
    assert ours.prompt == theirs.prompt
    assert (ours.vision, ours.llm, ours.limits) == (theirs.vision, theirs.llm, theirs.limits)
    image = parity.image_file(tmp_path / "image.png", 3 * TILE, 2 * TILE)
    for options in ({"prune": "none"}, {}):
        found, wanted = (parity.asked(bundles[name], image, **options) for name in ("own", "hf"))
        np.testing.assert_array_equal(found.logits, wanted.logits)
        assert (found.ids, found.input_ids) == (wanted.ids, wanted.input_ids)


def test_its_own_layout_ends_an_answer_with_the_turn(tmp_path: Path) -> None:
    written(tmp_path / "hf", PLAIN)
    written_originally(tmp_path / "own", tmp_path / "hf")
    write_json(tmp_path / "own" / "generation_config.json", {"eos_token_id": [0, 1]})
    found = read_model(find_checkpoint(str(tmp_path / "own")))
    assert (
        found.prompt.stop_ids == read_model(find_checkpoint(str(tmp_path / "hf"))).prompt.stop_ids
    )
    assert found.notes == ()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"llm_config": {"architectures": ["InternLM2ForCausalLM"]}}, "InternLM2.*ending in -hf"),
        ({"llm_config": {"architectures": ["InternLM3ForCausalLM"]}}, "InternLM3.*ending in -hf"),
        ({"llm_config": {"architectures": ["GptOssForCausalLM"]}}, "GptOss.*mixtures of experts"),
        ({"llm_config": {"architectures": ["Qwen3MoeForCausalLM"]}}, "Qwen3Moe.*mixtures of"),
        ({"llm_config": {"architectures": ["Gemma2ForCausalLM"]}}, "Gemma2.*Taken are those with"),
        ({"llm_config": {}}, "None.*Qwen2ForCausalLM"),
        ({"llm_config": None}, "llm_config"),
        ({"vision_config": None}, "vision_config"),
        ({"template": "Hermes-2"}, "template"),
        ({"ps_version": "v1"}, "ps_version"),
        ({"ps_version": None}, "ps_version"),
        ({"force_image_size": 448}, "force_image_size"),
        ({"select_layer": 99}, "vision_feature_layer"),
        ({"use_llm_lora": 16}, "use_llm_lora"),
    ],
)
def test_what_is_refused_of_its_own_layout(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    written(tmp_path / "hf", PLAIN)
    written_originally(tmp_path / "own", tmp_path / "hf")
    edit_json(tmp_path / "own" / "config.json", **values)
    with pytest.raises(ExportError, match=words):
        read_model(find_checkpoint(str(tmp_path / "own")))


def test_a_tower_of_another_width_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "hf", PLAIN)
    written_originally(tmp_path / "own", tmp_path / "hf")
    path = tmp_path / "own" / "config.json"
    config = json.loads(path.read_text())
    edit_json(path, vision_config=config["vision_config"] | {"hidden_size": 96})
    with pytest.raises(ExportError, match="queries, keys and values of a tower that is 96 wide"):
        read_model(find_checkpoint(str(tmp_path / "own")))
