"""SmolVLM and Idefics3, judged by transformers: marks, newlines, the view last, pixel shuffle."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("transformers", reason="exporting needs the `export` extra")

import torch
import transformers
from tokenizers import AddedToken, Tokenizer
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.registry import read_model
from tests import transformers_parity as parity
from tests.checkpoints import edit_json
from tests.transformers_parity import QUESTION

AROUND = "<fake_token_around_image>"
#: The processor's marks go to six rows and columns.
MARKS = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
CONTROL = [AROUND, "<global-img>", "<end_of_utterance>", *MARKS]
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PROMPT = f"<|im_start|>User:<image>{QUESTION}<end_of_utterance>\nAssistant:"
TEXT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer in which two newlines are one token, with all control tokens."""
    made = parity.byte_level_tokenizer(folder)
    made.add_tokens([AddedToken("\n\n", normalized=False)])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    made.save(str(folder / "tokenizer.json"))
    return made


def written(folder: Path, kind: str, *, tile: int, patch: int, factor: int, **saving: Any) -> Any:
    """A model and its checkpoint, with everything that transformers writes beside it."""
    folder.mkdir()
    made = tokenizer(folder)
    stop = made.token_to_id("<end_of_utterance>")
    vision = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    config = getattr(transformers, f"{kind}Config")(
        vision_config={**vision, "num_attention_heads": 3, "image_size": tile, "patch_size": patch},
        text_config={**TEXT, "vocab_size": made.get_vocab_size(), "eos_token_id": stop},
        image_token_id=made.token_to_id("<image>"),
        scale_factor=factor,
        tie_word_embeddings=saving.pop("tied", False),
    )
    model = parity.seeded(getattr(transformers, f"{kind}ForConditionalGeneration"), config)
    model.tie_weights()
    parity.saved(model, folder, **saving)
    parity.chat_template(folder, TEMPLATE)
    processor(kind, tile, folder)
    return model


def processor(kind: str, tile: int, folder: Path | None = None, **settings: Any) -> Any:
    """Images are made two tiles long."""
    return parity.image_processor(
        kind,
        folder,
        size={"longest_edge": 2 * tile},
        max_image_size={"longest_edge": tile},
        **settings,
    )


def prompt(rows: int, cols: int, tokens: int) -> str:
    """The prompt as the processor writes it; a whole one wants torchvision."""
    own = SimpleNamespace(
        fake_image_token=AROUND,
        global_image_tag="<global-img>",
        image_token="<image>",
        image_seq_len=tokens,
    )
    shown = Idefics3Processor.replace_image_token(own, {"rows": [[rows]], "cols": [[cols]]}, 0)  # type: ignore[arg-type]
    return PROMPT.replace("<image>", shown)


def ids_of(folder: Path, text: str) -> list[int]:
    found: list[int] = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return found


KINDS = [
    ("SmolVLM", {"tile": 64, "patch": 8, "factor": 4}, {}),
    # Of 25 patches along a side, some have their neighbour's position; pixels are left over.
    ("Idefics3", {"tile": 102, "patch": 4, "factor": 5}, {"tied": True, "dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("kind", "sizes", "saving"), KINDS, ids=["smolvlm", "idefics3"])
def test_the_whole_image_and_what_is_kept_of_it(
    tmp_path: Path, kind: str, sizes: dict[str, int], saving: dict[str, Any]
) -> None:
    folder, tile = tmp_path / "hf", sizes["tile"]
    model = written(folder, kind, **sizes, **saving)
    parity.assert_documented(folder)
    bundle = parity.exported(folder, tmp_path / "bundle", rfm_layers=1)
    image = parity.image_file(tmp_path / "image.png", 2 * tile, 2 * tile)
    found = parity.asked(bundle, image, prune="none", resampling="processor")
    grid = sizes["tile"] // sizes["patch"] // sizes["factor"]
    ids = ids_of(folder, prompt(2, 2, grid * grid))
    image_id = model.config.image_token_id
    # Every token of text is where it is in transformers' prompt, the two newlines as one.
    text = np.array(ids) != image_id
    table = model.get_input_embeddings().weight.detach().numpy()
    assert len(found.sequence) == len(ids)
    np.testing.assert_allclose(found.sequence.values[text], table[np.array(ids)[text]], atol=1e-6)
    pixels = processor(kind, tile)(Image.open(image), return_tensors="pt")
    wanted = parity.generated(model, ids, pixel_values=pixels["pixel_values"])
    parity.assert_same(found, wanted)
    pruned = parity.asked(bundle, image, resampling="processor")
    assert len(pruned.sequence) < len(found.sequence)
    stops = open_bundle(bundle).manifest.prompt.stop_ids
    parity.assert_continued(model, pruned, stops)


def test_the_global_view_alone_is_the_prompt_of_an_image_that_is_not_split(tmp_path: Path) -> None:
    kind, sizes, _ = KINDS[0]
    folder, tile = tmp_path / "hf", sizes["tile"]
    model = written(folder, kind, **sizes)
    bundle = parity.exported(folder, tmp_path / "bundle")
    image = parity.image_file(tmp_path / "image.png", 2 * tile, tile)
    found = parity.asked(bundle, image, max_tiles=0, resampling="processor")
    ids = ids_of(folder, prompt(0, 0, 4))
    assert found.input_ids == parity.collapsed(ids, model.config.image_token_id)
    made = processor(kind, tile, do_image_splitting=False)
    pixels = made(Image.open(image), return_tensors="pt")["pixel_values"]
    parity.assert_same(found, parity.generated(model, ids, pixel_values=pixels))


def test_what_the_folder_does_not_hold(tmp_path: Path) -> None:
    kind, sizes, _ = KINDS[0]
    folder = tmp_path / "hf"
    written(folder, kind, **sizes)
    whole = read_model(find_checkpoint(str(folder)))
    for name in ("preprocessor_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    found = read_model(find_checkpoint(str(folder)))
    assert found.prompt == whole.prompt
    assert found.vision.mean == whole.vision.mean
    assert (whole.base_side, found.base_side) == (2 * sizes["tile"], 4 * sizes["tile"])
    assert len(found.notes) == 2


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("vision_config", {"model_type": "clip_vision_model"}, "vision_config.model_type"),
        ("vision_config", {"image_size": 72}, "position_embedding"),
        ("text_config", {"use_resampler": True}, "use_resampler"),
        (None, {"scale_factor": 3}, "8 patches along a tile's side cannot be joined by 3"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, part: str | None, values: dict[str, Any], words: str
) -> None:
    kind, sizes, _ = KINDS[0]
    folder = tmp_path / "hf"
    written(folder, kind, **sizes)
    (folder / "preprocessor_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    changed = values if part is None else {part: config[part] | values}
    edit_json(folder / "config.json", **changed)
    with pytest.raises(ExportError, match=words):
        read_model(find_checkpoint(str(folder)))


def test_a_processor_of_another_tile_is_refused(tmp_path: Path) -> None:
    kind, sizes, _ = KINDS[0]
    folder = tmp_path / "hf"
    written(folder, kind, **sizes)
    edit_json(folder / "preprocessor_config.json", max_image_size={"longest_edge": 32})
    with pytest.raises(ExportError, match="max_image_size"):
        read_model(find_checkpoint(str(folder)))
