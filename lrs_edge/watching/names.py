"""Names of files that are written for a product, whatever the product is called."""

from __future__ import annotations

import hashlib
import os
import re

_UNUSUAL = re.compile(r"[^A-Za-z0-9_-]+")
#: Characters of a product's and of a question's name that are kept, for people.
_PRODUCT_CHARS = 60
_QUESTION_CHARS = 40


def product_name(path: str, digest: str) -> str:
    """A file name for one state of a product.

    Letters, digits, `-` and `_` of its own name, so that it leads into no other folder, and a hash
    of its whole path and content, so that no two share it.

    Args:
        path: Of the product, relative to the watched folder.
        digest: Of its content, in hex.
    """
    key = hashlib.sha256(os.fsencode(path) + b"\0" + digest.encode()).hexdigest()
    return f"{_plain(path, _PRODUCT_CHARS)}-{key[:12]}"


def result_name(path: str, digest: str, question_id: str, question_key: str) -> str:
    """A file name, without ending, for the answer to one question about a product.

    Args:
        path: Of the product, relative to the watched folder.
        digest: Of its content, in hex.
        question_id: Of the question.
        question_key: Hash of the question, in hex.
    """
    question = f"{_plain(question_id, _QUESTION_CHARS)}-{question_key[:8]}"
    return f"{product_name(path, digest)}.{question}"


def shown(path: str) -> str:
    """A path as JSON can hold it: bytes that are not Unicode become question marks."""
    return path.encode(errors="replace").decode()


def _plain(text: str, length: int) -> str:
    return _UNUSUAL.sub("_", text).strip("_-")[:length] or "x"
