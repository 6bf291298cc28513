"""Family `llava-1.5`: LLaVA-1.5 as transformers writes it (CLIP or SigLIP, one image, no tiles).

The model was trained on one image without tiles. The global view stands where its image stood;
tiles follow as further images do in a chat of this model, each on a line of its own.
"""

from __future__ import annotations

from lrs_edge_export.checkpoints.checkpoint import Checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.hf_checkpoint import Tokens
from lrs_edge_export.families.llava_transformers import Layout, clip_stage, read_transformers
from lrs_edge_export.families.templates import Conversation

_LAYOUT = Layout(rows=False, base_tiles=2)


def _conversation(kind: str, _: Tokens) -> Conversation:
    """Vicuna's, or ChatML on Qwen2 as the documentation of transformers has it."""
    if kind == "qwen2":
        after = "\n{question}<|im_end|><|im_start|>assistant\n"
        return Conversation("<|im_start|>user ", after)
    return Conversation("USER: ", "\n{question} ASSISTANT:")


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    return read_transformers(
        checkpoint,
        vision_tower,
        family="llava-1.5",
        kinds=("llama", "mistral", "qwen2"),
        layout=_LAYOUT,
        vision=clip_stage,
        default=_conversation,
    )


FAMILY = Family("llava-1.5", ("LlavaForConditionalGeneration",), "LLaVA-1.5 of transformers", read)
