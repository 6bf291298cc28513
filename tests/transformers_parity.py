"""What transformers makes of a checkpoint, beside what the exported bundle makes of it.

A family's test needs a tiny checkpoint, one image, and these lines:

    folder = saved(model, tmp_path / "hf")             # or saved(..., names=V4_LLAVA, shards="1MB")
    llama_tokenizer(folder)                            # or byte_level_tokenizer(folder)
    bundle = exported(folder, tmp_path / "bundle")     # fp32; rfm_layers=1 for an RFM
    found = asked(bundle, image, QUESTION, max_tiles=0)           # the runtime, through `ask`
    ids = prompt_ids(folder, prompt, image_tokens=16)             # transformers' tokenizer
    wanted = generated(model, ids, pixel_values=pixels)           # transformers' model
    assert_same(found, wanted)                         # first logits within 1e-3, greedy ids equal

`assert_documented(folder)` compares the layout with the family's section of docs/families.md.
`assert_continued(model, found)` is for pruned sequences: transformers' language model is given the
very embeddings and positions that the runtime gave to its own. `asked` also returns the prompt's
ids (-200 for the image) and the answer. Whole processors of transformers want torchvision, which is
not there: `image_processor` loads the class that works on PIL images.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

import lrs_edge
from lrs_edge.answer.answer import Answer
from lrs_edge.answer.trace import Trace
from lrs_edge.bundle.layout import (
    GlobalView,
    LocalRows,
    LocalTiles,
    Objects,
    Part,
    Separator,
    Text,
    TokenIds,
)
from lrs_edge.language.sequence import TokenSequence
from lrs_edge_export.bundle.options import ExportOptions
from lrs_edge_export.bundle.writer import export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import read_model
from tests.checkpoints import byte_tokenizer, write_json

torch = pytest.importorskip("torch", reason="exporting needs the `export` extra")
transformers = pytest.importorskip("transformers", reason="exporting needs the `export` extra")
transformers.logging.set_verbosity_error()

QUESTION = "What is there?"
STEPS = 6

#: Names of tensors as transformers 4 wrote a LLaVA model: expressions and what takes their place.
V4_LLAVA = (
    (r"model\.language_model\.|language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"model\.(multi_modal_projector|image_newline)", r"\1"),
)


@dataclass(frozen=True)
class Run:
    """Logits float32 [V] of the first step, and greedy ids, a stop token included."""

    logits: np.ndarray
    ids: list[int]


@dataclass(frozen=True)
class Asked(Run):
    """The runtime's run: its answer, the sequence it was given, and the prompt's ids."""

    answer: Answer
    sequence: TokenSequence
    input_ids: list[int]

    @property
    def positions(self) -> np.ndarray:
        """Positions int64 [1, L] of the prompt's tokens, [k, 1, L] where they have k each."""
        found = self.sequence.positions
        return found if len(found) == 1 else found[:, None]


def seeded(make: Any, config: Any, seed: int = 0) -> Any:
    """A model with random weights, in whose attention and logits something is to be seen."""
    torch.manual_seed(seed)
    model = make(config).eval().float()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.dim() > 1 and "norm" not in name:
                values.normal_(std=1.2 / values[0].numel() ** 0.5)
            elif name.endswith("bias"):
                values.normal_(std=0.1)
            else:
                values.add_(torch.randn_like(values) * 0.1)
    return model


def saved(
    model: Any,
    folder: Path,
    *,
    dtype: Any = None,
    names: Sequence[tuple[str, str]] = (),
    shards: str | None = None,
) -> Path:
    """Save a model as transformers does.

    Args:
        model: Its weights are rounded in place where `dtype` says so.
        folder: Made anew.
        dtype: Stored type.
        names: Expressions for names of tensors and what takes their place, for older layouts.
        shards: Largest file, such as `100KB`.
    """
    stored = model
    if dtype is not None:
        # Weights are rounded; the table of RoPE's frequencies, which nobody stores, is not.
        with torch.no_grad():
            for values in model.parameters():
                values.copy_(values.to(dtype).float())
        stored = copy.deepcopy(model).to(dtype)
    options = {} if shards is None else {"max_shard_size": shards}
    stored.save_pretrained(folder, **options)
    for path in folder.glob("*.safetensors") if names else ():
        save_file({renamed(k, names): v for k, v in load_file(path).items()}, path)
    index = folder / "model.safetensors.index.json"
    if names and index.is_file():
        content = json.loads(index.read_text())
        places = content["weight_map"].items()
        content["weight_map"] = {renamed(name, names): file for name, file in places}
        write_json(index, content)
    return folder


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """A tensor's name by the first rule that fits its start."""
    for pattern, text in rules:
        if re.match(pattern, name):
            return re.sub(pattern, text, name, count=1)
    return name


def llama_tokenizer(folder: Path, *, scheme: str = "first", image: str = "<image>") -> Tokenizer:
    """LLaMA's kind of tokenizer: bytes, a few pieces, the image's token last.

    Args:
        folder: Gets tokenizer.json and tokenizer_config.json.
        scheme: Where a space is put: before the `first` piece of text, or `always` behind a
            control token, too (`legacy`).
        image: The image's token.
    """
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [*map(chr, range(33, 127)), "▁"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "i"), ("▁i", "s"), ("▁", "A")]
    for piece in (*pieces, *letters, *("".join(pair) for pair in merges)):
        vocabulary.setdefault(piece, len(vocabulary))
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    control = ("<unk>", "<s>", "</s>", image)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": scheme == "always", **named}
    write_json(folder / "tokenizer_config.json", settings | {"add_bos_token": True})
    return tokenizer


def sentencepiece_tokenizer(folder: Path, *, legacy: bool, image: str = "<image>") -> int:
    """LLaMA's tokenizer as a SentencePiece model alone; returns the id of the image's token."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the `export` extra")
    text = ["USER: What is there on this image? ASSISTANT: A ship and a harbour, I think."] * 9
    with (folder / "tokenizer.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=stream,
            model_type="bpe",
            vocab_size=320,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    place = int(processor.get_piece_size())
    token = {"content": image, "special": True, "normalized": False}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "added_tokens_decoder": {str(place): token},
    }
    write_json(folder / "tokenizer_config.json", settings)
    return place


def byte_level_tokenizer(folder: Path, *, image: str = "<image>") -> Tokenizer:
    """Qwen2's kind of tokenizer: 256 bytes, three control tokens, the image's token last."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(image, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    )
    return tokenizer


def chat_template(folder: Path, template: str) -> None:
    """Give a checkpoint a chat template, in the file that transformers 5 writes."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def image_file(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A random image as a PNG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def image_processor(kind: str, folder: Path | None = None, **settings: Any) -> Any:
    """An image processor that works on PIL images.

    Args:
        kind: Name of the class without `ImageProcessorPil`, such as `LlavaNext`.
        folder: Gets its preprocessor_config.json.
        **settings: Of the processor.
    """
    module = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", kind).lower()
    place = f"transformers.models.{module}.image_processing_pil_{module}"
    found = vars(__import__(place, fromlist=["_"])).items()
    make = next(v for k, v in found if k.lower() == f"{kind}ImageProcessorPil".lower())
    made = make(**settings)
    if folder is not None:
        made.save_pretrained(folder)
    return made


def exported(folder: Path, target: Path, **options: Any) -> Path:
    """Export at fp32, without export's own parity check. Notes are dropped."""
    export_bundle(str(folder), target, ExportOptions(parity=False, **options))
    return target


def asked(bundle: Path, image: Path, question: str = QUESTION, **options: Any) -> Asked:
    """Ask the exported bundle, greedily, `STEPS` tokens."""
    seen: dict[str, Any] = {}

    class Kept(Trace):
        """Keeps what a trace holds only sums of."""

        def add_final(self, sequence: TokenSequence) -> None:
            seen["sequence"] = sequence

        def write(self, _: Path) -> None:
            seen.update(self.arrays)

    with pytest.MonkeyPatch.context() as patch, lrs_edge.load(bundle) as engine:
        patch.setattr("lrs_edge.scene.Trace", Kept)
        with engine.open(image) as scene:
            options = {"max_tokens": STEPS, "trace": bundle.parent / "trace.npz", **options}
            answer = scene.ask(question, **options)
    ids = seen["new_ids"].tolist()
    if answer.finish_reason == "stop":
        # The runtime ends with a stop token and does not count it.
        ids.append(int(seen["step_logits"][len(ids)].argmax()))
    return Asked(
        logits=seen["prefill_last_logits"],
        ids=ids,
        answer=answer,
        sequence=seen["sequence"],
        input_ids=seen["input_ids"].tolist(),
    )


def prompt_ids(folder: Path, prompt: str, image_tokens: int, image: str = "<image>") -> list[int]:
    """Ids of a whole prompt as transformers tokenises it, the image's token repeated."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: list[int] = tokenizer(prompt.replace(image, image * image_tokens))["input_ids"]
    return found


def collapsed(ids: Sequence[int], image_id: int) -> list[int]:
    """A prompt's ids with -200 for every run of image tokens, as a trace has them."""
    found: list[int] = []
    for token in ids:
        shown = -200 if token == image_id else token
        if shown != -200 or found[-1:] != [-200]:
            found.append(shown)
    return found


def generated(model: Any, ids: Sequence[int], **inputs: Any) -> Run:
    """What transformers generates for a prompt, greedily, `STEPS` tokens.

    Args:
        model: At fp32.
        ids: Of the prompt, with the image's tokens.
        **inputs: Such as pixel_values.
    """
    prompt = torch.tensor([list(ids)])
    mask = torch.ones_like(prompt)
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompt,
            attention_mask=mask,
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return Run(out.logits[0][0].float().numpy(), out.sequences[0, len(ids) :].tolist())


def continued(model: Any, found: Asked, stops: Mapping[int, Any] | Sequence[int] = ()) -> Run:
    """What transformers' language model makes of the sequence that the runtime's was given.

    Args:
        model: At fp32.
        found: The runtime's run; positions are taken as they are, gaps included.
        stops: Ids that end an answer.
    """
    table, ids, cache, first = model.get_input_embeddings(), [], None, None
    embeds = torch.from_numpy(found.sequence.values)[None]
    positions = torch.from_numpy(found.positions)
    more = _added_later(embeds[..., table.embedding_dim :], table.embedding_dim)
    embeds = embeds[..., : table.embedding_dim]
    # SmolVLM's model calls its language model by another name.
    inner = getattr(model.model, "language_model", None) or model.model.text_model
    with torch.inference_mode():
        for _ in range(STEPS):
            out = inner(
                inputs_embeds=embeds,
                position_ids=positions,
                cache=cache,
                use_cache=True,
                **more,
            )
            more = {}
            cache = out.past_key_values
            logits = model.lm_head(out.last_hidden_state[0, -1]).float()
            first = logits.numpy() if first is None else first
            ids.append(int(logits.argmax()))
            if ids[-1] in stops:
                break
            embeds = table(torch.tensor([[ids[-1]]]))
            positions = positions[..., -1:] + 1
    assert first is not None
    return Run(first, ids)


def _added_later(extra: Any, width: int) -> dict[str, Any]:
    """What Qwen3-VL's first layers add, of values [1, L, n * width] that tokens bring for it."""
    if not extra.shape[-1]:
        return {}
    shown = (extra != 0).any(-1)
    parts = extra[shown].split(width, dim=-1)
    return {"visual_pos_masks": shown, "deepstack_visual_embeds": list(parts)}


def assert_same(found: Run, wanted: Run, limit: float = 1e-3) -> None:
    """First logits within a limit, relative to their largest where that is above 1; equal ids."""
    assert found.logits.shape == wanted.logits.shape
    scale = max(1.0, float(np.abs(wanted.logits).max()))
    assert np.abs(found.logits - wanted.logits).max() <= limit * scale
    assert found.ids == wanted.ids


def assert_continued(model: Any, found: Asked, stops: Sequence[int] = ()) -> None:
    """A pruned sequence: transformers goes on from its embeddings and positions as we did."""
    assert_same(found, continued(model, found, stops))


def layout_line(model: Model) -> str:
    """A layout in words, as docs/families.md has it."""
    view = "view (stretched)" if model.vision.stretched else "view"
    return " | ".join(filter(None, (_part_line(part, view) for part in model.prompt.parts)))


def _part_line(part: Part, view: str) -> str:
    if isinstance(part, TokenIds):
        return ""
    if isinstance(part, GlobalView):
        return view
    if isinstance(part, LocalRows):
        line = "rows with newlines" if part.newline else "rows"
        return f"{line} {_quoted(part.before)} {_quoted(part.after)}".strip()
    if isinstance(part, LocalTiles):
        texts = part.before, part.after, part.row, part.end
        return " ".join(["tiles", *filter(None, map(_quoted, texts))])
    return {Text: "text", Separator: "separator", Objects: "objects"}.get(type(part), "question")


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""


def assert_documented(folder: Path) -> None:
    """docs/families.md has a section of the checkpoint's family, with its layout."""
    model = read_model(find_checkpoint(str(folder)))
    docs = (Path(__file__).resolve().parent.parent / "docs" / "families.md").read_text("utf-8")
    section = docs.split(f"## {model.family}\n")[1].split("\n## ")[0]
    assert f"Layout: `{layout_line(model)}`" in section
