"""Family `llava-next`: LLaVA-NeXT (1.6) as transformers writes it, on Vicuna, Mistral, LLaMA 3, Yi.

The model was trained on the image stretched to one tile, followed by up to four tiles of 576 tokens
in rows across all of them, each row with the newline at its end. A level of the search stands
where its tiles stood, and keeps their order; tokens that are left out leave their row shorter.
"""

from __future__ import annotations

from dataclasses import replace

from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.hf_checkpoint import Tokens
from lrs_edge_export.families.llava_transformers import Layout, clip_stage, read_transformers
from lrs_edge_export.families.templates import Conversation

#: As the largest of the shapes that it was trained on, 672 x 672.
_LAYOUT = Layout(rows=True, base_tiles=2)

VICUNA = Conversation(
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. USER: ",
    "\n{question} ASSISTANT:",
)
MISTRAL = Conversation("[INST] ", "\n{question} [/INST]")
LLAMA_3 = Conversation(
    "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision "
    "assistant. You are able to understand the visual content that the user provides, and assist "
    "the user with a variety of tasks using natural language.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>"
    "\n\n",
    "\n{question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
)
YI = Conversation(
    "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n",
    "\n{question}<|im_end|><|im_start|>assistant\n",
)
QWEN = Conversation(
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "\n{question}<|im_end|>\n<|im_start|>assistant\n",
)


def _conversation(kind: str, tokens: Tokens) -> Conversation:
    """Of the documentation of transformers, by language model and its control tokens."""
    if kind == "mistral":
        return MISTRAL
    if kind == "qwen2":
        return QWEN
    if tokens.has("<|start_header_id|>"):
        return LLAMA_3
    return YI if tokens.has("<|im_start|>") else VICUNA


def _vision(
    checkpoint: Checkpoint, weights: Scoped, processor: Settings, hidden: int
) -> VisionStage:
    return replace(clip_stage(checkpoint, weights, processor, hidden), stretched=True)


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    return read_transformers(
        checkpoint,
        vision_tower,
        family="llava-next",
        kinds=("llama", "mistral", "qwen2"),
        layout=_LAYOUT,
        vision=_vision,
        default=_conversation,
    )


FAMILY = Family(
    "llava-next", ("LlavaNextForConditionalGeneration",), "LLaVA-NeXT of transformers", read
)
