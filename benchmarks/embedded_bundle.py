"""The embedded model's bundle, written again by today's exporter from its own weights.

Bundles of version 1 are read as they are, but integers that were written before they were exact on
every processor (`docs/quantization.md`) can only be mended by quantizing again: weights are rebuilt
from the old integers and their scales (`embedded_checkpoint.py`), and exported in the precisions
and segments that the old bundle has, without its int8 KV graph. The file's name and the hash of the
rebuilt weights become the new bundle's source; the card keeps what was said of the checkpoint.

    python -m benchmarks.embedded_bundle TARGET [--bundle OLD] [--card CARD]

SOURCE_DATE_EPOCH fixes the date, and with it every byte of the result.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import cast

from benchmarks.embedded_checkpoint import write_checkpoint
from benchmarks.measure import parser_for
from lrs_edge.bundle.bundle import Bundle, open_bundle
from lrs_edge_export import ExportOptions, export_bundle
from lrs_edge_export.bundle.options import Precisions, Requested

_CARD = "MODEL_CARD.md"
#: Where a bundle's card begins with what the checkpoint said of itself.
_OWN_CARD = "## The checkpoint's own card\n"


def write_bundle(old: Path | None, target: Path, card: Path | None = None) -> Path:
    """Write a bundle anew.

    Args:
        old: Bundle of family `nano`; None for the embedded model.
        target: Folder of the new one; it must not exist.
        card: What is said of the checkpoint; None for what the old bundle's card says of it.

    Returns:
        The target.

    Raises:
        BundleError: The old bundle is of another family, or is not as its manifest says.
        ExportError: The new one cannot be written, or is not faithful to the weights.
    """
    source = open_bundle(old)
    manifest = source.manifest
    with tempfile.TemporaryDirectory() as place:
        name = f"{manifest.source.name}, from the bundle of {manifest.created[:10]}"
        checkpoint = write_checkpoint(source.path, Path(place) / name)
        own = _own_card(source) if card is None else card.read_text(encoding="utf-8")
        (checkpoint / _CARD).write_text(own, encoding="utf-8")
        # Without a region focus module nothing has the precision named for it.
        precisions = (manifest.vision, manifest.rfm or manifest.llm, manifest.llm)
        options = ExportOptions(
            name=manifest.name,
            licence=manifest.licence,
            precisions=Precisions(*(cast(Requested, stage.precision) for stage in precisions)),
            relative_to=manifest.search.relative_to,
            attention_layers=tuple(part.first_layer for part in manifest.llm.segments[1:]),
        )
        export_bundle(str(checkpoint), target, options, lambda line: print(line, file=sys.stderr))
    return target


def _own_card(bundle: Bundle) -> str:
    path = bundle.path / _CARD
    return path.read_text(encoding="utf-8").partition(_OWN_CARD)[2] if path.is_file() else ""


def main() -> None:
    """Write the bundle and print where it is."""
    parser = parser_for(__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--bundle", type=Path, help="default: the embedded model")
    parser.add_argument("--card", type=Path, help="default: the old bundle's")
    options = parser.parse_args()
    print(write_bundle(options.bundle, options.target, options.card))


if __name__ == "__main__":
    main()
