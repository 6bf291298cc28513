"""Compared with: FastV, PyramidDrop, VisionZip, PruMerge, no pruning, the released code."""
