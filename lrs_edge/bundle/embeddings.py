"""What an embeddings file of a bundle may contain, checked before anything maps or reads it.

The file is safetensors: eight bytes that say how long the header is, a JSON header, the tensors.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any

from lrs_edge.bundle.files import open_plain
from lrs_edge.bundle.manifest import (
    EMBED_TOKENS,
    IMAGE_NEWLINE,
    POSITION_COLS,
    POSITION_ROWS,
    Manifest,
)
from lrs_edge.errors import BundleError

#: Four tensors need some 400 bytes; metadata may say more.
MAX_HEADER_BYTES = 1 << 20

_BYTES = {"F16": 2, "F32": 4}


def check_embeddings(path: Path, manifest: Manifest) -> None:
    """Check the header of an embeddings file: names, types, shapes and places of its tensors.

    Raises:
        BundleError: The file is damaged, or its tensors are not what the manifest says.
    """
    try:
        with open_plain(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("its header is too long, or cut off")
            header = json.loads(stream.read(length))
        problem = _problem(header, _wanted(manifest), size - 8 - length)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(
            f"{path} is not a safetensors file ({reason}); export the bundle again"
        ) from error
    if problem:
        raise BundleError(f"{path}: {problem}; export the bundle again")


def _wanted(manifest: Manifest) -> dict[str, list[int]]:
    """Shapes of the tensors, by name."""
    hidden, entries = manifest.llm.hidden, manifest.vision.positions
    wanted = {EMBED_TOKENS: [manifest.llm.vocabulary, hidden], IMAGE_NEWLINE: [hidden]}
    if entries:
        wanted |= {name: [entries, hidden] for name in (POSITION_ROWS, POSITION_COLS)}
    return wanted


def _problem(header: Any, wanted: dict[str, list[int]], size: int) -> str:
    """What is wrong with a header, of which `size` bytes of tensors follow."""
    if not isinstance(header, dict) or set(header) - {"__metadata__"} != set(wanted):
        return f"it holds {sorted(header)[:8]}, not {sorted(wanted)}"
    places = []
    for name, shape in wanted.items():
        entry = header[name]
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            return f"{name} is not described as safetensors does"
        kind = str(entry["dtype"])
        if kind not in _BYTES or entry["shape"] != shape:
            found = f"{kind[:20]} {str(entry['shape'])[:60]}"
            return f"{name} is {found}; the manifest says F16 or F32 of {shape}"
        places.append((entry["data_offsets"], prod(shape) * _BYTES[kind]))
    # Without gaps or overlaps, as the library wants it too.
    end = 0
    for place, length in sorted(places, key=lambda item: str(item[0][:1]).rjust(32)):
        if place != [end, end + length]:
            return "its tensors overlap, leave gaps, or have no places"
        end += length
    return "" if end == size else "its tensors are not all of the file"
