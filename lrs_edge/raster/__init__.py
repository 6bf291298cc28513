"""Rasters: any window of an image of any size, as a viewer would show it.

Read in this order: `raster.py` (the open image), `opening.py` (from a path to a source of pixels;
`references.py`, `claims.py` and `gdal_env.py` guard it), `source.py` (the contract of a source;
`gdal_source.py` and `pillow_source.py` keep it, `turned.py` and `pages.py` stand before it),
`appearance.py` (bands, masks, stretch: `bands.py`, `band_names.py`, `stretch.py`), `window.py` and
`resample.py` (one window at one size), `locating.py`, `georeference.py` and `footprint.py`
(places), `image_thread.py` (the thread in which GDAL works).
"""

from lrs_edge.raster.raster import Raster

__all__ = ["Raster"]
