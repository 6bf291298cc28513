"""Tokenizers in the one format the runtime reads, that of the `tokenizers` library.

Encoding each part of a prompt by itself, without special tokens, gives what the checkpoint's own
tokenizer gives; the BOS is the runtime's (of the prompt's layout).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lrs_edge.bundle.tokenizer import check_tokenizer
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Settings, read_json

#: Qwen2's way to cut text into words, as in its published tokenizer.json.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPACE = "▁"

#: A SentencePiece model longer than this is refused unread; LLaMA's has 0.5 MB.
_MAX_MODEL_BYTES = 64 << 20


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer's JSON and the tokenizer itself.

    Attributes:
        text: Content of `tokenizer.json`.
        tokenizer: Parsed from it.
    """

    text: str
    tokenizer: Tokenizer

    @property
    def length(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def id_of(self, text: str) -> int:
        """Id of the token that is exactly this text, without the space that SentencePiece adds.

        Raises:
            ExportError: There is no such token.
        """
        token = self.tokenizer.token_to_id(text)
        if token is None:
            raise ExportError(
                f"the tokenizer has no token {text!r}; "
                "it is not the tokenizer of this checkpoint's family: download it again"
            )
        return int(token)


def copied(path: Path) -> TokenizerFile:
    """A checkpoint's own tokenizer.json, byte for byte.

    Raises:
        ExportError: It is not readable, or has parts that a bundle may not hold.
    """
    try:
        check_tokenizer(path)
        text = path.read_bytes().decode()
        return TokenizerFile(text, Tokenizer.from_str(text))
    # tokenizers raises bare Exception for every kind of bad file.
    except Exception as error:
        raise ExportError(f"{path} is not a tokenizer ({error}); download it again") from error


def from_byte_level(folder: Path) -> TokenizerFile:
    """Qwen2's tokenizer from vocab.json, merges.txt and the added tokens of tokenizer_config.json.

    Raises:
        ExportError: A file is missing or not readable.
    """
    vocabulary = read_json(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(
            f"{folder / 'merges.txt'} cannot be read ({error}); download it again"
        ) from error
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    try:
        pairs = [(left, right) for left, right in merges]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    # tokenizers raises bare Exception; the rest are wrong types in the JSON files.
    except Exception as error:
        raise ExportError(
            f"{folder}: vocab.json and merges.txt do not belong together ({error}); "
            "download both again"
        ) from error
    _add_tokens(tokenizer, folder)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return TokenizerFile(tokenizer.to_str(), tokenizer)


def _add_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Add what tokenizer_config.json lists beyond the vocabulary.

    Raises:
        ExportError: An entry is malformed, or would not get the id that the file gives it.
    """
    settings = Settings.load_optional(folder / "tokenizer_config.json")
    try:
        listed = settings.values.get("added_tokens_decoder") or {}
        entries = sorted((int(place), entry) for place, entry in listed.items())
        added = [
            AddedToken(entry["content"], special=bool(entry.get("special")), normalized=False)
            for _, entry in entries
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise settings.wrong("added_tokens_decoder", "must list tokens by id") from error
    tokenizer.add_tokens(added)
    for (place, _), token in zip(entries, added, strict=True):
        if tokenizer.token_to_id(token.content) != place:
            raise ExportError(
                f"{settings.path}: token {token.content!r} cannot have id {place}; "
                "download it again"
            )
    older = Settings.load_optional(folder / "added_tokens.json")
    for content, place in older.values.items():
        if tokenizer.token_to_id(content) != place:
            raise ExportError(
                f"{older.path}: token {content!r} has id {place!r} there, but is not listed so in "
                "tokenizer_config.json (added_tokens_decoder); save the tokenizer again with a "
                "newer transformers"
            )


def from_sentencepiece(
    path: Path, scheme: Literal["always", "first"] | None = None
) -> TokenizerFile:
    """LLaMA's tokenizer from its SentencePiece model (BPE with byte fallback).

    Args:
        path: The model.
        scheme: Where transformers 5 puts a space: before every piece of text between control tokens
            (`legacy`), or before the first; None for what SentencePiece itself does with each
            text.

    Raises:
        ExportError: The file is missing, damaged, or of another kind.
    """
    # The protobuf, not the processor: only there are kinds of pieces and normalisation named.
    # Generated code without types.
    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(_read_model(path))
    # protobuf has one DecodeError per implementation.
    except Exception as error:
        raise ExportError(
            f"{path} is not a SentencePiece model ({error}); download it again"
        ) from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    plain = normalizer.name == "identity" and not normalizer.remove_extra_whitespaces
    if trainer.model_type != trainer.BPE or not plain or not normalizer.add_dummy_prefix:
        raise ExportError(
            f"{path} is not LLaMA's kind of SentencePiece model (BPE, identity normalisation); "
            "no other is supported"
        )
    scores = {piece.piece: float(piece.score) for piece in proto.pieces}
    vocabulary = {piece.piece: place for place, piece in enumerate(proto.pieces)}
    if len(vocabulary) != len(proto.pieces) or "" in vocabulary:
        raise ExportError(f"{path} holds a piece twice, or an empty one; download it again")
    kinds = messages.ModelProto.SentencePiece
    control = [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    unknown = next((p.piece for p in proto.pieces if p.type == kinds.UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in control])
    _add_tokens(tokenizer, path.parent)
    if scheme is None:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            _SPACE, prepend_scheme=scheme, split=False
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return TokenizerFile(tokenizer.to_str(), tokenizer)


def _read_model(path: Path) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(_MAX_MODEL_BYTES + 1)
    if len(data) > _MAX_MODEL_BYTES:
        raise ValueError(f"larger than {_MAX_MODEL_BYTES} bytes")
    return data


def _merges(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best-scored piece first.

    SentencePiece merges whatever gives the best piece, so every split of a piece is a merge; the
    order within one piece follows transformers' conversion, which has the same effect.
    """
    found = []
    for piece, place in vocabulary.items():
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(-scores[piece], place, order, pair) for order, pair in enumerate(pairs)]
    return [pair for *_, pair in sorted(found)]
