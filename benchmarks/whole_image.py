"""Reading by windows against reading the whole image, by image size.

Writes tiled GeoTIFFs (uint8, 3 bands, deflate) into a temporary directory, with and without
overviews, and reads each in fresh processes:

    area, reference   the tiles that one question reads under the policy `full`: the global view,
                      the base level, and `--tiles` of every finer level, spread evenly,
                      normalised as for the vision encoder; averaged through overviews, or bilinear
                      as in the reference
    whole             what the reference does (`benchmarks/reference_torch/image.py`): Pillow
                      decodes the image, PyTorch resamples every level from it in float32 memory;
                      up to `--whole` pixels along the side, because that takes some 60 bytes per
                      pixel (the authors' code takes as many)

Seconds are medians of `--repeat` processes. MiB are peak resident memory; `growth` is what reading
added to a process with all its modules loaded. `whole` makes all tiles of all levels, which is more
than a question reads: that is the point, and the column `tiles` says how many.

    python -m benchmarks.whole_image [--sides 1000 4096 27328] [--whole 8192] [--tiles 16]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import (
    head,
    in_fresh_process,
    parser_for,
    peak_mib,
    row,
    times,
    write_image,
)
from lrs_edge.requests.options import Resampling

#: Those of the released models.
TILE, BASE_SIDE = 336, 1008
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Figures = dict[str, Any]


def read_tiles(path: Path, resampling: Resampling, most: int) -> dict[str, float]:
    """Read at most so many tiles of every level with `Raster`; figures of this process."""
    from lrs_edge.pyramid.levels import build_pyramid
    from lrs_edge.raster.raster import Raster

    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    base, start, tiles, slowest = peak_mib(), time.perf_counter(), 0, 0.0
    with Raster.open(path) as raster:
        pyramid = build_pyramid(raster.height, raster.width, tile=TILE, base_side=BASE_SIDE)
        for level in (pyramid.global_view, *pyramid.levels):
            listed = level.tiles()
            step = max(len(listed) // most, 1)
            for index in listed[::step][:most]:
                begin = time.perf_counter()
                size = level.height, level.width
                pixels = raster.read(size, level.tile_window(index), resampling)
                np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))
                slowest = max(slowest, time.perf_counter() - begin)
                tiles += 1
        read = raster.bytes_read
    return {
        "base": base,
        "peak": peak_mib(),
        "seconds": time.perf_counter() - start,
        "tiles": tiles,
        "slowest": slowest,
        "read_mb": read / 1e6,
    }


def read_whole(path: Path) -> dict[str, float]:
    """Decode the image and build all levels as the reference does; figures as above."""
    import torch

    from benchmarks.reference_torch import open_levels
    from benchmarks.reference_torch.image import decode

    base, start = peak_mib(), time.perf_counter()
    with torch.inference_mode():
        made = open_levels(decode(path), tile=TILE, base_side=BASE_SIDE, mean=MEAN, std=STD)
    seconds = time.perf_counter() - start
    tiles = sum(len(level.tiles) for level in (made.view, *made.levels))
    return {"base": base, "peak": peak_mib(), "seconds": seconds, "tiles": tiles}


def measure(path: Path, how: str, tiles: int, repeat: int) -> Figures:
    """One way of reading one file, in fresh processes: median seconds, largest peak."""
    command = ["--measure", how, str(path), "--tiles", str(tiles)]
    runs = [in_fresh_process("whole_image", *command) for _ in range(repeat)]
    largest = max(runs, key=lambda found: float(found["peak"]))
    return {**largest, "seconds": statistics.median(found["seconds"] for found in runs)}


def linear_fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Intercept, slope and R squared of a line through points."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = np.array(y) - (intercept + slope * np.array(x))
    spread = float(np.var(y))
    return float(intercept), float(slope), 1 - float(np.var(rest)) / spread if spread else 1.0


def print_growth(results: list[Figures]) -> None:
    """Ratios of the largest side that was read as a whole, and how time and memory grow."""
    by_way: dict[tuple[str, str], list[Figures]] = {}
    for found in results:
        by_way.setdefault((found["file"], found["how"]), []).append(found)
    whole, windows = by_way.get(("plain", "whole"), []), by_way[("overviews", "area")]
    print()
    if whole:
        last = whole[-1]
        for other in (found for found in results if found["side"] == last["side"]):
            if other["how"] != "whole":
                print(
                    f"{last['side']:,} px, whole against {other['how']} ({other['file']}): "
                    f"{times(last['seconds'], other['seconds'])} the time, "
                    f"{times(last['growth'], other['growth'])} the added memory"
                )
    if len(windows) > 2:
        x = [float(np.log2(found["side"])) for found in windows]
        at, slope, r2 = linear_fit(x, [found["seconds"] for found in windows])
        print(
            f"area with overviews: seconds = {at:.2f} + {slope:.3f} log2(side), R2 {r2:.3f}; "
            f"added memory {min(f['growth'] for f in windows):.0f} to "
            f"{max(f['growth'] for f in windows):.0f} MiB"
        )
    for (kind, how), listed in by_way.items():
        if len(listed) > 1:
            first, last = listed[0], listed[-1]
            pixels = (last["side"] / first["side"]) ** 2
            print(
                f"{how} ({kind}): {pixels:.0f} times the pixels take "
                f"{times(last['seconds'], first['seconds'])} the time and "
                f"{times(last['growth'], first['growth'])} the added memory"
            )


def main() -> None:
    """Write the images, measure, print a table, what it shows, and one line of JSON."""
    parser = parser_for(__doc__)
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[1000, 2048, 4096, 8192, 16384, 27328]
    )
    parser.add_argument("--tiles", type=int, default=16, help="most tiles per level")
    parser.add_argument("--whole", type=int, default=8192, help="largest side read as a whole")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("HOW", "PATH"), help="one way, as JSON")
    options = parser.parse_args()
    if options.measure:
        how, path = options.measure
        whole = how == "whole"
        figures = read_whole(Path(path)) if whole else read_tiles(Path(path), how, options.tiles)
        print(json.dumps(figures))
        return
    columns = ["side", "file", "how", "tiles", "s", "slowest tile, s", "peak MiB", "growth MiB"]
    print(head([*columns, "read MB"]))
    results: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        for side in options.sides:
            for kind in ("overviews", "plain"):
                path = Path(folder) / f"{side}-{kind}.tif"
                write_image(path, side, overviews=kind == "overviews")
                ways = ["area", "reference"] if kind == "plain" else ["area"]
                if kind == "plain" and side <= options.whole:
                    ways.append("whole")
                for how in ways:
                    found = measure(path, how, options.tiles, options.repeat)
                    found |= {"side": side, "file": kind, "how": how}
                    found["growth"] = found["peak"] - found["base"]
                    results.append(found)
                    cells = [f"{side:,}", kind, how, found["tiles"], f"{found['seconds']:.2f}"]
                    cells.append(f"{found['slowest']:.3f}" if "slowest" in found else "")
                    cells += [f"{found['peak']:.0f}", f"{found['growth']:.0f}"]
                    cells.append(f"{found['read_mb']:.1f}" if "read_mb" in found else "")
                    print(row(cells), flush=True)
                path.unlink()
    print_growth(results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
