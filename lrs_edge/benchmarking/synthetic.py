"""An image to read where the user gives none; run as a program, it writes one.

python -m lrs_edge.benchmarking.synthetic FILE.tif SIDE
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np

from lrs_edge.bundle.manifest import Manifest
from lrs_edge.errors import LrsEdgeError

#: Sides of the image in base levels: three levels of the pyramid.
_BASES = 4
_BLOCK = 256


def synthetic_side(manifest: Manifest, tiles: int) -> int:
    """Side in pixels of an image with three levels, whose finest has so many tiles at least."""
    side = max(_BASES * manifest.search.base_side, manifest.vision.tile * math.isqrt(tiles - 1) + 1)
    return -(-side // _BLOCK) * _BLOCK


def write_image(path: Path, side: int) -> None:
    """Write smooth shapes under noise: GeoTIFF, uint8 RGB, deflate, tiles of 256, overviews.

    Args:
        path: Where.
        side: Rows and columns in pixels, a multiple of 256.
    """
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.windows import Window

    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "compress": "deflate"}
    profile |= {"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "photometric": "RGB"}
    # A transform, so that no warning about a missing one is given.
    place = rasterio.Affine(0.5, 0, 4e5, 0, -0.5, 5.6e6)
    rng = np.random.default_rng(0)
    x = np.arange(side, dtype=np.float32)
    with rasterio.Env(GDAL_CACHEMAX=16 << 20, COMPRESS_OVERVIEW="DEFLATE"):
        with rasterio.open(path, "w", height=side, width=side, transform=place, **profile) as file:
            for row in range(0, side, _BLOCK):
                y = np.arange(row, row + _BLOCK, dtype=np.float32)[:, None]
                grey = 120 + 70 * np.sin(x / 97) * np.cos(y / 131)
                noise = rng.integers(0, 24, (3, _BLOCK, side), np.uint8)
                file.write(grey.astype(np.uint8) + noise, window=Window(0, row, side, _BLOCK))
        with rasterio.open(path, "r+") as file:
            factors = [2**k for k in range(1, 16) if side >> k >= _BLOCK]
            file.build_overviews(factors, Resampling.average)


def write_image_apart(path: Path, side: int) -> None:
    """`write_image` in a process of its own, so that its memory does not count as a stage's.

    Raises:
        LrsEdgeError: The image cannot be written.
    """
    done = subprocess.run(  # noqa: S603 - this interpreter, and arguments made here
        [sys.executable, "-m", "lrs_edge.benchmarking.synthetic", str(path), str(side)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise LrsEdgeError(
            f"a synthetic image cannot be written to {path.parent} ({last}); free some space, or "
            "give one with --image"
        )


if __name__ == "__main__":
    write_image(Path(sys.argv[1]), int(sys.argv[2]))
