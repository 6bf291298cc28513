"""Checkpoints to bundles: `lrs-edge export`.

The way of the data: `checkpoint` finds files, `tensors` reads weights one at a time, a family
reader (`llava_qwen`, `llava_llama`, `nano`) turns them into the canonical three `stages`,
`vision_graph` and `decoder_graph` write ONNX, `parity` compares with the PyTorch of `reference`,
`bundle_writer` puts it all together. Needs the `export` extra; the runtime imports none of it.
"""

from __future__ import annotations

from lrs_edge.export.bundle_writer import ExportOptions, ExportResult, Precisions, export_bundle

__all__ = ["ExportOptions", "ExportResult", "Precisions", "export_bundle"]
