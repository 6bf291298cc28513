"""PROJ's and GDAL's data files: those of rasterio's own wheel, whatever the environment names.

PostGIS, QGIS, conda and system packages set PROJ_LIB, PROJ_DATA and GDAL_DATA for everybody. Their
databases have another layout than the PROJ inside rasterio's wheel, which then knows no CRS. A
rasterio without data of its own (conda, Debian) keeps what the environment says.
"""

from __future__ import annotations

import os
from pathlib import Path

import rasterio
from rasterio._env import set_proj_data_search_path
from rasterio.crs import CRS
from rasterio.env import setenv
from rasterio.errors import CRSError

PROJ_VARIABLES = ("PROJ_DATA", "PROJ_LIB")
VARIABLES = (*PROJ_VARIABLES, "GDAL_DATA")


def own_data() -> Path | None:
    """The folder of rasterio's wheel that holds `proj_data` and `gdal_data`, or None."""
    folder = Path(rasterio.__file__).parent
    return folder if (folder / "proj_data" / "proj.db").is_file() else None


def foreign_variables() -> dict[str, str]:
    """Variables of the environment that name other data than rasterio's own, and their values."""
    folder = own_data()
    if folder is None:
        return {}
    own = [os.path.realpath(folder / name) for name in ("proj_data", "gdal_data")]
    named = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {name: value for name, value in named.items() if os.path.realpath(value) not in own}


def use_own_data() -> None:
    """Points PROJ and GDAL to rasterio's own data; call it inside `rasterio.Env`.

    Entering an `Env` makes rasterio follow the variables, so this comes after each.
    """
    foreign = foreign_variables()
    folder = own_data()
    if not foreign or folder is None:
        return
    if any(name in foreign for name in PROJ_VARIABLES):
        set_proj_data_search_path(str(folder / "proj_data"))
    if "GDAL_DATA" in foreign and (folder / "gdal_data").is_dir():
        setenv(GDAL_DATA=str(folder / "gdal_data"))


def database_problem() -> str:
    """Why PROJ knows no CRS, or an empty string; call it inside `gdal_env.environment()`."""
    try:
        CRS.from_epsg(4326)
    except CRSError as error:
        named = [f"{name}={os.environ[name]}" for name in PROJ_VARIABLES if name in os.environ]
        advice = f" (unset {' and '.join(named)})" if named else ""
        reason = " ".join(str(error).split())[:200]
        return f"PROJ cannot use its database{advice}: {reason}"
    return ""
