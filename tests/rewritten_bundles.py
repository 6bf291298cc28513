"""Bundles whose graphs are written at other precisions, without calibration, in a second or two."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import msgspec
import numpy as np

from lrs_edge.bundle.bundle import Bundle, open_bundle
from lrs_edge.bundle.manifest import FileEntry
from lrs_edge_export.bundle.stages import StageWriter
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.quantization.precision import Plan, Precision, Target

#: Of vision in `int8-static`, whose ranges come from noise.
_TILES = 2


def rewritten(
    checkpoint: Path,
    source: Path,
    folder: Path,
    precision: Precision,
    vision: Precision,
    target: Target = "cpu",
    *,
    symmetric: bool = False,
) -> Bundle:
    """A copy of a bundle with all stages at one precision, vision at another."""
    shutil.copytree(source, folder)
    model = read_model(find_checkpoint(str(checkpoint)))
    side = model.vision.tile
    tiles = np.random.default_rng(0).standard_normal((_TILES, 3, side, side)).astype(np.float32)
    with StageWriter(model, folder, tiles=lambda: tiles) as writer:
        writer.write("vision", Plan(vision, target=target, symmetric=symmetric))
        writer.write("llm", Plan(precision, target=target))
        writer.write("rfm", Plan(precision, target=target))
    manifest = open_bundle(source).manifest
    files = {
        name: FileEntry(entry.role, len(data), hashlib.sha256(data).hexdigest())
        for name, entry in manifest.files.items()
        for data in [(folder / name).read_bytes()]
    }
    return Bundle(folder, msgspec.structs.replace(manifest, files=files))
