"""Reading image files: the parts behind `lrs_edge.raster`."""
