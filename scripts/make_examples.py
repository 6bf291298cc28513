"""Write the images of `examples/` from a folder of the data that they are part of.

    python scripts/make_examples.py DATA [TARGET]

DATA holds `dubai_cc0/images/scene5.webp` and `demo_large/images/usgs_hro_coast_3857_cog.tif`;
TARGET is `examples/` unless it is named. The scene becomes a cloud-optimised GeoTIFF (tiled, JPEG,
overviews); the coast is one already, and is copied byte by byte, so that it is not compressed
twice. The same GDAL gives the same bytes again. `examples/README.md` says where the pictures come
from.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.shutil import copy

OUTPUT = Path(__file__).resolve().parent.parent / "examples"

#: Name here -> file below the data folder.
SCENES = {"islands.tif": "dubai_cc0/images/scene5.webp"}
COPIES = {"coast.tif": "demo_large/images/usgs_hro_coast_3857_cog.tif"}

#: GDAL's COG driver. The source is lossy already: this quality adds nothing that can be seen.
PROFILE = {
    "driver": "COG",
    "compress": "JPEG",
    "quality": 90,
    "blocksize": 256,
    "overviews": "AUTO",
    "resampling": "AVERAGE",
}


def main(data: str, target: str = str(OUTPUT)) -> None:
    """Write every image, and say its size."""
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in SCENES.items():
        write_cog(Path(data, source), folder / name)
    for name, source in COPIES.items():
        shutil.copyfile(Path(data, source), folder / name)
    for path in (folder / name for name in (*SCENES, *COPIES)):
        with rasterio.open(path) as written:
            size = f"{written.width}x{written.height}, overviews {written.overviews(1)}"
            print(f"{path.name}: {size}, {path.stat().st_size:,} bytes")


def write_cog(source: Path, target: Path) -> None:
    """Write an image's first three bands, and its place if it has one, as a COG."""
    with rasterio.open(source) as image:
        place = {"crs": image.crs, "transform": image.transform} if image.crs else {}
        size = {"width": image.width, "height": image.height, "dtype": "uint8"}
        with MemoryFile() as plain:
            with plain.open(driver="GTiff", count=3, photometric="RGB", **size, **place) as copied:
                copied.write(image.read((1, 2, 3)))
            with plain.open() as copied:
                copy(copied, target, **PROFILE)


if __name__ == "__main__":
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    main(*sys.argv[1:])
