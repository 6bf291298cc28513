"""Family `llava_qwen`: the authors' Qwen2 checkpoints (template `qwen_1_5`)."""

from __future__ import annotations

from lrs_edge_export.bundle.tokenizer_json import copied, from_byte_level
from lrs_edge_export.checkpoints.checkpoint import Checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.llava import Template, is_of_authors, read_llava

#: LLaVA's `qwen_1_5`. The question comes with its newline (`layout.Question`).
QWEN_1_5 = Template(
    prefix="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    suffix="\n{question}<|im_end|>\n<|im_start|>assistant\n",
    bos=False,
)


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    own = checkpoint.path / "tokenizer.json"
    return read_llava(
        checkpoint,
        vision_tower,
        family="llava_qwen",
        qkv_bias=True,
        template=QWEN_1_5,
        tokenizer=copied(own) if own.is_file() else from_byte_level(checkpoint.path),
    )


FAMILY = Family(
    "llava_qwen", ("LlavaQwenForCausalLM",), "the authors' Qwen2 models", read, is_of_authors
)
