"""Peak memory and time of reading all levels of images of growing size, against reading them whole.

Writes tiled GeoTIFFs (uint8, 3 bands, deflate, block by block) into a temporary directory, with and
without overviews. For each, a fresh process reads the tiles that the pyramid lists (policy `full`,
at most `--tiles` per level, spread evenly), and prints its peak resident memory. The comparison is
what most code does: `np.asarray(Image.open(path))`, resized once per level, up to `--whole` pixels
along the side. Memory of Python and its modules before the first read is given as `base`.

    python -m benchmarks.raster_memory --sides 1000 4096 27328
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TILE, BASE_SIDE = 336, 1008


def write_image(path: Path, side: int, *, overviews: bool, block: int = 512) -> None:
    """Writes a side x side image of smooth shapes and sparse marks, one row of blocks at a time."""
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.windows import Window

    x = np.arange(side, dtype=np.float32)
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "compress": "deflate", "zlevel": 1}
    profile |= {"tiled": True, "blockxsize": block, "blockysize": block, "photometric": "RGB"}
    profile |= {"crs": "EPSG:32632", "transform": rasterio.Affine(0.5, 0, 4e5, 0, -0.5, 5.6e6)}
    with rasterio.Env(GDAL_CACHEMAX=64 << 20, COMPRESS_OVERVIEW="DEFLATE"):
        with rasterio.open(path, "w", height=side, width=side, bigtiff="yes", **profile) as file:
            for row in range(0, side, block):
                y = np.arange(row, min(row + block, side), dtype=np.float32)[:, None]
                grey = 120 + 60 * np.sin(x / 97) * np.cos(y / 131) + 40 * ((x + y) % 64 < 8)
                rows = np.stack([grey, grey * 0.8, 255 - grey]).astype(np.uint8)
                file.write(rows // 4 * 4, window=Window(0, row, side, len(y)))
        if overviews:
            factors = [2**k for k in range(1, 16) if side / 2**k >= 256]
            with rasterio.open(path, "r+") as file:
                file.build_overviews(factors, Resampling.average)


def peak_mib() -> float:
    """Peak resident memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands `ru_maxrss` down from the parent; this figure starts with the process.
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def read_tiles(path: Path, resampling: str, most: int) -> dict[str, float]:
    """Reads the tiles of all levels with `Raster`; figures of this process."""
    from lrs_edge.pyramid import build_pyramid
    from lrs_edge.raster import Raster

    base, start, tiles, slowest = peak_mib(), time.perf_counter(), 0, 0.0
    with Raster.open(path) as raster:
        pyramid = build_pyramid(raster.height, raster.width, tile=TILE, base_side=BASE_SIDE)
        for level in (pyramid.global_view, *pyramid.levels):
            listed = level.tiles()
            step = max(len(listed) // most, 1)
            for index in listed[::step][:most]:
                begin = time.perf_counter()
                raster.read((level.height, level.width), level.tile_window(index), resampling)
                slowest = max(slowest, time.perf_counter() - begin)
                tiles += 1
        read = raster.bytes_read
    seconds = time.perf_counter() - start
    return {
        "base": base,
        "peak": peak_mib(),
        "seconds": seconds,
        "tiles": tiles,
        "slowest": slowest,
        "read_mb": read / 1e6,
    }


def read_whole(path: Path) -> dict[str, float]:
    """Decodes the image at once with Pillow and resizes it to each level; figures as above."""
    from PIL import Image

    from lrs_edge.pyramid import build_pyramid

    Image.MAX_IMAGE_PIXELS = None
    base, start, tiles = peak_mib(), time.perf_counter(), 0
    image = Image.open(path).convert("RGB")
    pyramid = build_pyramid(image.height, image.width, tile=TILE, base_side=BASE_SIDE)
    for level in (pyramid.global_view, *pyramid.levels):
        resized = np.asarray(image.resize((level.width, level.height), Image.Resampling.BOX))
        resized.astype(np.float32)
        tiles += level.tile_count
    seconds = time.perf_counter() - start
    return {"base": base, "peak": peak_mib(), "seconds": seconds, "tiles": tiles}


def in_process(how: str, path: Path, tiles: int) -> dict[str, float]:
    """Runs one measurement in a fresh process, whose peak is its own."""
    command = [sys.executable, "-m", "benchmarks.raster_memory", "--measure", how, str(path)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [*command, "--tiles", str(tiles)], capture_output=True, text=True, check=True, cwd=root
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    """Writes the images, measures, prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[1000, 4096, 8192, 16384, 27328])
    parser.add_argument("--tiles", type=int, default=64, help="most tiles per level")
    parser.add_argument("--whole", type=int, default=8192, help="largest side read as a whole")
    parser.add_argument("--measure", nargs=2, metavar=("HOW", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        how, path = options.measure
        whole = how == "whole"
        figures = read_whole(Path(path)) if whole else read_tiles(Path(path), how, options.tiles)
        print(json.dumps(figures))
        return
    print(
        f"{'side':>6} {'file':>10} {'how':>10} {'tiles':>6} {'seconds':>8} {'slowest':>8} "
        f"{'base MiB':>8} {'peak MiB':>8} {'growth':>8} {'read MB':>9}"
    )
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for side in options.sides:
            for kind in ("overviews", "plain"):
                path = Path(folder) / f"{side}-{kind}.tif"
                write_image(path, side, overviews=kind == "overviews")
                ways = ["area", "reference"] if kind == "plain" else ["area"]
                if kind == "plain" and side <= options.whole:
                    ways.append("whole")
                for how in ways:
                    found = in_process(how, path, options.tiles)
                    results.append({"side": side, "file": kind, "how": how, **found})
                    print(
                        f"{side:>6} {kind:>10} {how:>10} {found['tiles']:>6.0f} "
                        f"{found['seconds']:>8.2f} {found.get('slowest', 0):>8.3f} "
                        f"{found['base']:>8.0f} {found['peak']:>8.0f} "
                        f"{found['peak'] - found['base']:>8.0f} {found.get('read_mb', 0):>9.1f}",
                        flush=True,
                    )
                path.unlink()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
