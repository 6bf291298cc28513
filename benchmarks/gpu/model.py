"""The model that is measured: random weights in the released layout, written and exported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lrs_edge_export import ExportOptions, Precisions, export_bundle
from lrs_edge_export.bundle.stages import StageWriter
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.quantization.precision import Plan, Precision, Target
from scripts.make_checkpoint import SMALL_TOWER, Sizes, TowerSizes, write_checkpoint


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        sizes: Of the language model and the region focus module.
        tower: Of the CLIP tower.
        tiles: Tiles in one run.
        prefill: New tokens in one run after none.
        decode: Places that are filled when one token is decoded.
        level: Tokens of a level that the region focus module scores.
        capacity: Places of the key/value buffers.
        side: Of the image that is asked about, in pixels.
        repeat: Runs of which the median counts.
    """

    sizes: Sizes
    tower: TowerSizes
    tiles: tuple[int, ...] = (1, 16)
    prefill: tuple[int, ...] = (512, 2400)
    decode: int = 2399
    level: int = 2400
    capacity: int = 4096
    side: int = 27_328
    repeat: int = 20


#: Eight layers as wide as Qwen2-7B's, a head of 32,064 rows, CLIP ViT-L/14-336.
FULL = Case(
    Sizes(
        layers=8,
        hidden=3584,
        heads=28,
        kv_heads=4,
        intermediate=18944,
        rows=32_064,
        vocabulary=32_000,
        rfm_layers=1,
    ),
    TowerSizes(),
)

#: What a CPU runs in seconds.
SMALL = Case(
    Sizes(
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        intermediate=128,
        rows=512,
        vocabulary=400,
        rfm_layers=1,
    ),
    SMALL_TOWER,
    tiles=(1, 2),
    prefill=(64,),
    decode=99,
    level=96,
    capacity=128,
    side=1500,
    repeat=3,
)


def write_model(case: Case, folder: Path) -> Path:
    """Write the checkpoint; returns its folder."""
    path = folder / "checkpoint"
    write_checkpoint(path, case.sizes, case.tower)
    return path


def write_bundle(checkpoint: Path, folder: Path, target: Target) -> Path:
    """Export it for `target`, in float16 for CUDA; returns the bundle's folder."""
    precisions = Precisions.all("fp16" if target == "cuda" else "fp32")
    options = ExportOptions(precisions=precisions, target=target, parity=False)
    return export_bundle(str(checkpoint), folder / "bundle", options).path


def write_language_model(
    checkpoint: Path, folder: Path, precision: Precision, target: Target
) -> Path:
    """Write only the language model's graph in another precision, 4 bits rounded to nearest."""
    place = folder / precision
    place.mkdir()
    model = read_model(find_checkpoint(str(checkpoint)))
    with StageWriter(model, place) as writer:
        writer.write("llm", Plan(precision, target=target))
    return place / "llm.onnx"
