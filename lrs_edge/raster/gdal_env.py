"""GDAL as lrs-edge runs it: bounded, local, quiet. Nothing is set outside a `with` block.

`environment()` is entered around every call into GDAL, in the thread that makes the call, because
rasterio keeps its settings per thread. Errors inside come out as `ImageError`.
"""

from __future__ import annotations

import ctypes
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import rasterio
import rasterio._env
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader
from rasterio.session import DummySession

from lrs_edge.errors import ImageError, LrsEdgeError
from lrs_edge.files import refuse_address
from lrs_edge.raster.codecs import missing_codec
from lrs_edge.raster.proj_data import use_own_data

#: GDAL's block cache in bytes. It is one per process; rasterio restores its size afterwards. Twice
#: what `window.py` reads side by side; more only fills up, the larger the image the more.
CACHE_BYTES = 16 << 20

_OPTIONS: dict[str, str | int] = {
    "GDAL_CACHEMAX": CACHE_BYTES,
    # Sidecars (.ovr, .tfw, .aux.xml) are still found by name; the folder is not listed.
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",
    # A truncated PNG is an error, not a grey half. So is a truncated JPEG, unless told otherwise;
    # what libjpeg merely warns of (stray bytes, as some cameras write) is read.
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",
    # A short file of raw pixels is an error, not black.
    "RAW_CHECK_FILE_SIZE": "YES",
    # No network and no code. `references.py` refuses what would lead there; what it overlooks finds
    # these closed, and libcurl a proxy that does not exist.
    "GDAL_VRT_ENABLE_PYTHON": "NO",
    "GDAL_VRT_ENABLE_RAWRASTERBAND": "NO",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
    "GDAL_HTTP_PROXY": "http://127.0.0.1:1",
    "GDAL_HTTP_TIMEOUT": "1",
    "GDAL_HTTP_MAX_RETRY": "0",
}

#: Formats that are opened: rasters in one local file, or one file and its sidecars. Not among them
#: are ERS, PAux and PCIDSK, whose headers name a file of pixels anywhere, and BIGGIF, which writes.
DRIVERS = [
    "GTiff", "JPEG", "PNG", "JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID", "ECW", "MrSID", "NITF",
    "VRT", "WEBP", "JPEGXL", "AVIF", "HEIF", "BMP", "GIF", "PNM", "TGA", "HFA", "ENVI",
    "EHdr", "RMF", "SGI", "SRTMHGT", "DTED", "AAIGrid", "USGSDEM",
]  # fmt: skip


def restrict_drivers() -> int:
    """Takes all drivers but `DRIVERS` out of GDAL, for the whole process, until it ends.

    For programs that read no other rasters with rasterio; the command line is one. Drivers are
    registered once per process, so that a library cannot do this for its caller. Without it other
    formats and services are closed by what `references.check_references` refuses.

    Returns:
        How many drivers were taken out; 0 where GDAL's own functions cannot be reached (Windows).
    """
    for name in ("no_proxy", "NO_PROXY"):
        os.environ.pop(name, None)
    with rasterio.Env(session=DummySession()):
        pass  # registers them
    gdal = _gdal()
    if gdal is None:
        return 0
    count, get = gdal.GDALGetDriverCount, gdal.GDALGetDriver
    name_of, deregister = gdal.GDALGetDriverShortName, gdal.GDALDeregisterDriver
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_int]
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    deregister.restype, deregister.argtypes = None, [ctypes.c_void_p]
    # MEM makes overviews of a VRT and the like, in memory.
    kept = {name.encode() for name in (*DRIVERS, "MEM", "DERIVED")}
    others = [each for each in map(get, range(count())) if name_of(each) not in kept]
    for each in others:
        deregister(each)
    return len(others)


def open_dataset(path: Path, directory: int | None = None, **options: int) -> DatasetReader:
    """A file opened by one of the allowed drivers; call it inside `environment`.

    Args:
        path: The file.
        directory: Of a TIFF, counted from 1; None for the first image.
        options: GDAL's open options.
    """
    name: Path | str = path
    if directory is not None:
        name = f"GTIFF_DIR:{directory}:{path}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        # A Path, not a string: rasterio would parse '#', '?' and schemes in a string.
        return DatasetReader(name, driver=DRIVERS, sharing=False, **options)


def overviews_of(dataset: DatasetReader) -> list[str]:
    """Files that a dataset's metadata names as its overviews, as GDAL would take them."""
    tags = dataset.tags(ns="OVERVIEWS")
    return [value for key, value in tags.items() if key.lower() == "overview_file" and value]


def named_overviews(path: Path) -> list[str]:
    """As `overviews_of`, of a file that is opened for it.

    Raises:
        ImageError: No allowed driver opens it.
    """
    with environment(path, "opened"), open_dataset(path) as dataset:
        return overviews_of(dataset)


@contextmanager
def environment(path: Path, doing: str, **options: str | int) -> Iterator[None]:
    """GDAL's settings for one call, errors translated.

    Args:
        path: The image, for messages.
        doing: What the call does, for messages ("opened", "decoded").
        options: Settings of this call beside those of all.

    Raises:
        ImageError: Whatever GDAL, rasterio or the file system raised inside.
    """
    # A dummy session: the default one would import boto3 where AWS keys are in the environment.
    settings = rasterio.Env(session=DummySession(), **(_OPTIONS | options))
    with image_errors(path, doing), settings, _quiet():
        use_own_data()
        yield


@cache
def _gdal() -> ctypes.CDLL | None:
    """The GDAL that rasterio has loaded; None where its functions cannot be found (Windows)."""
    try:
        library = ctypes.CDLL(rasterio._env.__file__)
        library.CPLPushErrorHandler.argtypes = [ctypes.c_void_p]
        library.GDALDeregisterDriver.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError):
        return None
    return library


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors inside are raised, not logged too, in this thread.

    rasterio's logging of them prints a traceback of its own where a message is not UTF-8.
    """
    gdal = _gdal()
    if gdal is None:
        yield
        return
    gdal.CPLPushErrorHandler(ctypes.cast(gdal.CPLQuietErrorHandler, ctypes.c_void_p))
    try:
        yield
    finally:
        gdal.CPLPopErrorHandler()


@contextmanager
def image_errors(path: Path, doing: str) -> Iterator[None]:
    """Every exception inside that is not this package's own comes out as `ImageError`.

    Args:
        path: The image, for messages.
        doing: What is done with it, for messages.

    Raises:
        ImageError: rasterio, GDAL, Pillow or NumPy could not deal with the file.
    """
    try:
        yield
    except (LrsEdgeError, ImportError):
        raise  # a library that is missing is not a fault of the image
    except MemoryError:
        raise ImageError(
            f"{path} needs more memory to be {doing} than there is; convert it to a "
            "Cloud-Optimized GeoTIFF (gdal_translate -of COG)"
        ) from None
    except Exception as error:  # of any kind: a damaged file breaks whatever takes its numbers
        cause = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        lacking = missing_codec(cause)
        if lacking is not None:
            raise ImageError(f"{path} cannot be {doing} ({cause}); {lacking}") from error
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
    refuse_address(name)
    if "\0" in name or not name:
        raise ImageError(f"{name!r} is not a path; give the path of an image file")
    # Absolute, so that no file name can pass for one of GDAL's own prefixes (GTIFF_DIR:1:...).
    try:
        full = Path(os.path.abspath(name))
    except FileNotFoundError:
        raise ImageError(
            f"{name} cannot be found: the current folder no longer exists; change to another"
        ) from None
    try:
        str(full).encode()
        status = full.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{full} is a directory; give one image file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{full} is not a regular file; give the path of an image file")
        if status.st_size == 0:
            raise ImageError(f"{full} is empty (0 bytes); copy or download it again")
        with full.open("rb"):
            pass
    except FileNotFoundError:
        raise ImageError(f"{full} does not exist; check the path") from None
    except PermissionError:
        raise ImageError(f"{full} may not be read by this user; check its permissions") from None
    except UnicodeError:
        raise ImageError(
            f"{str(full)!r} has a name that is not UTF-8 text, which GDAL's bindings cannot open; "
            "rename it, or give a link to it"
        ) from None
    except OSError as error:
        raise ImageError(f"{full} cannot be read ({error.strerror}); check the path") from None
    return full
