"""What the benchmarks share: images to write, figures of a process, tables to print."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrs_edge.commands.main import end_in_order
from lrs_edge.requests.memory import peak_memory

ROOT = Path(__file__).resolve().parent.parent


def write_image(
    path: Path, side: int, *, overviews: bool, block: int = 512, width: int | None = None
) -> None:
    """Write an image of smooth shapes and sparse marks, one row of blocks at a time.

    Args:
        path: A GeoTIFF: tiled, uint8, 3 bands, deflate.
        side: Rows in pixels.
        overviews: Whether the file holds them, down to 256 pixels.
        block: Side of a block in pixels.
        width: Columns in pixels; None for a square.
    """
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.windows import Window

    cols = side if width is None else width
    x = np.arange(cols, dtype=np.float32)
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "compress": "deflate", "zlevel": 1}
    profile |= {"tiled": True, "blockxsize": block, "blockysize": block, "photometric": "RGB"}
    profile |= {"crs": "EPSG:32632", "transform": rasterio.Affine(0.5, 0, 4e5, 0, -0.5, 5.6e6)}
    with rasterio.Env(GDAL_CACHEMAX=64 << 20, COMPRESS_OVERVIEW="DEFLATE"):
        with rasterio.open(path, "w", height=side, width=cols, bigtiff="yes", **profile) as file:
            for row in range(0, side, block):
                y = np.arange(row, min(row + block, side), dtype=np.float32)[:, None]
                grey = 120 + 60 * np.sin(x / 97) * np.cos(y / 131) + 40 * ((x + y) % 64 < 8)
                rows = np.stack([grey, grey * 0.8, 255 - grey]).astype(np.uint8)
                file.write(rows // 4 * 4, window=Window(0, row, cols, len(y)))
        if overviews:
            factors = [2**k for k in range(1, 16) if min(side, cols) / 2**k >= 256]
            with rasterio.open(path, "r+") as file:
                file.build_overviews(factors, Resampling.average)


def peak_mib() -> float:
    """Peak resident memory of this process in MiB, since its start or the last `reset_peak`."""
    return peak_memory() / 2**20


def reset_peak() -> bool:
    """Let the peak of this process start again at what it holds now; False where that fails."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_fresh_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run one measurement in a process whose peak memory is its own.

    Args:
        module: Module of `benchmarks` that prints one JSON object.
        arguments: Of its command line.

    Raises:
        SystemExit: It fails; what it said is shown.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def milliseconds(run: Callable[[], object], repeat: int, *, uncounted: int) -> float:
    """Median of several runs after some that are not counted."""
    for _ in range(uncounted):
        run()
    taken = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def parser_for(text: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is written.

    Every benchmark begins with it: from then on one that is ended removes its temporary files.
    """
    end_in_order()
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)


def row(cells: Sequence[object]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(cells: Sequence[str]) -> str:
    """The first two rows of a Markdown table."""
    return row(cells) + "\n|" + "---|" * len(cells)


def times(slower: float, faster: float) -> str:
    """A ratio for a table."""
    return f"{slower / faster:.1f}x" if faster > 0 else "-"
