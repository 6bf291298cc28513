"""Conversation templates: a checkpoint's own, rendered once and cut into the parts of a layout."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from lrs_edge.bundle.layout import QUESTION
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings

#: Longest template that is rendered; SmolVLM's has 300 characters, Qwen2-VL's 1,100.
_MAX_TEMPLATE = 1 << 16

#: Files that hold a template, in the order in which transformers takes them.
_JINJA, _JSON = "chat_template.jinja", "chat_template.json"
_SETTINGS = ("processor_config.json", "tokenizer_config.json")

#: Marks what an assistant said, for training; transformers has a tag of its own for it.
_TRAINING = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")

#: Stands for the question while a template is rendered: no template changes such a word.
_ASKED = "QUESTIONxQUESTION"


@dataclass(frozen=True)
class Conversation:
    """The text around one image and one question.

    Attributes:
        before: Text before the image, control tokens included.
        after: Text after it, with `{question}` once.
    """

    before: str
    after: str


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The template of a checkpoint, or None where it has none. Raises ExportError when damaged."""
    path = checkpoint.path / _JINJA
    if path.is_file():
        if path.stat().st_size > _MAX_TEMPLATE:
            raise ExportError(f"{path} is longer than {_MAX_TEMPLATE} bytes; not a chat template")
        return path.read_bytes().decode("utf-8", errors="replace")
    for name in (_JSON, *_SETTINGS):
        settings = checkpoint.side_file(name)
        value = settings.values.get("chat_template")
        if isinstance(value, list):
            # Several by name, as older tokenizers have them.
            named = {e.get("name"): e.get("template") for e in value if isinstance(e, dict)}
            value = named.get("default")
        if isinstance(value, str) and value:
            if len(value) > _MAX_TEMPLATE:
                raise settings.wrong("chat_template", f"must have at most {_MAX_TEMPLATE} bytes")
            return value
    return None


def render(template: str, image: str, tokens: dict[str, str]) -> Conversation:
    """Render a template for one image and one question, as transformers does.

    Args:
        template: Jinja.
        image: Token that stands for the image in the rendered text.
        tokens: Special tokens by the names that templates use, such as `bos_token`.

    Raises:
        ExportError: It cannot be rendered, or does not have the image and then the question once.
    """
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    content = [{"type": "image"}, {"type": "text", "text": _ASKED}]
    messages = [{"role": "user", "content": content}]
    try:
        text = environment.from_string(_TRAINING.sub("", template)).render(
            messages=messages, add_generation_prompt=True, **tokens
        )
    # A template may provoke any error of Python, too.
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ExportError(f"the chat template cannot be rendered ({error})") from error
    before, found, after = text.partition(image)
    if not found or image in after or after.count(_ASKED) != 1 or _ASKED in before:
        raise ExportError(
            f"the chat template does not give one image {image!r} and then the question once"
        )
    if QUESTION in text:
        raise ExportError(f"the chat template holds {QUESTION}")
    return Conversation(before, after.replace(_ASKED, QUESTION))


def special_tokens(settings: Settings) -> dict[str, str]:
    """Special tokens of a tokenizer_config.json by the names that templates use."""
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.values.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _raise(message: str) -> None:
    raise ValueError(message)
