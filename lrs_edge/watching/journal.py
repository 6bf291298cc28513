"""What was asked, answered and written, in SQLite: the memory of `watch` between its lives.

A product is a row with its state; an answer is a row from the moment it is there. Each call is one
transaction that is on disk when it returns, so a process may be killed between any two. An answer
is kept in the journal whole until its files are written, and is never asked for again.

    product: pending -> done | failed -> quarantined
    answer:  answered -> written -> told -> done
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

from lrs_edge.errors import JournalError
from lrs_edge.files import hold_lock

JOURNAL_NAME = "watch.sqlite"
LOCK_NAME = "watch.lock"
SCHEMA_VERSION = 1
#: Every transaction is on disk when it returns, so that not even a loss of power undoes it.
SYNCHRONOUS = "FULL"

ProductState = Literal["pending", "done", "failed", "quarantined"]
AnswerState = Literal["answered", "written", "told", "done"]

_TABLES = """
CREATE TABLE products (
    path BLOB PRIMARY KEY, signature TEXT NOT NULL, digest TEXT NOT NULL, state TEXT NOT NULL,
    attempts INTEGER NOT NULL, unfinished INTEGER NOT NULL, not_before REAL NOT NULL,
    reason TEXT NOT NULL, code INTEGER NOT NULL, changed_at REAL NOT NULL
);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY, path BLOB NOT NULL, digest TEXT NOT NULL, question_key TEXT NOT NULL,
    question_id TEXT NOT NULL, question TEXT NOT NULL, state TEXT NOT NULL,
    line TEXT NOT NULL, json TEXT, geojson TEXT, hook_code INTEGER, answered_at REAL NOT NULL,
    UNIQUE (path, digest, question_key)
);
CREATE INDEX unfinished_answers ON answers (state) WHERE state != 'done';
"""


@dataclass(frozen=True)
class ProductRow:
    """What is known of a product.

    Attributes:
        path: Relative to the watched folder.
        signature: Of names, sizes and times when it was last read.
        digest: Of its content then.
        state: `failed` is on the way into quarantine.
        attempts: Attempts that failed.
        unfinished: Attempts that began and neither failed nor ended: the process was killed.
        not_before: Seconds since 1970 before which it is not tried again.
        reason: Of the last failure.
        code: Exit code that stands for it.
    """

    path: str
    signature: str
    digest: str
    state: ProductState
    attempts: int
    unfinished: int
    not_before: float
    reason: str
    code: int


@dataclass(frozen=True)
class AnswerRow:
    """One answer.

    Attributes:
        id: Its number in the journal, in the order of answers.
        path: Of the product, relative to the watched folder.
        digest: Of the product's content.
        question_key: Of the question.
        question_id: The same.
        question: Its text.
        state: How far it was given out.
        line: What standard output is told, JSON on one line.
        json: The result; None once it is written.
        geojson: The same in GeoJSON; None also where the image has no place on the earth.
    """

    id: int
    path: str
    digest: str
    question_key: str
    question_id: str
    question: str
    state: AnswerState
    line: str
    json: str | None
    geojson: str | None


_PRODUCT = "path, signature, digest, state, attempts, unfinished, not_before, reason, code"
_ANSWER = "id, path, digest, question_key, question_id, question, state, line, json, geojson"


class Journal:
    """The journal of one output folder, for one process at a time.

    Args:
        folder: Where it lies; must exist.

    Raises:
        JournalError: It is in use, cannot be read or written, or is of another version.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_NAME
        self._lock = _take_lock(folder / LOCK_NAME)
        try:
            with self._told():
                self._db = sqlite3.connect(self._path, isolation_level=None)
                self._db.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
                self._prepare()
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Let go of the journal; may be called more than once."""
        self._db.close()
        self._lock.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise JournalError(
                f"{self._path} cannot be used ({error}); see to its disk, or move it away to begin"
                " anew"
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise JournalError(
                f"{self._path} was written by another version of lrs-edge (schema {version}); "
                "name another folder with --out"
            )
        if version == 0:
            with self._transaction():
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    # Products.

    def product(self, path: str) -> ProductRow | None:
        """What is known of a product, None for a new one."""
        with self._told():
            row = self._db.execute(
                f"SELECT {_PRODUCT} FROM products WHERE path = ?",  # noqa: S608
                (os.fsencode(path),),
            ).fetchone()
        return None if row is None else ProductRow(os.fsdecode(row[0]), *row[1:])

    def products(self, state: ProductState) -> list[ProductRow]:
        """All products in one state."""
        with self._told():
            rows = self._db.execute(
                f"SELECT {_PRODUCT} FROM products WHERE state = ? ORDER BY rowid",  # noqa: S608
                (state,),
            ).fetchall()
        return [ProductRow(os.fsdecode(row[0]), *row[1:]) for row in rows]

    def begin(self, path: str, signature: str, now: float) -> None:
        """Note that work on a product begins; forgets failures where it may have changed."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO products VALUES (?, ?, '', 'pending', 0, 1, 0, '', 0, ?) "
                "ON CONFLICT (path) DO UPDATE SET state = 'pending', "
                "changed_at = excluded.changed_at, "
                "attempts = attempts * (signature = excluded.signature), "
                "unfinished = unfinished * (signature = excluded.signature) + 1, "
                "digest = CASE WHEN signature = excluded.signature THEN digest ELSE '' END, "
                "signature = excluded.signature",
                (os.fsencode(path), signature, now),
            )

    def identify(self, path: str, digest: str) -> None:
        """Note the digest of a product's content."""
        self._update(path, "digest = ?, unfinished = 1", digest)

    def finish(self, path: str, now: float) -> None:
        """Note that all questions about a product are answered."""
        self._update(
            path, "state = 'done', attempts = 0, unfinished = 0, not_before = 0, reason = '', "
            "code = 0, changed_at = ?", now,
        )  # fmt: skip

    def interrupt(self, path: str) -> None:
        """Note that work on a product ended in order, through no fault of its own."""
        self._update(path, "unfinished = 0")

    def fail(self, path: str, reason: str, code: int, not_before: float | None, now: float) -> None:
        """Note a failed attempt.

        Args:
            path: Of the product.
            reason: Why, on one line.
            code: Exit code that stands for it.
            not_before: When to try again, seconds since 1970; None for never.
            now: Seconds since 1970.
        """
        self._update(
            path, "attempts = attempts + 1, unfinished = 0, reason = ?, code = ?, not_before = ?, "
            "state = ?, changed_at = ?",
            reason, code, not_before or 0, "pending" if not_before is not None else "failed", now,
        )  # fmt: skip

    def quarantine(self, path: str) -> None:
        """Note that a failed product's record is written."""
        self._update(path, "state = 'quarantined'")

    def release(self) -> int:
        """Take all products out of quarantine; returns how many."""
        with self._transaction():
            changed = self._db.execute(
                "UPDATE products SET state = 'pending', attempts = 0, unfinished = 0, "
                "not_before = 0 WHERE state IN ('failed', 'quarantined')"
            ).rowcount
        return changed

    def _update(self, path: str, what: str, *values: object) -> None:
        with self._transaction():
            self._db.execute(
                f"UPDATE products SET {what} WHERE path = ?",  # noqa: S608
                (*values, os.fsencode(path)),
            )

    # Answers.

    def answered(self, path: str, digest: str) -> frozenset[str]:
        """Keys of the questions that were answered about one state of a product."""
        with self._told():
            rows = self._db.execute(
                "SELECT question_key FROM answers WHERE path = ? AND digest = ?",
                (os.fsencode(path), digest),
            ).fetchall()
        return frozenset(key for (key,) in rows)

    def answer(self, row: AnswerRow, now: float) -> AnswerRow:
        """Keep a new answer, whose `id` is not known yet; returns it with its number."""
        with self._transaction():
            number = self._db.execute(
                "INSERT INTO answers (path, digest, question_key, question_id, question, state, "
                "line, json, geojson, answered_at) VALUES (?, ?, ?, ?, ?, 'answered', ?, ?, ?, ?)",
                (
                    os.fsencode(row.path), row.digest, row.question_key, row.question_id,
                    row.question, row.line, row.json, row.geojson, now,
                ),
            ).lastrowid  # fmt: skip
            self._db.execute(
                "UPDATE products SET unfinished = 1 WHERE path = ?", (os.fsencode(row.path),)
            )
        return replace(row, id=number or 0, state="answered")

    def undelivered(self) -> list[AnswerRow]:
        """Answers that were not given out to the end, in the order in which they were made."""
        with self._told():
            rows = self._db.execute(
                f"SELECT {_ANSWER} FROM answers WHERE state != 'done' ORDER BY id"  # noqa: S608
            ).fetchall()
        return [AnswerRow(row[0], os.fsdecode(row[1]), *row[2:]) for row in rows]

    def written(self, number: int) -> None:
        """Note that an answer's files are there; the journal need not keep it any longer."""
        with self._transaction():
            self._db.execute(
                "UPDATE answers SET state = 'written', json = NULL, geojson = NULL WHERE id = ?",
                (number,),
            )

    def told(self, number: int) -> None:
        """Note that standard output has an answer's line."""
        with self._transaction():
            self._db.execute("UPDATE answers SET state = 'told' WHERE id = ?", (number,))

    def delivered(self, number: int, hook_code: int | None) -> None:
        """Note that an answer is given out, and how its command ended."""
        with self._transaction():
            self._db.execute(
                "UPDATE answers SET state = 'done', hook_code = ? WHERE id = ?",
                (hook_code, number),
            )


def _take_lock(path: Path) -> IO[bytes]:
    """An open file that this process alone holds; the system lets go of it when it is killed.

    Raises:
        JournalError: Another process holds it, or it cannot be written.
    """
    try:
        stream = path.open("ab")
    except OSError as error:
        raise JournalError(f"{path} cannot be written ({error.strerror})") from error
    # Where there is no such lock, SQLite's own keep the journal whole.
    if not hold_lock(stream):
        stream.close()
        raise JournalError(
            f"another `lrs-edge watch` writes to {path.parent}; end it, or name another folder "
            "with --out"
        )
    return stream
