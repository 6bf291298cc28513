"""Memory of reading does not grow with the image: measured in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import rasterio
from rasterio.windows import Window

from tests.rasters import UTM, noise

ROOT = Path(__file__).resolve().parent.parent
MEASURE = """
import json, sys
from benchmarks.whole_image import read_tiles
print(json.dumps(read_tiles(sys.argv[1], sys.argv[2], 8)))
"""


def growth(path: Path, resampling: str) -> float:
    """MiB by which reading up to 8 tiles of each level raises the peak of a process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURE, str(path), resampling],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stderr == ""
    figures = json.loads(done.stdout)
    return float(figures["peak"] - figures["base"])


def scattered(path: Path, side: int, **options: object) -> Path:
    """A large file in which a few blocks hold noise and the rest is not stored."""
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "sparse_ok": True, "tiled": True}
    profile |= {"blockxsize": 512, "blockysize": 512, "compress": "deflate", **UTM, **options}
    block = noise(3, 512, 512)
    with rasterio.open(path, "w", height=side, width=side, **profile) as file:
        for place in range(0, side - 512, 2048):
            file.write(block, window=Window(place, (place * 7) % (side - 512), 512, 512))
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak of a process needs /proc")
@pytest.mark.parametrize("resampling", ["area", "reference"])
def test_peak_memory_is_bounded(tmp_path: Path, resampling: str) -> None:
    """8,192 x 8,192 x 3 bytes are 192 MiB; as float32 768 MiB."""
    assert growth(scattered(tmp_path / "a.tif", 8192), resampling) < 110


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak of a process needs /proc")
@pytest.mark.parametrize("resampling", ["area", "reference"])
def test_peak_memory_is_the_same_for_the_largest_image(tmp_path: Path, resampling: str) -> None:
    """27,328 x 27,328 without overviews, the largest image of the paper: 2.1 GiB decoded."""
    assert growth(scattered(tmp_path / "a.tif", 27328), resampling) < 110
