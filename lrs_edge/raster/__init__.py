"""Rasters: files, bands, masks, georeference, windows of any size."""

from lrs_edge.raster.raster import Raster

__all__ = ["Raster"]
