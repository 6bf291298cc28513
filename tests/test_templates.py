"""Chat templates: rendered once, cut at the image, read with suspicion."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.templates import Conversation, chat_template, render
from tests.checkpoints import write_json

#: As LLaVA's and SmolVLM's are written, with what few of them have.
TEMPLATE = r"""{{ bos_token }}{% for message in messages %}
{% if loop.index0 > 8 %}{% break %}{% endif %}
{{ message['role'].upper() + ': ' }}
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}
{% endfor %}
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}
{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}
{% endfor %}
{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def test_a_template_is_cut_at_the_image() -> None:
    lines = [line.strip() for line in TEMPLATE.splitlines()]
    found = render("".join(lines), "<image>", {"bos_token": "<s>"})
    assert found == Conversation("<s>USER: ", "\n{question} ASSISTANT:")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content + 1 }}", "cannot be rendered"),
        ("{% if %}", "cannot be rendered"),
        ("{{ raise_exception('no images here') }}", "no images here"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered"),
        ("no image", "does not give one image"),
        ("<image><image>{{ messages[0].content[1].text }}", "does not give one image"),
        ("{{ messages[0].content[1].text }}<image>", "does not give one image"),
        ("<image>{{ messages[0].content[1].text }}{{ '{question}' }}", "{question}"),
        ("{{ range(1000000000) | list }}", "cannot be rendered"),
    ],
)
def test_what_is_no_template_for_an_image(template: str, words: str) -> None:
    with pytest.raises(ExportError) as error:
        render(template, "<image>", {})
    assert words in str(error.value)


def test_where_templates_lie(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    checkpoint = find_checkpoint(str(tmp_path))
    assert chat_template(checkpoint) is None
    listed = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": listed})
    assert chat_template(checkpoint) == "d"
    write_json(tmp_path / "chat_template.json", {"chat_template": "j"})
    assert chat_template(checkpoint) == "j"
    (tmp_path / "chat_template.jinja").write_text("f")
    assert chat_template(checkpoint) == "f"
    (tmp_path / "chat_template.jinja").write_text("f" * (1 << 17))
    with pytest.raises(ExportError, match="not a chat template"):
        chat_template(checkpoint)
