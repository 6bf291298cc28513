"""What placement asks of ONNX Runtime, which is not imported before that.

Its graphs are run by `onnx.py`, its providers set by `providers.py`.
"""

from __future__ import annotations

from pathlib import Path

from lrs_edge.bundle.manifest import DecoderSpec, StageSpec
from lrs_edge.engines.base import BackendOptions, Graph
from lrs_edge.engines.install import gpu_advice, install_advice
from lrs_edge.errors import BackendError, out_of_memory
from lrs_edge.requests.memory import means_no_memory

#: Precisions whose products are computed in integers.
INTEGER_PRECISIONS = ("int8-dynamic", "int8-static")


def devices() -> tuple[str, ...]:
    """Devices of this onnxruntime, the fastest first. Raises BackendError where there is none."""
    try:
        from lrs_edge.engines import onnx
    except ImportError as error:
        if means_no_memory(error):
            raise out_of_memory("onnxruntime cannot be imported", error) from error
        raise BackendError(f"onnxruntime is not installed; {install_advice()}") from error
    return onnx.devices()


def absent(_device: str) -> str:
    """Why there is no CUDA, the one device that may be missing."""
    return f"this onnxruntime has no CUDA provider; {gpu_advice()}, or use --device cpu"


def load(path: Path, options: BackendOptions) -> Graph:
    """See `OnnxGraph.load`."""
    from lrs_edge.engines.onnx import OnnxGraph

    return OnnxGraph.load(path, options)


def provider_device(device: str) -> str:
    """The device of `onnxruntime:NAME`, under its shortest name. Raises BackendError."""
    devices()
    from lrs_edge.engines.providers import provider

    return provider(device).device


def has_driver() -> bool:
    """Whether NVIDIA's driver is here, so that it is worth saying why a GPU is left alone."""
    from lrs_edge.engines import providers

    return providers.has_driver()


def problem(spec: StageSpec, device: str) -> str:
    """What CUDA has no kernels for, as far as the manifest tells; the rest is found on loading.

    GroupQueryAttention has CUDA kernels for float16 only. In float32 it falls to the CPU inside of
    a CUDA session, where bound key/value buffers are copied once instead of at every run: the
    numbers are wrong from the second chunk on. Integers: DynamicQuantizeLinear has no kernel, and
    static ones are dequantized there, at .71 ms where float16 takes .46 (H100).
    """
    if device != "cuda":
        return ""
    remedy = (
        "Use --device cpu, or export the checkpoint for CUDA: lrs-edge export CHECKPOINT "
        "--target cuda -o BUNDLE"
    )
    if isinstance(spec, DecoderSpec) and spec.floats != "float16":
        return (
            "would answer wrongly on CUDA: its region focus module or language "
            "model computes in float32, for which ONNX Runtime's attention has no CUDA kernel. "
            f"{remedy}"
        )
    if spec.precision in INTEGER_PRECISIONS:
        return (
            f"has a stage in {spec.precision}, which ONNX Runtime's CUDA provider has no integer "
            f"products for: they would run on the CPU or in floats, slower than float16. {remedy}"
        )
    return ""
