"""Write the sample images of `examples/` from the DeepForest source distribution.

    pip download --no-deps --no-binary :all: deepforest==2.1.0
    python scripts/make_examples.py deepforest-2.1.0.tar.gz

Each becomes a cloud-optimised GeoTIFF (tiled, JPEG, overviews) and keeps its georeference if it has
one. `examples/README.md` says where the pictures come from.
"""

from __future__ import annotations

import sys
import tarfile
import warnings
from pathlib import Path

import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.shutil import copy

OUTPUT = Path(__file__).resolve().parent.parent / "examples"

#: Name here -> name in `deepforest-2.1.0/src/deepforest/data/`.
SOURCES = {
    "yellowstone.tif": "2019_YELL_2_528000_4978000_image_crop2.png",
    "road.tif": "2019_YELL_2_541000_4977000_image_crop.png",
    "florida.tif": "OSBS_029.tif",
}

#: GDAL's COG driver; At this quality the largest picture stays below 2 MB.
PROFILE = {
    "driver": "COG",
    "compress": "JPEG",
    "quality": 48,
    "blocksize": 256,
    "overviews": "AUTO",
    "resampling": "AVERAGE",
}


def main(archive: str) -> None:
    """Write every sample image."""
    with tarfile.open(archive) as sdist:
        for name, source in SOURCES.items():
            member = sdist.extractfile(f"deepforest-2.1.0/src/deepforest/data/{source}")
            if member is None:
                raise SystemExit(f"{archive} holds no {source}")
            write_cog(member.read(), OUTPUT / name)


def write_cog(data: bytes, path: Path) -> None:
    """Write an image file's pixels and place as a cloud-optimised GeoTIFF.

    Nodata values are left out: lossy compression blurs them, and one of the pictures names white.
    """
    with MemoryFile(data) as memory, memory.open() as source:
        profile = {key: source.profile[key] for key in ("width", "height", "count", "dtype")}
        place = {"crs": source.crs, "transform": source.transform} if source.crs else {}
        with MemoryFile() as plain:
            with plain.open(driver="GTiff", **profile, **place) as target:
                target.write(source.read())
            with plain.open() as target:
                copy(target, path, **PROFILE)
    with rasterio.open(path) as written:
        print(f"{path.name}: {written.width}x{written.height}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    main(*sys.argv[1:])
