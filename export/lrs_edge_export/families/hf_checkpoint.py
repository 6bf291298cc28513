"""What transformers' layouts have in common: nested configs, defaults, image processor, tokenizer.

A nested config that transformers wrote leaves out what equals its class's default, so defaults are
part of the format. Names of tensors differ between versions 4 and 5 and are brought to one form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import AddedToken

from lrs_edge.errors import ExportError
from lrs_edge_export.bundle.tokenizer_json import (
    TokenizerFile,
    copied,
    from_byte_level,
    from_sentencepiece,
)
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.renamed import Renamed
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.families.templates import (
    Conversation,
    chat_template,
    render,
    special_tokens,
)
from lrs_edge_export.families.towers import normalising

#: Defaults of the config classes of language models: what a config.json leaves out.
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    },
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    },
}

#: Expressions for the names that versions 4 and 5 write, and the form they are brought to.
#: Towers and projectors are a family's own: it adds their rules before these.
LANGUAGE_RULES = (
    (r"(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"(?:model\.)?language_model\.model\.", "model."),
    (r"(?:model\.)?language_model\.", "model."),
    (r"(?:model\.)?image_newline$", "model.image_newline"),
)

#: Starts of the names of a language model, in the form that they are brought to.
LANGUAGE = (
    "model.embed_tokens.",
    "model.layers.",
    "model.norm.",
    "model.image_newline",
    "lm_head.",
)

#: Weights of a table that is computed anew.
_COMPUTED = ("rotary_emb.inv_freq", "position_ids")


@dataclass(frozen=True)
class Tokens:
    """A checkpoint's tokenizer, as transformers uses it.

    Attributes:
        file: What goes into the bundle.
        bos: Token that it puts before every text, or None.
        image: Text of the token that stands for the image; empty where the tokenizer has none.
        special: Special tokens by name.
    """

    file: TokenizerFile
    bos: int | None
    image: str
    special: Mapping[str, str]

    def has(self, text: str) -> bool:
        """Whether there is such a token."""
        return self.file.tokenizer.token_to_id(text) is not None


def text_settings(checkpoint: Checkpoint, kinds: tuple[str, ...]) -> Settings:
    """The language model's config, with what its class takes where the file is silent.

    Args:
        checkpoint: The folder.
        kinds: Values of `model_type` that the family takes, the default first.

    Raises:
        ExportError: The kind is another.
    """
    nested = _nested(checkpoint.config, "text_config")
    kind = nested.text("model_type", kinds[0])
    if kind not in kinds:
        raise nested.wrong("model_type", f"must be one of {', '.join(kinds)}")
    return with_defaults(nested, kind)


def with_defaults(settings: Settings, kind: str) -> Settings:
    """A language model's config, with what its class takes where the file is silent.

    Args:
        settings: What the file says.
        kind: A `model_type`; it becomes the config's.
    """
    given = {name: value for name, value in settings.values.items() if value is not None}
    absent = {
        name: value
        for name, value in TEXT_DEFAULTS[kind].items()
        # Null says that there is no window; everywhere else it says nothing.
        if not (name == "sliding_window" and name in settings.values)
    }
    return settings.replaced({**settings.values, **absent, **given, "model_type": kind})


def vision_settings(
    checkpoint: Checkpoint, kinds: tuple[str, ...], defaults: Mapping[str, Any]
) -> Settings:
    """The tower's config, which names its kind.

    Args:
        checkpoint: The folder.
        kinds: Values of `model_type` that the family takes, the default first.
        defaults: Of the tower that the family has where config.json describes none.

    Raises:
        ExportError: The kind is another.
    """
    if checkpoint.config.values.get("vision_config") is None:
        whole = {**defaults, "model_type": kinds[0]}
        return Settings(whole, checkpoint.config.path, "vision_config.")
    nested = _nested(checkpoint.config, "vision_config")
    kind = nested.text("model_type", kinds[0])
    if kind not in kinds:
        raise nested.wrong("model_type", f"must be {' or '.join(kinds)}")
    return nested.replaced({**nested.values, "model_type": kind})


def _nested(config: Settings, key: str) -> Settings:
    return config.section(key) or Settings({}, config.path, f"{key}.")


def longest(settings: Settings) -> tuple[Settings, int]:
    """The language model's config without a sliding window, and the longest sequence in tokens.

    Where all layers have the same window, attention within a sequence that is no longer equals
    attention without a window.
    """
    values = dict(settings.values)
    length = settings.integer("max_position_embeddings", 1, 1 << 30)
    if values.get("model_type") == "mistral" and values.get("sliding_window") is not None:
        length = min(length, settings.integer("sliding_window", 1, 1 << 30))
        del values["sliding_window"]
    return settings.replaced(values), min(length, 1 << 20)


def canonical_names(checkpoint: Checkpoint, rules: tuple[tuple[str, str], ...]) -> Scoped:
    """All weights, by the names of the canonical layout. Raises ExportError.

    Args:
        checkpoint: The folder.
        rules: Of the tower and the projector; those of the language model follow.
    """
    return Scoped(Renamed.by_rules(checkpoint.tensors(), (*rules, *LANGUAGE_RULES)), "")


def refuse_unread(weights: Scoped, prefixes: tuple[str, ...]) -> None:
    """Refuse weights that no part of the model reads: they would be left out in silence.

    Args:
        weights: By canonical names.
        prefixes: Of names that are read.

    Raises:
        ExportError: There are others.
    """
    for name in weights.names():
        if not name.startswith(prefixes) and not name.endswith(_COMPUTED):
            raise ExportError(
                f"the checkpoint has {name}, which the exported model would leave out; its layout "
                "is not one that this family has"
            )


def image_processor(checkpoint: Checkpoint) -> Settings:
    """Settings of the image processor: of its own file, or of the processor's (transformers 5).

    Raises:
        ExportError: A file is damaged, or asks for values that are not normalised pixels.
    """
    settings = checkpoint.side_file("preprocessor_config.json")
    if not settings.values:
        whole = checkpoint.side_file("processor_config.json")
        settings = whole.section("image_processor") or Settings({}, settings.path)
    return normalising(settings)


def require_tile(processor: Settings, tile: int) -> None:
    """Refuse an image processor that makes tiles of another size. Raises ExportError."""
    for key in ("crop_size", "size"):
        value = processor.values.get(key)
        if key == "crop_size" and processor.values.get("do_center_crop") is False:
            continue
        sides = [value] if isinstance(value, int) else []
        if isinstance(value, dict):
            sides = [part for part in value.values() if part is not None]
        if any(side != tile for side in sides):
            raise processor.wrong(key, f"must be the vision tower's image size {tile}")


def tokens_of(checkpoint: Checkpoint, *, whole: bool = True) -> Tokens:
    """The tokenizer, from whichever of its files there are.

    Args:
        checkpoint: The folder.
        whole: Prompts are tokenised whole, as transformers does; False where every part is
            tokenised by itself, by SentencePiece's own rules.

    Raises:
        ExportError: There is none, or it cannot be used.
    """
    folder = checkpoint.path
    settings = checkpoint.side_file("tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        file = copied(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        legacy = settings.flag("legacy")
        scheme: Literal["always", "first"] = "always" if legacy else "first"
        file = from_sentencepiece(folder / "tokenizer.model", scheme if whole else None)
    elif (folder / "vocab.json").is_file():
        file = from_byte_level(folder)
    else:
        raise ExportError(
            f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and "
            "merges.txt); download it again"
        )
    special = special_tokens(settings)
    return Tokens(file, _bos(settings, file, special), _image_token(checkpoint, file), special)


def _bos(settings: Settings, file: TokenizerFile, special: Mapping[str, str]) -> int | None:
    """The token before every text: what tokenizer_config.json says, else the tokenizer itself."""
    if settings.values.get("add_eos_token") not in (None, False):
        raise settings.wrong("add_eos_token", "must be false or absent: prompts end with no token")
    kind = settings.text("tokenizer_class", "")
    given = settings.values.get("add_bos_token")
    plain = file.tokenizer.encode("a", add_special_tokens=False).ids
    whole = file.tokenizer.encode("a", add_special_tokens=True).ids
    count = len(whole) - len(plain)
    if given is None and count:
        if count != 1 or whole[1:] != plain:
            raise ExportError(
                f"{settings.path.parent}: the tokenizer puts {count} tokens around every text; "
                "only one before it is supported"
            )
        return int(whole[0])
    if given is None:
        # From a SentencePiece model nothing says so; LLaMA's class does.
        given = kind.startswith("Llama") and not (settings.path.parent / "tokenizer.json").is_file()
    if not given or "bos_token" not in special:
        return None
    return file.id_of(special["bos_token"])


def _image_token(checkpoint: Checkpoint, file: TokenizerFile) -> str:
    """Text of the token that stands for the image, where it is one that cuts texts apart."""
    config = checkpoint.config
    key = "image_token_id" if "image_token_id" in config.values else "image_token_index"
    found = config.values.get(key)
    if not isinstance(found, int) or isinstance(found, bool):
        return ""
    added: dict[int, AddedToken] = file.tokenizer.get_added_tokens_decoder()
    return added[found].content if found in added else ""


def conversation(
    checkpoint: Checkpoint, tokens: Tokens, default: Conversation, notes: list[str]
) -> Conversation:
    """The checkpoint's own template, or the family's where it has none.

    Args:
        checkpoint: The folder.
        tokens: Its tokenizer.
        default: Template of the family.
        notes: What the user should know is added here.
    """
    template = chat_template(checkpoint)
    if template is None:
        notes.append("no chat template in the checkpoint: the family's is used")
        return default
    for image in dict.fromkeys(filter(None, (tokens.image, "<image>"))):
        try:
            return render(template, image, dict(tokens.special))
        except ExportError as error:
            reason = error
    notes.append(f"{reason}: the family's is used")
    return default
