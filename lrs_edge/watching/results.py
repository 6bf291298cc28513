"""Files that `watch` writes: each appears whole or not at all, and is on disk when it is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from lrs_edge.errors import JournalError
from lrs_edge.files import PART_NAMES, replacing
from lrs_edge.watching.asking import Reply
from lrs_edge.watching.journal import AnswerRow, ProductRow
from lrs_edge.watching.names import product_name, result_name, shown
from lrs_edge.watching.products import Product
from lrs_edge.watching.questions import Question


class Results:
    """The folders `results` and `quarantine` of an output folder.

    Args:
        out: The output folder; must exist.

    Raises:
        JournalError: A folder cannot be made.
    """

    def __init__(self, out: Path) -> None:
        self.answers = out.absolute() / "results"
        self.quarantine = out.absolute() / "quarantine"
        for folder in (self.answers, self.quarantine):
            with _told(folder):
                folder.mkdir(exist_ok=True)
                for left in folder.glob(PART_NAMES):
                    left.unlink()

    def row(self, product: Product, digest: str, question: Question, reply: Reply) -> AnswerRow:
        """An answer as the journal keeps it.

        Args:
            product: What was asked about.
            digest: Of its content.
            question: What was asked.
            reply: What was answered.
        """
        about = {
            "product": shown(product.path),
            "sha256": digest,
            "question_id": shown(question.id),
        }
        json, geojson = self.paths(product.path, digest, question.id, question.key)
        line = {
            **about,
            "question": question.text,
            **reply.summary,
            "json": shown(str(json)),
            "geojson": None if reply.collection is None else shown(str(geojson)),
        }
        texts = [
            None if members is None else _line({**members, "watch": about})
            for members in (reply.record, reply.collection)
        ]
        return AnswerRow(
            0, product.path, digest, question.key, question.id, question.text, "answered",
            _line(line), *texts,
        )  # fmt: skip

    def paths(self, path: str, digest: str, question_id: str, key: str) -> tuple[Path, Path]:
        """The JSON and the GeoJSON file of an answer, the latter whether or not it is there."""
        name = result_name(path, digest, question_id, key)
        return self.answers / f"{name}.json", self.answers / f"{name}.geojson"

    def write(self, row: AnswerRow) -> None:
        """Write the files of an answer; may be done again.

        Raises:
            JournalError: A file cannot be written.
        """
        json, geojson = self.paths(row.path, row.digest, row.question_id, row.question_key)
        for target, text in ((geojson, row.geojson), (json, row.json)):
            if text is not None:
                write_whole(target, text)

    def record(self, row: ProductRow, when: float) -> Path:
        """Write why a product is in quarantine; may be done again.

        Raises:
            JournalError: The file cannot be written.
        """
        target = self.quarantine / f"{product_name(row.path, row.digest)}.json"
        facts = {
            "product": shown(row.path),
            "sha256": row.digest or None,
            "reason": shown(row.reason),
            "exit_code": row.code,
            "attempts": row.attempts,
            "time": when,
        }
        write_whole(target, _line(facts))
        return target


def move_away(root: Path, product: Product, digest: str, folder: Path) -> Path:
    """Move a product with its sidecars out of the watched folder.

    Args:
        root: The watched folder.
        product: The product.
        digest: Of its content, so that what a killed process began goes on in the same folder.
        folder: Where to; a folder on the same file system. It gets a folder for the product.

    Raises:
        OSError: A file cannot be moved; those that were stay there.
    """
    target = folder / product_name(product.path, digest)
    target.mkdir(parents=True, exist_ok=True)
    if product.is_folder:
        os.rename(root / product.path, target / os.path.basename(product.path))
        return target
    # The product itself last: what a killed process left is seen, and moved, again.
    for part in sorted(product.parts, key=lambda part: part.path == product.path):
        os.rename(root / part.path, target / os.path.basename(part.path))
    return target


def write_whole(target: Path, text: str) -> None:
    """Write a file that is there, whole and on disk, when this returns.

    Raises:
        JournalError: It cannot be written, as on a full disk; no part of it is left.
    """
    with _told(target):
        with replacing(target) as stream:
            stream.write(text.encode(errors="replace"))
            stream.flush()
            os.fsync(stream.fileno())
        # The name too; a folder cannot be opened everywhere.
        with suppress(OSError):
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JournalError(f"{target} cannot be written ({error.strerror})") from error


def _line(members: dict[str, Any]) -> str:
    return msgspec.json.encode(members).decode() + "\n"
