"""`scripts/jetson_wheels.py`: what is asked of the package index for another machine."""

from __future__ import annotations

from packaging.requirements import Requirement

from scripts.jetson_wheels import JETPACKS, requirements


def test_markers_hold_there_and_not_here() -> None:
    """Packages of old Pythons are asked for where that Python is; JetPack's own never."""
    old = {Requirement(line).name for line in requirements(("cpu",), JETPACKS["6.2"])}
    new = {Requirement(line).name for line in requirements(("cpu",), JETPACKS["7.2"])}
    assert old - new == {"tomli"}
    assert {"onnxruntime", "numpy", "rasterio", "tokenizers"} <= new
    assert all(Requirement(line).marker is None for line in requirements((), JETPACKS["6.2"]))


def test_tensorrt_comes_with_jetpack() -> None:
    """The extra names it for other machines alone; what else it names is asked for."""
    names = {Requirement(line).name for line in requirements(("tensorrt",), JETPACKS["7.2"])}
    assert "tensorrt" not in names
    assert "onnx" in names
