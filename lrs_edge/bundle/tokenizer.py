"""What a `tokenizer.json` of a bundle may contain, checked before the tokenizers library sees it.

That library panics, never ends, or aborts the process over parts that nobody exports: normalizers
that make texts grow, expressions without end, models of other kinds. Only the parts that the
supported families have are let through, each with the settings that are known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lrs_edge.bundle.files import read_limited
from lrs_edge.errors import BundleError

#: The largest that we know (150,000 tokens and as many merges) has 12 MB.
MAX_TOKENIZER_BYTES = 64 << 20
MAX_TOKENS = 1 << 20
MAX_MERGES = 1 << 21
#: Characters of one token; runs of spaces in vocabularies have a hundred and some.
MAX_TOKEN_CHARS = 1024
MAX_ADDED_TOKENS = 10_000
MAX_ADDED_CHARS = 256
_MAX_PARTS = 8

#: Expressions that cut text into words, as published by Qwen2, GPT-4 and LLaMA 3, and GPT-2.
PATTERNS = frozenset(
    {
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    }
)
_SPACES = (" ", "▁")

Check = Callable[[Any], bool]


def check_tokenizer(path: Path) -> None:
    """Check a tokenizer file.

    Raises:
        BundleError: It cannot be read, is not a tokenizer, or has parts that are not allowed.
    """
    try:
        content = json.loads(read_limited(path, MAX_TOKENIZER_BYTES))
        problem = _problem(content)
    # ValueError: not JSON, not UTF-8.
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{path} is not a tokenizer ({reason}); export it again") from error
    if problem:
        raise BundleError(
            f"{path} is not a tokenizer that a bundle may hold: {problem}; use a bundle that "
            "`lrs-edge export` wrote"
        )


def _problem(content: Any) -> str:
    """What is not allowed in a tokenizer; empty where all is."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        return "it is not a tokenizer's JSON"
    sections = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
    known = {*sections, "version", "truncation", "padding", "added_tokens"}
    if not set(content) <= known:
        return f"it has {_shown(set(content) - known)}"
    if content.get("version", "1.0") != "1.0":
        return f"its version is {_shown(content['version'])}"
    # Prompts are never cut or filled; in a file of another kind these can be of any size.
    for name in ("truncation", "padding"):
        if content.get(name) is not None and not _is_small(content[name]):
            return f"its {name} is {_shown(content[name])}"
    for name in sections[:-1]:
        part = content.get(name)
        if part is not None and not _is_allowed(part, _PARTS[name]):
            return f"its {name} is {_shown(part)}"
    return _model_problem(content["model"]) or _added_problem(content.get("added_tokens"))


def _shown(value: Any) -> str:
    return repr(value)[:120]


def _is_small(value: Any) -> bool:
    """A flat object of few short values."""
    return (
        isinstance(value, dict)
        and len(value) <= 16
        and all(_is_flag_or_text(part) or _count(1 << 20)(part) for part in _leaves(value))
    )


def _leaves(value: Any) -> list[Any]:
    parts = list(value.values())
    return [
        leaf for part in parts for leaf in (part.values() if isinstance(part, dict) else [part])
    ]


def _is_flag_or_text(value: Any) -> bool:
    return value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= 64)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _count(most: int) -> Check:
    return lambda value: type(value) is int and 0 <= value <= most


def _one_of(*values: Any) -> Check:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def _is_pattern(value: Any) -> bool:
    """One of the known expressions, or a space by itself."""
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((kind, text),) = value.items()
    known = PATTERNS if kind == "Regex" else _SPACES if kind == "String" else ()
    return isinstance(text, str) and text in known


def _is_short(value: Any) -> bool:
    return len(json.dumps(value)) <= 4096


_BYTE_LEVEL: dict[str, Check] = {
    "add_prefix_space": _flag,
    "trim_offsets": _flag,
    "use_regex": _flag,
}
#: A space becomes one character and back: texts do not grow.
_REPLACE: dict[str, Check] = {"pattern": _is_pattern, "content": _one_of(*_SPACES)}
_METASPACE: dict[str, Check] = {
    "replacement": _one_of("▁"),
    "prepend_scheme": _one_of("always", "never", "first"),
    "add_prefix_space": _flag,
    "split": _flag,
}


#: Kinds of parts by section, and the settings that each may have.
_PARTS: dict[str, dict[str, dict[str, Check]]] = {
    "normalizer": {
        "NFC": {},
        "Prepend": {"prepend": _one_of(*_SPACES)},
        "Replace": _REPLACE,
    },
    "pre_tokenizer": {
        "ByteLevel": _BYTE_LEVEL,
        "Digits": {"individual_digits": _flag},
        "Split": {
            "pattern": _is_pattern,
            "behavior": _one_of("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext"),
            "invert": _flag,
        },
        "Metaspace": _METASPACE,
    },
    "post_processor": {
        "ByteLevel": _BYTE_LEVEL,
        # Puts control tokens around a text. Prompts are encoded without, so only its size matters.
        "TemplateProcessing": {"single": _is_short, "pair": _is_short, "special_tokens": _is_short},
    },
    "decoder": {
        "ByteLevel": _BYTE_LEVEL,
        "ByteFallback": {},
        "Fuse": {},
        "Replace": _REPLACE,
        "Strip": {"content": _one_of(" "), "start": _count(16), "stop": _count(16)},
        "Metaspace": _METASPACE,
    },
}

_LISTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def _is_allowed(part: Any, kinds: Mapping[str, Mapping[str, Check]]) -> bool:
    """One part, or a sequence of few; not sequences of sequences."""
    if isinstance(part, dict) and part.get("type") == "Sequence":
        names = [name for name in _LISTS.values() if name in part]
        parts = part[names[0]] if len(part) == 2 and len(names) == 1 else None
        return (
            isinstance(parts, list)
            and len(parts) <= _MAX_PARTS
            and all(_is_single(one, kinds) for one in parts)
        )
    return _is_single(part, kinds)


def _is_single(part: Any, kinds: Mapping[str, Mapping[str, Check]]) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    settings = kinds.get(part["type"])
    return settings is not None and all(
        name in settings and settings[name](value) for name, value in part.items() if name != "type"
    )


#: Settings of the one kind of model that is allowed.
_MODEL: dict[str, Check] = {
    "type": _one_of("BPE"),
    "dropout": _one_of(None),
    "unk_token": lambda value: value is None or (isinstance(value, str) and len(value) <= 64),
    "continuing_subword_prefix": _one_of(None, ""),
    "end_of_word_suffix": _one_of(None, ""),
    "fuse_unk": _flag,
    "byte_fallback": _flag,
    "ignore_merges": _flag,
}


def _model_problem(model: dict[str, Any]) -> str:
    for name, value in model.items():
        if name not in ("vocab", "merges") and not (name in _MODEL and _MODEL[name](value)):
            return f"its model has {name} {_shown(value)}"
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not 0 < len(vocabulary) <= MAX_TOKENS:
        return f"its vocabulary is not 1..{MAX_TOKENS} tokens"
    problem = _vocabulary_problem(vocabulary)
    unknown = model.get("unk_token")
    if not problem and unknown is not None and unknown not in vocabulary:
        problem = f"its unk_token {_shown(unknown)} is not a token"
    return problem or _merges_problem(model.get("merges"), vocabulary)


def _vocabulary_problem(vocabulary: Mapping[str, Any]) -> str:
    if len(max(vocabulary, key=len)) > MAX_TOKEN_CHARS:
        return f"it has a token of more than {MAX_TOKEN_CHARS} characters"
    if set(map(type, vocabulary.values())) != {int}:
        return "its vocabulary has ids that are not numbers"
    ids = set(vocabulary.values())
    if min(ids) < 0 or max(ids) >= MAX_TOKENS or len(ids) != len(vocabulary):
        return "its vocabulary has ids out of bounds, or twice"
    return ""


def _merges_problem(merges: Any, vocabulary: Mapping[str, int]) -> str:
    if not isinstance(merges, list) or len(merges) > MAX_MERGES:
        return f"its merges are not a list of at most {MAX_MERGES}"
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        sound = isinstance(pair, list) and len(pair) == 2 and all(type(x) is str for x in pair)
        if not sound or not {*pair, "".join(pair)} <= vocabulary.keys():
            return f"it has a merge {_shown(merge)}"
    return ""


_ADDED: dict[str, Check] = {
    "id": _count(MAX_TOKENS - 1),
    "content": lambda value: isinstance(value, str) and 0 < len(value) <= MAX_ADDED_CHARS,
    "single_word": _flag,
    "lstrip": _flag,
    "rstrip": _flag,
    "normalized": _flag,
    "special": _flag,
}


def _added_problem(added: Any) -> str:
    if added is None:
        return ""
    if not isinstance(added, list) or len(added) > MAX_ADDED_TOKENS:
        return f"its added tokens are not a list of at most {MAX_ADDED_TOKENS}"
    for token in added:
        sound = (
            isinstance(token, dict)
            and set(token) <= set(_ADDED)
            and {"id", "content"} <= set(token)
            and all(_ADDED[name](value) for name, value in token.items())
        )
        if not sound:
            return f"it has an added token {_shown(token)}"
    return ""
