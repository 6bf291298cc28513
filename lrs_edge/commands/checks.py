"""What this machine can run: one check after another, each with what to do about it.

Knows packages, providers, devices and memory; prints nothing.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from lrs_edge.commands.check import Check
from lrs_edge.commands.device_checks import gpu_checks, placement_check, provider_checks
from lrs_edge.commands.tensorrt_checks import tensorrt_checks
from lrs_edge.engines.cores import available_cores
from lrs_edge.engines.install import install_advice
from lrs_edge.errors import BackendError, BundleError, LrsEdgeError
from lrs_edge.requests.memory import machine_memory

#: Distributions that install the module `onnxruntime`; two of them overwrite each other.
ONNXRUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)

_PACKAGES = ("numpy", "tokenizers", "safetensors", "msgspec", "pillow", "click", "rich")
_LITTLE_MEMORY = 1 << 30


def run_checks() -> list[Check]:
    """Look at everything. Nothing here raises: a check that fails is a finding."""
    checks = [_python(), _lrs_edge()]
    checks += [_package(name) for name in _PACKAGES]
    checks += [_rasterio(), *_proj(), *_onnxruntime(), *gpu_checks()]
    checks += [*tensorrt_checks(), _memory()]
    checks += [_default_model(), *placement_check()]
    return checks


def _python() -> Check:
    system = f"{platform.system()} {platform.machine()}"
    return Check("python", "ok", f"{platform.python_version()} on {system}")


def _lrs_edge() -> Check:
    installed = _version("lrs-edge")
    if installed is None:
        return Check(
            "lrs-edge", "warn", "running from a checkout", "pip install -e '.[cpu]' to install it"
        )
    return Check("lrs-edge", "ok", installed)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Check:
    installed = _version(name)
    if installed is None:
        code = BackendError.exit_code
        return Check(name, "missing", "not installed", f"pip install {name}", code)
    return Check(name, "ok", installed)


def _rasterio() -> Check:
    try:
        rasterio = importlib.import_module("rasterio")
    except ImportError as error:
        return Check(
            "rasterio",
            "missing",
            f"does not load ({error})",
            "pip install rasterio",
            BackendError.exit_code,
        )
    return Check("rasterio", "ok", f"{rasterio.__version__} with GDAL {rasterio.__gdal_version__}")


def _proj() -> Iterator[Check]:
    """Whether coordinates can be computed, and whose data PROJ reads."""
    try:
        from lrs_edge.raster.gdal_env import environment
        from lrs_edge.raster.proj_data import database_problem, foreign_variables

        with environment(Path("PROJ"), "used"):
            problem = database_problem()
    except (ImportError, LrsEdgeError):
        return  # told by the check of rasterio
    foreign = ", ".join(f"{name}={value}" for name, value in foreign_variables().items())
    if problem:
        advice = "unset PROJ_DATA and PROJ_LIB, or install rasterio with pip"
        yield Check("PROJ", "warn", f"{problem}; answers have no coordinates", advice)
    elif foreign:
        detail = f"{foreign} names another installation's data; rasterio's own are used instead"
        yield Check("PROJ", "warn", detail, "nothing for lrs-edge; other programs may need it")
    else:
        yield Check("PROJ", "ok", "knows coordinate reference systems")


def _onnxruntime() -> Iterator[Check]:
    found = {name: version for name in ONNXRUNTIMES if (version := _version(name))}
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    try:
        runtime = importlib.import_module("lrs_edge.engines.runtime").ort
        providers: list[str] = runtime.get_available_providers()
    # A half-overwritten installation fails in ways of its own, AttributeError among them.
    except Exception as error:
        yield Check(
            "onnxruntime",
            "missing",
            f"{listed or 'not installed'}; does not load ({type(error).__name__}: {error})",
            install_advice(),
            BackendError.exit_code,
        )
        return
    if len(found) > 1:
        names = " ".join(found)
        yield Check(
            "onnxruntime",
            "warn",
            f"{listed}: they install the same files over each other",
            f"pip uninstall -y {names}; then install one of the extras cpu and gpu",
        )
    else:
        yield Check("onnxruntime", "ok", listed or str(runtime.__version__))
    yield from provider_checks(providers)
    yield _integers()


def _integers() -> Check:
    """Whether products of integers with a known answer come out right on this processor."""
    from lrs_edge.engines.integer_check import integer_products

    name, advice = "integer products", "install another version of onnxruntime"
    try:
        found = integer_products()
    # onnxruntime's exceptions share no base class below Exception.
    except Exception as error:
        return Check(name, "warn", " ".join(str(error).split())[:200], advice)
    if found == "wrong":
        detail = "wrong: bundles in int8-dynamic or int8-static are refused"
        return Check(name, "missing", detail, advice, BackendError.exit_code)
    if found == "narrow":
        detail = "right for the weights of bundles that say exact_integers; no VNNI"
        return Check(name, "ok", detail)
    return Check(name, "ok", "right for all weights")


def _memory() -> Check:
    total, available = machine_memory()
    if total is None:
        return Check("memory", "warn", "cannot be read on this system")
    shown = available if available is not None else total
    detail = f"{shown / 1e9:.1f} of {total / 1e9:.1f} GB available, {available_cores()} CPU cores"
    if shown < _LITTLE_MEMORY:
        return Check("memory", "warn", detail, "close other programs, or use --max-tiles 16")
    return Check("memory", "ok", detail)


def _default_model() -> Check:
    from lrs_edge.bundle.bundle import default_bundle_path, open_bundle

    try:
        bundle = open_bundle(default_bundle_path())
    except (BundleError, ImportError) as error:
        code = BundleError.exit_code
        return Check(
            "default model",
            "missing",
            str(error).partition(";")[0],
            "install lrs-edge again, or use -m BUNDLE",
            code,
        )
    size = sum(entry.size for entry in bundle.manifest.files.values())
    detail = f"{bundle.manifest.name}, {size / 1e6:.0f} MB, every hash verified ({bundle.path})"
    return Check("default model", "ok", detail)


def exit_code(checks: list[Check]) -> int:
    """0 where `lrs-edge ask` can work; else the code of the first problem."""
    return next((check.exit_code for check in checks if check.exit_code), 0)
