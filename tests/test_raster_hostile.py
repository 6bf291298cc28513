"""Files that a stranger may send: what they name, what they claim, and what breaks readers."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image

from lrs_edge.errors import ImageError, ReadStoppedError
from lrs_edge.pyramid.levels import LevelWindow
from lrs_edge.raster.claims import MAX_TILE_SAMPLES
from lrs_edge.raster.gdal_source import GdalSource
from lrs_edge.raster.image_thread import ImageThread, check_stopped
from lrs_edge.raster.raster import Raster, RasterLimits
from tests.rasters import noise, quiet, vrt, write
from tests.test_raster_refusals import read_all, refused, sparse

SOURCE = '<SourceFilename relativeToVRT="1">a.tif</SourceFilename>'
URL = "NETCDF:&quot;http://127.0.0.1:9/x.nc&quot;:v"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds `a.tif`; beside it `outside.tif`."""
    write(tmp_path / "outside.tif", noise(1, 64, 64))
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.tif", noise(1, 64, 64))
    return tmp_path / "in"


def recipe(folder: Path, inside: str = "", source: str = SOURCE, band: str = "") -> Path:
    path = folder / "v.vrt"
    path.write_text(
        f'<VRTDataset rasterXSize="64" rasterYSize="64">{inside}'
        f'<VRTRasterBand dataType="Byte" band="1" {band}><SimpleSource>{source}'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    return path


def test_an_ordinary_vrt_still_reads(folder: Path) -> None:
    read_all(recipe(folder))
    (folder / "below").mkdir()
    write(folder / "below" / "b.tif", noise(1, 64, 64))
    read_all(recipe(folder, source=SOURCE.replace("a.tif", "below/b.tif")))
    read_all(recipe(folder, source=f"<SourceFilename>{folder}/a.tif</SourceFilename>"))


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (SOURCE.replace("a.tif", "../outside.tif"), "outside the image's folder"),
        (SOURCE.replace("a.tif", "link.tif"), "outside the image's folder"),
        (SOURCE.replace("a.tif", "pipe"), "not a local file"),
        ("<SourceFilename>/dev/stdin</SourceFilename>", "not a local file|outside"),
        ("<SourceFilename>/vsistdin/</SourceFilename>", "not a local file"),
        (f"<SourceFilename>{URL}</SourceFilename>", "not a local file"),
        (SOURCE.replace("a.tif", "a.tif<!-- x -->"), "in a way of its own"),
        (SOURCE.replace("a.tif", "<![CDATA[a.tif]]>"), "literal section"),
        (SOURCE.replace('"1"', '"yes"'), "in a way of its own"),
        (SOURCE.replace("a.tif", "<x/>a.tif"), "inside a file name"),
        ('<OpenOptions><OOI key="ROOT_PATH">/</OOI></OpenOptions>' + SOURCE, "open option"),
    ],
)
def test_sources_outside_the_rule(folder: Path, source: str, match: str) -> None:
    (folder / "link.tif").symlink_to("../outside.tif")
    os.mkfifo(folder / "pipe")
    refused(recipe(folder, source=source), match)


@pytest.mark.parametrize("way", ["attribute", "attribute in another case", "raw", "element"])
def test_other_ways_to_name_a_file(folder: Path, way: str) -> None:
    path = recipe(folder)
    text = path.read_text().replace(SOURCE, "")
    if way == "raw":
        text = text.replace('band="1"', 'band="1" subClass="VRTRawRasterBand"')
    elif way == "element":
        text = text.replace("<SimpleSource>", "<subClass>VRTRawRasterBand</subClass><SimpleSource>")
    else:
        name = "SourceFilename" if way == "attribute" else "SOURCEFILENAME"
        text = text.replace("<SimpleSource>", f'<SimpleSource {name}="{URL}">')
    path.write_text(text)
    refused(path, "refused")


OVERVIEWS = [URL, "/vsistdin/", "/dev/kmsg", "pipe", "../outside.tif", "/etc/passwd"]


@pytest.mark.parametrize("target", OVERVIEWS)
@pytest.mark.parametrize("place", ["vrt", "aux.xml", "tiff", "source's aux.xml", "child elements"])
def test_files_of_overviews_come_under_the_same_rule(folder: Path, place: str, target: str) -> None:
    os.mkfifo(folder / "pipe")
    item = f'<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{target}</MDI></Metadata>'
    path = folder / "a.tif"
    if place == "vrt":
        path = recipe(folder, item)
    elif place == "tiff":
        with quiet(), rasterio.open(path, "r+") as file:
            file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=target.replace("&quot;", '"'))
    elif place == "child elements":
        item = f"<MDI><key>OVERVIEW_FILE</key>{target}</MDI><domain>OVERVIEWS</domain>"
        item = f"<Metadata>{item}</Metadata>"
        path = recipe(folder, item)
    else:
        (folder / "a.tif.aux.xml").write_text(f"<PAMDataset>{item}</PAMDataset>")
        path = recipe(folder) if place != "aux.xml" else path
    refused(path, "not a local file|outside|inside <mdi>")


def test_sidecars_that_are_no_ordinary_files(folder: Path) -> None:
    for name in ("a.tif.ovr", "a.tif.msk", "a.tfw", "a.tif.aux.xml"):
        os.mkfifo(folder / name)
        refused(folder / "a.tif", "not a regular file")
        (folder / name).unlink()
    (folder / "a.tif.ovr").symlink_to("../outside.tif")
    refused(folder / "a.tif", "outside")
    (folder / "a.tif.ovr").unlink()
    (folder / "a.tif.ovr").write_text(vrt(folder / "x.vrt", "a.tif", relative=True).read_text())
    refused(folder / "a.tif", "not a TIFF")


def test_overviews_and_masks_beside_an_image_are_still_used(folder: Path) -> None:
    path = write(folder / "b.tif", noise(3, 600, 600))
    with quiet(), rasterio.Env(TIFF_USE_OVR=True), rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4])
    with quiet(), rasterio.open(path, "r") as file:
        assert (folder / "b.tif.ovr").exists()
    with Raster.open(path) as raster:
        assert raster.info.overviews == (2, 4)
    (folder / "b.tif.aux.xml").write_text(
        '<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">'
        ":::BASE:::a.tif</MDI></Metadata></PAMDataset>"
    )
    read_all(path)


def test_xml_costs_no_more_than_its_bytes(folder: Path) -> None:
    (folder / "a.tif.aux.xml").write_bytes(b"<a>" * 3_000_000)
    refused(folder / "a.tif", "more than|nested deeper")
    (folder / "a.tif.aux.xml").write_bytes(b"<a>" * 100_000)
    refused(folder / "a.tif", "nested deeper")
    (folder / "a.tif.aux.xml").unlink()
    recipe(folder).write_bytes(b"<VRTDataset>" + b"<b/>" * 600_000 + b"</VRTDataset>")
    refused(folder / "v.vrt", "XML elements")


def test_vrts_inside_vrts_are_looked_at_once(folder: Path) -> None:
    """6 ** 7 paths, 36 files."""
    for level in range(6):
        for each in range(6):
            named = [f"{level + 1}_{k}.vrt" if level < 5 else "a.tif" for k in range(6)]
            sources = "".join(
                f"<SimpleSource>{SOURCE.replace('a.tif', name)}<SourceBand>1</SourceBand>"
                "</SimpleSource>"
                for name in named
            )
            (folder / f"{level}_{each}.vrt").write_text(
                '<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" '
                f'band="1">{sources}</VRTRasterBand></VRTDataset>'
            )
    start = time.monotonic()
    refused(folder / "0_0.vrt", "46656 sources")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "inside",
    [
        "<ColorInterp>Palette</ColorInterp><ColorTable><Entry c1='300' c2='-1'/></ColorTable>",
        "<ColorInterp>Palette</ColorInterp><ColorTable><Entry c1='1' c2='2' c3='3' c4='255'/>"
        "</ColorTable>",
        "<NoDataValue>1e400</NoDataValue>",
        "<Scale>nan</Scale>",
    ],
)
@pytest.mark.parametrize("dtype", ["Byte", "Int16", "Float32", "Float64", "UInt32", "CInt16"])
def test_numbers_that_fit_nothing(folder: Path, inside: str, dtype: str) -> None:
    path = recipe(folder)
    text = (
        path.read_text()
        .replace('"Byte"', f'"{dtype}"')
        .replace("<SimpleSource>", inside + "<ComplexSource>")
    )
    shift = "<ScaleOffset>-3000</ScaleOffset><ScaleRatio>1e30</ScaleRatio></ComplexSource>"
    path.write_text(text.replace("</SimpleSource>", shift))
    with contextlib.suppress(ImageError):
        read_all(path)


def test_values_below_a_colour_table_are_hidden(folder: Path, recwarn: Any) -> None:
    path = recipe(folder)
    table = "<ColorInterp>Palette</ColorInterp><ColorTable><Entry c1='9' c2='9' c3='9' c4='255'/>"
    text = path.read_text().replace('"Byte"', '"Int16"').replace("SimpleSource", "ComplexSource")
    shift = "<ScaleOffset>-300</ScaleOffset><ScaleRatio>1</ScaleRatio></ComplexSource>"
    text = text.replace("<ComplexSource>", table + "</ColorTable><ComplexSource>")
    path.write_text(text.replace("</ComplexSource>", shift))
    with Raster.open(path) as raster:
        assert not raster.read((64, 64), LevelWindow(0, 0, 64, 64)).any()
    assert not recwarn.list


def test_a_complex_alpha_band(folder: Path) -> None:
    path = recipe(folder)
    band = path.read_text().split("<VRTRasterBand")[1].split("</VRTDataset>")[0]
    second = band.replace('"Byte" band="1"', '"CInt16" band="2"').replace(
        "<SimpleSource>", "<ColorInterp>Alpha</ColorInterp><SimpleSource>"
    )
    path.write_text(
        path.read_text().replace("</VRTDataset>", f"<VRTRasterBand{second}</VRTDataset>")
    )
    refused(path, "complex")


def test_claims_of_size_cost_nothing(folder: Path) -> None:
    big = {"blockxsize": 16384, "blockysize": 16384, "compress": "deflate"}
    path = sparse(folder / "big.tif", 16384, 16384, **big)
    refused(path, "blocks of 16384x16384")
    refused(recipe(folder, source=SOURCE.replace("a.tif", "big.tif")), "blocks of 16384x16384")
    (folder / "g.asc").write_text(
        "ncols 100000\nnrows 100000\nxllcorner 0\nyllcorner 0\ncellsize 1\n1 2 3\n"
    )
    refused(folder / "g.asc", "too small to hold")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "j.jp2")
    content = (folder / "j.jp2").read_bytes()
    at = content.index(b"\xff\x4f\xff\x51") + 8
    side = 60_000
    assert 3 * side * side > MAX_TILE_SAMPLES
    claim = struct.pack(">6I", side, side, 0, 0, side, side) + struct.pack(">2I", 0, 0)
    (folder / "j.jp2").write_bytes(content[:at] + claim + content[at + len(claim) :])
    refused(folder / "j.jp2", "in tiles of 60000x60000")


def slow_image(path: Path) -> Path:
    """A file whose every window decodes it from the start: minutes at the finest level."""
    side = 8000
    with (
        quiet(),
        rasterio.open(
            path, "w", "GTiff", side, side, 1, dtype="uint8", compress="deflate", blockysize=side
        ) as file,
    ):
        file.write(np.zeros((1, side, side), np.uint8))
    return path


def test_a_deadline_ends_opening_and_reading(folder: Path) -> None:
    path = slow_image(folder / "slow.tif")
    start = time.monotonic()
    with pytest.raises(ReadStoppedError, match="within the time limit"):
        Raster.open(path, stop=lambda: True)
    with Raster.open(path) as raster:
        with pytest.raises(ReadStoppedError, match=str(path)):
            raster.read((8000, 8000), LevelWindow(0, 0, 8000, 8000), stop=lambda: True)
        # The next read is served when the one that was given up is over.
        assert raster.read((8000, 8000), LevelWindow(0, 0, 8, 8)).shape == (8, 8, 3)
    assert time.monotonic() - start < 60


def test_work_that_hangs_is_left_behind() -> None:
    thread, release = ImageThread("x.tif"), threading.Event()
    over = time.monotonic() + 0.2
    with pytest.raises(ReadStoppedError, match=r"x\.tif"):
        thread.run(release.wait, lambda: time.monotonic() > over)
    thread.end(lambda: None)
    with pytest.raises(ImageError, match="closed"):
        thread.run(lambda: 1)
    release.set()


def test_pieces_ask_whether_to_go_on() -> None:
    thread, steps = ImageThread("x.tif"), []

    def work() -> None:
        while True:
            check_stopped()
            steps.append(1)

    with pytest.raises(ReadStoppedError):
        thread.run(work, lambda: len(steps) > 3)
    thread.end(lambda: None)
    check_stopped()


def test_one_uncompressed_strip_is_not_read_again_for_every_window(folder: Path) -> None:
    side = 3000
    data = noise(3, side, side)
    strip = {"interleave": "band", "blockysize": side}
    path = write(folder / "strip.tif", data, **strip)
    source = GdalSource(path, 10)
    assert source.read([1, 2, 3], (0, 0, 8, 8))[0].shape == (3, 8, 8)
    read = _bytes_read()
    for row in range(0, side - 100, 100):
        got, _ = source.read([1, 2, 3], (row, row, row + 8, row + 8))
        np.testing.assert_array_equal(got, data[:, row : row + 8, row : row + 8])
    if read is not None:
        assert (_bytes_read() or 0) - read < 3 * data.nbytes
    source.close()


def _bytes_read() -> int | None:
    counts = Path("/proc/self/io")
    return int(counts.read_text().split()[1]) if counts.exists() else None


def test_large_codecs_that_decode_all_at_once(folder: Path) -> None:
    Image.fromarray(np.zeros((400, 500, 3), np.uint8)).save(folder / "w.webp")
    refused(folder / "w.webp", "decoded as a whole", limits=RasterLimits(in_memory_bytes=1000))


def test_a_photograph_is_the_same_from_memory_and_in_windows(folder: Path) -> None:
    data = np.moveaxis(noise(3, 300, 420), 0, -1)
    Image.fromarray(data).save(folder / "p.jpg", quality=90)
    with Image.open(folder / "p.jpg") as image:
        wanted = np.asarray(image) / np.float32(255)
    with Raster.open(folder / "p.jpg") as raster:
        got = raster.read((300, 420), LevelWindow(10, 20, 270, 300))
    np.testing.assert_allclose(got, wanted[10:280, 20:320], atol=1e-6)


DRIVERS = """
import rasterio
from lrs_edge.raster.gdal_env import DRIVERS, restrict_drivers
import os
os.environ["no_proxy"] = "localhost"
gone = restrict_drivers()
with rasterio.Env() as env:
    left = set(env.drivers())
assert gone == 0 or left <= {*DRIVERS, "MEM", "DERIVED"}, left
assert "GTiff" in left and "no_proxy" not in os.environ
assert restrict_drivers() == 0
print(gone)
"""


def test_the_command_line_unregisters_other_drivers() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVERS], capture_output=True, text=True, check=True
    )
    assert sys.platform == "win32" or int(done.stdout) > 20


def seeds(folder: Path) -> list[Path]:
    """Tiny files of the allowed formats."""
    data = noise(3, 24, 30)
    write(folder / "t.tif", data, compress="deflate", tiled=True, blockxsize=16, blockysize=16)
    write(folder / "s.tif", data, compress="lzw", overviews=(2,))
    picture = Image.fromarray(np.moveaxis(data, 0, -1))
    for name in ("p.png", "j.jpg", "b.bmp", "g.gif", "w.webp", "k.jp2", "m.ppm", "x.tga", "y.sgi"):
        picture.save(folder / name)
    for driver, name in (("NITF", "n.ntf"), ("HFA", "h.img"), ("ENVI", "e.dat"), ("RMF", "r.rsw")):
        write(folder / name, data, driver=driver)
    (folder / "c.asc").write_text(
        "ncols 4\nnrows 3\nxllcorner 0\nyllcorner 0\ncellsize 1\n1 2 3 4\n5 6 7 8\n9 1 2 3\n"
    )
    vrt(folder / "v.vrt", "t.tif", relative=True)
    named = ["t", "s", "p", "j", "b", "g", "w", "k", "m", "x", "y", "n", "h", "e", "r", "c", "v"]
    return [
        next(p for p in folder.iterdir() if p.stem == n and p.suffix not in (".hdr", ".xml"))
        for n in named
    ]


#: Numbers that break readers, as text and as bytes.
WORDS = (
    b"0", b"-1", b"1e308", b"nan", b"99999999999", b"/dev/zero", b"../a", b"<", b'"', b"&#0;",
    b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x01",
)  # fmt: skip


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(0, max(min(len(out), 1 << int(rng.integers(5, 14))), 1)))
        kind = int(rng.integers(0, 5))
        if kind == 0:
            out[at : at + 1] = bytes([int(rng.integers(0, 256))])
        elif kind == 1:
            word = WORDS[int(rng.integers(0, len(WORDS)))]
            out[at : at + len(word)] = word
        elif kind == 2:
            del out[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            out[at:at] = out[at : at + int(rng.integers(1, 40))]
        elif len(out) > 40:
            del out[int(rng.integers(20, len(out))) :]
    return bytes(out)


def fuzz(folder: Path, seed: int, rounds: int) -> dict[str, int]:
    """Opens and reads mutated files; counts how it ended."""
    rng, files = np.random.default_rng(seed), seeds(folder)
    (folder / "f").mkdir()
    write(folder / "f" / "t.tif", noise(3, 24, 30))
    counts = {"read": 0, "refused": 0, "stopped": 0, "lines": 0}
    for index in range(rounds):
        origin = files[index % len(files)]
        path = folder / "f" / f"x{origin.suffix}"
        path.write_bytes(mutated(origin.read_bytes(), rng))
        if origin.suffix == ".dat":
            header = mutated(origin.with_suffix(".hdr").read_bytes(), rng)
            (folder / "f" / "x.hdr").write_bytes(header)
        over = time.monotonic() + 5
        late = [False]

        def stop(over: float = over, late: list[bool] = late) -> bool:
            late[0] = time.monotonic() > over
            return late[0]

        try:
            with Raster.open(path, limits=RasterLimits(max_pixels=4_000_000), stop=stop) as raster:
                pixels = raster.read((20, 20), LevelWindow(0, 0, 20, 20), stop=stop)
            assert np.isfinite(pixels).all()
            counts["read"] += 1
        except ReadStoppedError:
            counts["stopped"] += 1
        except ImageError as error:
            counts["refused" if "\n" not in str(error) else "lines"] += 1
        for left in (folder / "f").glob("x*"):
            left.unlink()
        assert time.monotonic() < over + 5, origin.name
    return counts


def test_mutated_files_end_in_pixels_or_one_line(tmp_path: Path, capfd: Any) -> None:
    rounds = 340
    counts = fuzz(tmp_path, zlib.crc32(b"lrs-edge"), rounds)
    assert sum(counts.values()) == rounds
    assert counts["read"] > 20
    assert counts["refused"] > 20
    assert counts["stopped"] == counts["lines"] == 0
    assert capfd.readouterr().err == ""
