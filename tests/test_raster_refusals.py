"""Files that must be refused: each with one line that says what, which, and what to do."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from lrs_edge.errors import ImageError
from lrs_edge.pyramid.levels import LevelWindow
from lrs_edge.raster.raster import Raster, RasterLimits
from tests.rasters import noise, quiet, vrt, write


def read_all(path: Any, **options: Any) -> None:
    with Raster.open(path, **options) as raster:
        size = (raster.height, raster.width)
        raster.read(size, LevelWindow(0, 0, *size))


def refused(path: Any, match: str, **options: Any) -> str:
    """Opens, and reads all of it; the message of the error that must come."""
    with pytest.raises(ImageError, match=match) as caught:
        read_all(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name",
    [
        "https://example.com/a.tif",
        "s3://bucket/a.tif",
        "/vsicurl/https://example.com/a.tif",
        "/vsizip/a.zip/a.tif",
        "/vsimem/a.tif",
        "zip://a.zip!a.tif",
        "file:///etc/hostname",
    ],
)
def test_urls_and_virtual_paths(name: str) -> None:
    refused(name, "not a local file")


@pytest.mark.parametrize(
    "name", ["", "a\0b", "missing.tif", "NETCDF:a.nc:x", "<GDAL_WMS></GDAL_WMS>"]
)
def test_no_such_file(name: str) -> None:
    refused(name, "path")


def test_directory_and_devices(tmp_path: Path) -> None:
    refused(tmp_path, "is a directory")
    refused("/dev/null", "not a regular file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe", "not a regular file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_no_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(1, 8, 8))
    path.chmod(0)
    refused(path, "permissions")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"just some text\n" * 50, "no image that can be read"),
        (b"\x89PNG\r\n\x1a\n", "no image|cannot be opened|damaged"),
        (b"II*\0\xff\xff\xff\xff", "no image|cannot be opened|damaged"),
        (b"<html><body>404</body></html>", "XML or HTML"),
        (b"<GDAL_WMS><Service name='TMS'/></GDAL_WMS>", "XML or HTML"),
        (b'{"type": "FeatureCollection"}', "JSON"),
        (os.urandom(5000), "no image|cannot be opened"),
    ],
)
def test_no_image(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    assert str(path) in refused(path, match)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["tiled", "strips", "png", "jpg", "webp", "jp2"])
def test_truncated(tmp_path: Path, kind: str, share: float, capfd: Any) -> None:
    path = tmp_path / "image"
    data = noise(3, 400, 500)
    if kind in ("tiled", "strips"):
        tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64} if kind == "tiled" else {}
        write(path, data, compress="deflate", **tiles)
    else:
        form = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "jp2": "JPEG2000"}[kind]
        Image.fromarray(np.moveaxis(data, 0, -1)).save(path, form)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, "truncated|damaged|no image")
    assert capfd.readouterr().err == ""


def test_damage_inside_is_found_while_reading(tmp_path: Path, capfd: Any) -> None:
    path = write(
        tmp_path / "a.tif",
        noise(3, 512, 512),
        compress="deflate",
        tiled=True,
        blockxsize=128,
        blockysize=128,
    )
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = b"\xff" * 3000
    path.write_bytes(content)
    assert "cannot be decoded" in refused(path, "damaged")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "complex_int16"])
def test_complex_numbers(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.tif"
    with quiet(), rasterio.open(path, "w", "GTiff", 8, 8, 1, dtype=dtype):
        pass
    refused(path, "complex")


def sparse(path: Path, height: int, width: int, **options: Any) -> Path:
    """A file that claims a size and stores next to nothing."""
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "tiled": True, "bigtiff": "yes"}
    profile |= {"blockxsize": 512, "blockysize": 512, "sparse_ok": True} | options
    with quiet(), rasterio.open(path, "w", height=height, width=width, **profile):
        pass
    return path


def test_absurd_sizes(tmp_path: Path) -> None:
    side = {"blockxsize": 1 << 15, "blockysize": 1 << 15}
    refused(sparse(tmp_path / "a.tif", 1_000_000, 1_000_000, **side), "pixels")
    refused(sparse(tmp_path / "b.tif", 16, 1_000_001), "longest side")
    refused(sparse(tmp_path / "c.tif", 20_000, 20_000, **side), "blocks of 32768x32768")
    with Raster.open(sparse(tmp_path / "d.tif", 40_000, 100_000)) as raster:
        assert raster.read((400, 1000), LevelWindow(0, 0, 4, 4)).shape == (4, 4, 3)
    refused(tmp_path / "d.tif", "at most 100", limits=RasterLimits(max_pixels=100))


def test_too_many_bands(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", np.zeros((9, 8, 8), np.uint8))
    refused(path, "9 bands, not 1 to 8", limits=RasterLimits(max_bands=8))


def test_no_bands(tmp_path: Path) -> None:
    path = tmp_path / "a.vrt"
    path.write_text('<VRTDataset rasterXSize="8" rasterYSize="8"></VRTDataset>')
    refused(path, "0 bands|cannot be opened")


@pytest.fixture
def listener() -> Any:
    """A local server; the list holds what connected to it."""
    server = socket.create_server(("127.0.0.1", 0))
    calls: list[Any] = []

    def accept() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            calls.append(address)
            connection.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield server.getsockname()[1], calls
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)


def test_vrt_reaches_nothing_but_local_files(tmp_path: Path, listener: Any) -> None:
    port, calls = listener
    url = f"http://127.0.0.1:{port}/a.tif"
    wms = (
        f"&lt;GDAL_WMS&gt;&lt;Service name='TMS'&gt;&lt;ServerUrl&gt;{url}&lt;/ServerUrl&gt;"
        "&lt;/Service&gt;&lt;/GDAL_WMS&gt;"
    )
    service = tmp_path / "service.tif"
    service.write_text(wms.replace("&lt;", "<").replace("&gt;", ">"))
    path = tmp_path / "a.vrt"
    for source in (
        f"/vsicurl/{url}",
        f"&#x2F;vsicurl/{url}",
        url,
        wms,
        "/vsimem/x.tif",
        "/etc",
        "missing.tif",
        f"WMS:{url}",
    ):
        refused(vrt(path, source), "not a local file")
    refused(vrt(path, str(service)), "XML or HTML")
    refused(vrt(tmp_path / "loop.vrt", "loop.vrt", relative=True), "inside")
    path.write_text(f'<!DOCTYPE x [<!ENTITY a "{url}">]>\n' + vrt(path, "&a;").read_text())
    refused(path, "XML or HTML|document type")
    path.write_text("<VRTDataset rasterXSize='8'")
    refused(path, "well-formed")
    path.write_text(
        '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Byte" band="1" '
        'subClass="VRTDerivedRasterBand"><PixelFunctionType>f</PixelFunctionType>'
        "<PixelFunctionLanguage>Python</PixelFunctionLanguage></VRTRasterBand></VRTDataset>"
    )
    refused(path, "Python")
    assert calls == []


def test_sidecars_do_not_reach_the_network(tmp_path: Path, listener: Any) -> None:
    port, calls = listener
    path = write(tmp_path / "a.tif", noise(3, 600, 600))
    for target in (
        f"/vsicurl/http://127.0.0.1:{port}/o.tif",
        f"/vsicurl_streaming/http://127.0.0.1:{port}/o",
    ):
        (tmp_path / "a.tif.aux.xml").write_text(
            '<PAMDataset><Metadata domain="OVERVIEWS">'
            f'<MDI key="OVERVIEW_FILE">{target}</MDI></Metadata></PAMDataset>'
        )
        refused(path, "not a local file")
    service = f"<GDAL_WMS><Service name='TMS'><ServerUrl>http://127.0.0.1:{port}/${{z}}</ServerUrl>"
    (tmp_path / "a.tif.aux.xml").unlink()
    (tmp_path / "a.tif.ovr").write_text(
        service + "</Service><DataWindow><SizeX>300</SizeX><SizeY>300</SizeY></DataWindow>"
        "<BandsCount>3</BandsCount></GDAL_WMS>"
    )
    refused(path, "sidecar a.tif.ovr, which is not a TIFF")
    assert calls == []


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1), junk=st.binary(min_size=1, max_size=60), kind=st.sampled_from("tpj"))
def test_damaged_files_end_in_pixels_or_image_error(
    tmp_path: Path, place: float, junk: bytes, kind: str
) -> None:
    path = tmp_path / kind
    if not (tmp_path / f"{kind}0").exists():
        data = noise(3, 64, 80)
        if kind == "t":
            colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
            write(path, data, compress="lzw", colours=colours, overviews=(2,))
        else:
            Image.fromarray(np.moveaxis(data, 0, -1)).save(path, {"p": "PNG", "j": "JPEG"}[kind])
        path.rename(tmp_path / f"{kind}0")
    content = bytearray((tmp_path / f"{kind}0").read_bytes())
    start = int(place * len(content))
    content[start : start + len(junk)] = junk
    path.write_bytes(content)
    try:
        with Raster.open(path, limits=RasterLimits(max_pixels=10_000_000)) as raster:
            read = raster.read((20, 20), LevelWindow(0, 0, 20, 20))
    except ImageError:
        return
    assert np.isfinite(read).all()
    assert 0 <= read.min() <= read.max() <= 1


def test_sparse_file_reads_as_black(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.tif", 3000, 3000)
    with quiet(), rasterio.open(path, "r+") as file:
        file.write(np.full((1, 512, 512), 255, np.uint8), window=Window(0, 0, 512, 512))
    with Raster.open(path) as raster:
        read = raster.read((3000, 3000), LevelWindow(500, 500, 24, 24))
    assert (read[:12, :12] == 1).all()
    assert (read[12:, 12:] == 0).all()
