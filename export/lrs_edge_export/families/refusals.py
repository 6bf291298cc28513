"""Architectures that are known and not taken, each with the reason."""

from __future__ import annotations

_NO_IMAGE = "it is a language model without a vision tower; name a checkpoint that sees images"
_BOTH_WAYS = "its image tokens see each other in both directions, which no cache of keys here knows"
_ENCODER = "its language model is an encoder and a decoder, which no graph here has"
_CROSS = "its language model sees images by cross attention, so no token could be left out"
_VIDEO = "it was made for videos, and the runtime reads images"
_EXPERTS = "its layers are mixtures of experts, which no graph here has"
_QUERIES = (
    "a resampler turns an image into tokens that lie nowhere in it, so the search cannot zoom in"
)
_CODE = "it runs code of its own that transformers does not have, so parity could not be checked"

#: Why a checkpoint is not taken, by its architecture.
REFUSED: dict[str, str] = {
    "Blip2ForConditionalGeneration": _QUERIES,
    "ChameleonForConditionalGeneration": "its images are tokens of a codebook, without a tower",
    "DeepseekVLV2ForCausalLM": _EXPERTS,
    "DeepseekVLForConditionalGeneration": "its tower is of a kind that is not implemented (SAM)",
    "Florence2ForConditionalGeneration": _ENCODER,
    "FuyuForCausalLM": "it has no vision tower: pixels go into the language model",
    "Gemma3ForConditionalGeneration": _BOTH_WAYS,
    "Gemma3nForConditionalGeneration": _BOTH_WAYS,
    "Glm4vForConditionalGeneration": "its tower and its positions are not implemented",
    "Idefics2ForConditionalGeneration": _QUERIES,
    "IdeficsForVisionText2Text": _CROSS,
    "InstructBlipForConditionalGeneration": _QUERIES,
    "JanusForConditionalGeneration": "its tower is of a kind that is not implemented",
    "Kosmos2ForConditionalGeneration": _QUERIES,
    "Lfm2VlForConditionalGeneration": "layers of its language model are convolutions",
    "LlavaGemmaForCausalLM": "its language model is Gemma, whose norms no graph here has",
    "LlavaMptForCausalLM": "its language model is MPT, which has no rotary positions",
    "LlavaMptForConditionalGeneration": "its language model is MPT, without rotary positions",
    "LlavaNextVideoForConditionalGeneration": _VIDEO,
    "MiniCPMV": _QUERIES,
    "Mistral3ForConditionalGeneration": "its tower is of a kind that is not implemented (Pixtral)",
    "MllamaForConditionalGeneration": _CROSS,
    "MolmoForCausalLM": _CODE,
    "PaliGemmaForConditionalGeneration": _BOTH_WAYS,
    "Phi3VForCausalLM": _CODE,
    "Phi4MMForCausalLM": _CODE,
    "Qwen2VLMoeForConditionalGeneration": _EXPERTS,
    "Qwen3VLMoeForConditionalGeneration": _EXPERTS,
    "QWenLMHeadModel": _CODE,
    "VideoLlavaForConditionalGeneration": _VIDEO,
    "VipLlavaForConditionalGeneration": "its projector takes several layers of the tower at once",
    **dict.fromkeys(
        (
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "GPT2LMHeadModel",
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Phi3ForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
        ),
        _NO_IMAGE,
    ),
    **dict.fromkeys(
        ("CLIPModel", "CLIPVisionModel", "SiglipModel", "SiglipVisionModel"),
        "it is a vision tower alone; name the checkpoint of a language model that uses it",
    ),
}
