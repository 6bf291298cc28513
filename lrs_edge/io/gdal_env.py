"""GDAL as lrs-edge runs it: bounded, local, quiet. Nothing is set outside a `with` block.

`environment()` is entered around every call into GDAL, in the thread that makes the call, because
rasterio keeps its settings per thread. Errors inside come out as `ImageError`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.session import DummySession

from lrs_edge.errors import ImageError

#: GDAL's block cache in bytes. It is one per process; rasterio restores its size afterwards.
CACHE_BYTES = 64 << 20

_OPTIONS: dict[str, str | int] = {
    "GDAL_CACHEMAX": CACHE_BYTES,
    # Sidecars (.ovr, .tfw, .aux.xml) are still found by name; the folder is not listed.
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",
    # A truncated JPEG or PNG is an error, not a grey half.
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "YES",
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",
    # No network and no code. Sidecars may name overviews anywhere, so that refusing URLs in paths
    # is not enough: what still reaches libcurl is sent to a proxy that does not exist.
    "GDAL_VRT_ENABLE_PYTHON": "NO",
    "GDAL_VRT_RAWRASTERBAND_ALLOWED_SOURCE": "SIBLING_OR_CHILD_OF_VRT_PATH",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
    "GDAL_HTTP_PROXY": "http://127.0.0.1:1",
    "GDAL_HTTP_TIMEOUT": "1",
    "GDAL_HTTP_MAX_RETRY": "0",
}

#: Formats that are opened: rasters in one local file, or one file and its sidecars.
DRIVERS = [
    "GTiff", "JPEG", "PNG", "JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID", "ECW", "MrSID", "NITF",
    "VRT", "WEBP", "JPEGXL", "AVIF", "HEIF", "BMP", "GIF", "BIGGIF", "PNM", "TGA", "HFA", "ENVI",
    "EHdr", "ERS", "PCIDSK", "PAux", "RMF", "SGI", "SRTMHGT", "DTED", "AAIGrid", "USGSDEM",
]  # fmt: skip


@contextmanager
def environment(path: Path, doing: str) -> Iterator[None]:
    """GDAL's settings for one call, errors translated.

    Args:
        path: The image, for messages.
        doing: What the call does, for messages ("opened", "decoded").

    Raises:
        ImageError: Whatever GDAL, rasterio or the file system raised inside.
    """
    try:
        # A dummy session: the default one would import boto3 where AWS keys are in the environment.
        with rasterio.Env(session=DummySession(), **_OPTIONS):
            yield
    except MemoryError:
        raise ImageError(
            f"{path} needs more memory to be {doing} than there is; convert it to a "
            "Cloud-Optimized GeoTIFF (gdal_translate -of COG)"
        ) from None
    except (RasterioError, CPLE_BaseError, OSError, ValueError, RuntimeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise ImageError(
            f"{path} cannot be {doing} ({cause}); it may be truncated or damaged: "
            "copy it again, or convert it with gdal_translate"
        ) from error


def local_file(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a plain local file that can be read.

    Raises:
        ImageError: A URL, a GDAL virtual path, a directory, a device, or a file that is missing,
            empty or unreadable.
    """
    name = os.fspath(path)
    if "://" in name or name.startswith(("/vsi", "\\vsi")):
        raise ImageError(f"{name} is not a local file; download it first and give its path")
    if "\0" in name or not name:
        raise ImageError(f"{name!r} is not a path; give the path of an image file")
    # Absolute, so that no file name can pass for one of GDAL's own prefixes (GTIFF_DIR:1:...).
    full = Path(os.path.abspath(name))
    try:
        str(full).encode()
        status = full.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{full} is a directory; give one image file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{full} is no regular file; give the path of an image file")
        if status.st_size == 0:
            raise ImageError(f"{full} is empty (0 bytes); copy or download it again")
        with full.open("rb"):
            pass
    except FileNotFoundError:
        raise ImageError(f"{full} does not exist; check the path") from None
    except PermissionError:
        raise ImageError(f"{full} may not be read by this user; check its permissions") from None
    except UnicodeError:
        raise ImageError(f"{full!r} has a name that is not valid Unicode; rename it") from None
    except OSError as error:
        raise ImageError(f"{full} cannot be read ({error.strerror}); check the path") from None
    return full
