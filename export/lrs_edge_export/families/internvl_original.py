r"""InternVL's own layout (`InternVLChatModel`), read as the one that transformers has.

Names of tensors and of fields differ, queries, keys and values are one tensor in the tower, and the
folder's code, which nothing here runs, holds the conversation. transformers' own conversion says
what becomes what; the conversation is the one that it writes, without the system's turn in Chinese
that the code puts before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.renamed import Piece, Renamed
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.families.decoder_fields import require_values
from lrs_edge_export.families.hf_checkpoint import tokens_of

ARCHITECTURE = "InternVLChatModel"

#: Conversations that the code can have, of those that were used with the language models below.
_TEMPLATES = ("internvl2_5",)

#: Language models by their architecture, as `model_type`.
_KINDS = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}

#: Why others are not taken.
_OTHERS = {
    "InternLM2ForCausalLM": "its names of tensors are its own; name the checkpoint of the same "
    "model that transformers has, ending in -hf",
    "InternLM3ForCausalLM": "name the checkpoint of the same model that transformers has, ending "
    "in -hf",
    "GptOssForCausalLM": "its layers are mixtures of experts, which no graph here has",
    "Qwen3MoeForCausalLM": "its layers are mixtures of experts, which no graph here has",
}

#: Fields that must be absent, null, or one of these values.
_ONLY: dict[str, tuple[Any, ...]] = {
    "pad2square": (False,),
    "use_backbone_lora": (0,),
    "use_llm_lora": (0,),
}

#: Stands for an image in a prompt, and ends a turn.
_IMAGE, _END = "<IMG_CONTEXT>", "<|im_end|>"

_LAYER = r"vision_model\.encoder\.layers\.(\d+)\."
_NEW = r"vision.encoder.layers.\1."
_RULES = (
    (
        r"vision_model\.embeddings\.position_embedding$",
        "vision.embeddings.position_embedding.weight",
    ),
    (_LAYER + r"attn\.proj\.", _NEW + "self_attn.out_proj."),
    (_LAYER + r"attn\.", _NEW + "self_attn."),
    (_LAYER + r"norm(\d)\.", _NEW + r"layer_norm\2."),
    (_LAYER + r"ls(\d)$", _NEW + r"layer_scale\2"),
    (r"vision_model\.", "vision."),
    (r"mlp1\.0\.", "projector.norm."),
    (r"mlp1\.1\.", "projector.0."),
    (r"mlp1\.3\.", "projector.2."),
)

#: Queries, keys and values of the tower: one tensor, cut into three of the tower's width.
_FUSED = re.compile(r"(vision\.encoder\.layers\.\d+\.self_attn\.)qkv\.(weight|bias)")

#: Fields of the tower's config: what its class takes where the file is silent.
_TOWER: dict[str, Any] = {
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
}
_NAMED_OTHERWISE = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}


@dataclass(frozen=True)
class _Translated(Checkpoint):
    """A checkpoint whose names, fields and settings of generation are transformers' own.

    Attributes:
        end: Token that ends an answer, whatever generation_config.json says.
        width: Of the tower.
    """

    end: int = 0
    width: int = 0

    def tensors(self) -> Scoped:
        """All weights. Raises ExportError."""
        renamed = Renamed.by_rules(super().tensors(), _RULES)
        names: dict[str, str | Piece] = {}
        for name in renamed.names():
            fused = _FUSED.fullmatch(name)
            if fused is None:
                names[name] = name
                continue
            if renamed.shape(name)[0] != 3 * self.width:
                raise ExportError(
                    f"{self.path}: {name} must hold queries, keys and values of a tower that is "
                    f"{self.width} wide; config.json and weights do not belong together"
                )
            for place, part in enumerate("qkv"):
                rows = Piece(name, place * self.width, (place + 1) * self.width)
                names[f"{fused[1]}{part}_proj.{fused[2]}"] = rows
        return Scoped(Renamed(renamed, names), "")

    def side_file(self, name: str) -> Settings:
        """One of the optional JSON files; empty where it is missing. Raises ExportError."""
        found = super().side_file(name)
        if name != "generation_config.json":
            return found
        return found.replaced({**found.values, "eos_token_id": self.end})


def is_original(config: Settings) -> bool:
    """Whether a config.json is of this layout."""
    architectures = config.values.get("architectures")
    return isinstance(architectures, list) and architectures[:1] == [ARCHITECTURE]


def language_kind(config: Settings) -> str:
    """`model_type` of the language model inside. Raises ExportError where it is not taken."""
    inner = config.section("llm_config")
    if inner is None:
        raise config.wrong("llm_config", "must describe the language model")
    architectures = inner.values.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or name not in _KINDS:
        reason = _OTHERS.get(name, "") if isinstance(name, str) else ""
        raise ExportError(
            f"{config.path}: checkpoints of architecture '{ARCHITECTURE}' with the language model "
            f"{str(name)[:80]!r} are not taken{': ' * bool(reason)}{reason}. Taken are those with "
            f"{' and '.join(_KINDS)} (docs/families.md)"
        )
    return _KINDS[name]


def as_transformers(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint as transformers has it. Raises ExportError."""
    config = checkpoint.config
    text, kind = config.section("llm_config"), language_kind(config)
    tower = config.section("vision_config")
    if text is None or tower is None:
        raise config.wrong("vision_config", "must describe the vision tower")
    require_values(config, _ONLY)
    if config.values.get("template") not in _TEMPLATES:
        raise config.wrong("template", f"must be {' or '.join(_TEMPLATES)}")
    # Where the field is absent, the code takes the first version, which turns the image.
    if config.values.get("ps_version") != "v2":
        raise config.wrong("ps_version", "must be v2")
    given = {name: value for name, value in tower.values.items() if value is not None}
    fields = {name: given.get(name, value) for name, value in _TOWER.items()}
    # Another side would resize the table of positions.
    require_values(config, {"force_image_size": (fields["image_size"],)})
    file = tokens_of(checkpoint).file
    values = {
        "architectures": config.values["architectures"],
        "llm_layer_list": list(config.integers("llm_layer_list")),
        "image_token_id": file.id_of(_IMAGE),
        "downsample_ratio": config.values.get("downsample_ratio"),
        "vision_feature_layer": config.values.get("select_layer"),
        "tie_word_embeddings": config.flag("tie_word_embeddings"),
        "text_config": {**text.values, "model_type": kind},
        "vision_config": {
            "model_type": "internvl_vision",
            "use_mean_pooling": True,
            **{_NAMED_OTHERWISE.get(name, name): value for name, value in fields.items()},
        },
    }
    return _Translated(
        checkpoint.path,
        checkpoint.name,
        config.replaced(values),
        checkpoint.from_hub,
        end=file.id_of(_END),
        width=tower.replaced(fields).integer("hidden_size", 1, 1 << 17),
    )
