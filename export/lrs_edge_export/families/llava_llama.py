"""Family `llava_llama`: the authors' Vicuna checkpoints (template `vicuna_v1`)."""

from __future__ import annotations

from lrs_edge_export.bundle.tokenizer_json import from_sentencepiece
from lrs_edge_export.checkpoints.checkpoint import Checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.llava import Template, is_of_authors, read_llava

#: LLaVA's `vicuna_v1`. The question comes with its newline (`layout.Question`).
VICUNA_V1 = Template(
    prefix=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: "
    ),
    suffix="\n{question} ASSISTANT:",
    bos=True,
)


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    return read_llava(
        checkpoint,
        vision_tower,
        family="llava_llama",
        qkv_bias=checkpoint.config.flag("attention_bias"),
        template=VICUNA_V1,
        # Always from SentencePiece: a tokenizer.json beside it may put a BOS or spaces elsewhere.
        tokenizer=from_sentencepiece(checkpoint.path / "tokenizer.model"),
    )


FAMILY = Family(
    "llava_llama", ("LlavaLlamaForCausalLM",), "the authors' Vicuna models", read, is_of_authors
)
