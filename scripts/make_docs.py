"""Write what is generated: `docs/cli.md`, `docs/answer.schema.json` and `docs/devices.md`.

python -m scripts.make_docs            # write
python -m scripts.make_docs --check    # exit 1 where a file is not up to date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from lrs_edge.answer.report import json_schema
from lrs_edge.commands.main import PROGRAM, cli
from scripts.device_docs import device_docs, jetson_memory

DOCS = Path(__file__).resolve().parent.parent / "docs"

#: Columns of the help texts, whatever the terminal.
WIDTH = 90

HEADER = """\
# Commands

Generated from the program's own help by `scripts/make_docs.py`; do not edit.
"""


def main() -> int:
    """Write or check every generated file; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the generated documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    check = parser.parse_args().check
    stale = [
        path
        for path, text in generated().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        print(f"{path}: {'not up to date' if check else 'written'}")
        if not check:
            path.write_text(generated()[path], encoding="utf-8")
    return 1 if check and stale else 0


def generated() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    return {
        DOCS / "cli.md": cli_reference(),
        DOCS / "answer.schema.json": json_schema(),
        DOCS / "devices.md": device_docs(),
        DOCS / "jetson.md": _with_table(DOCS / "jetson.md", jetson_memory()),
    }


def _with_table(path: Path, table: str) -> str:
    """A document written by hand, with its table between the marks made anew."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split("<!-- memory -->")
    return f"{before}<!-- memory -->\n{table}\n<!-- /memory -->{rest.split('<!-- /memory -->')[1]}"


def cli_reference() -> str:
    """The help of every command as Markdown."""
    context = click.Context(
        cli,
        info_name=PROGRAM,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        **cli.context_settings,
    )
    return HEADER + "".join(
        f"\n## `{child.command_path}`\n\n```text\n{child.get_help()}\n```\n"
        for child in walk(context)
    )


def walk(context: click.Context) -> Iterator[click.Context]:
    """The context of a command and of all commands below it."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None:
                yield from walk(click.Context(command, info_name=name, parent=context))


if __name__ == "__main__":
    sys.exit(main())
