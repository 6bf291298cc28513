"""The authors' inference algorithm in plain PyTorch: the other side of the benchmarks.

Written after the description of their released code, quirks included, and as that code goes about
it: the whole image in memory, all levels built, dense padded sequences, nothing reused between
questions. It shares no code with the runtime; towers and decoder layers are the exporter's
PyTorch ones (`lrs_edge_export.torch_model`).
`tests/test_reference_torch.py` holds it to the authors' golden runs.

    from benchmarks.reference_torch import Reference
    reference = Reference(folder)                  # weights are read once, here
    answer = reference.ask("image.png", "What is this?", max_tokens=16)

Where it is kinder to the reference than the authors' code: attention is PyTorch's fused kernel,
logits are computed for the last place only, the image is normalised in place.
"""

from benchmarks.reference_torch.image import Levels, open_levels
from benchmarks.reference_torch.pipeline import Reference, ReferenceAnswer

__all__ = ["Levels", "Reference", "ReferenceAnswer", "open_levels"]
