"""What `doctor` says of TensorRT and TensorRT-RTX, and of the engines that were built for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from lrs_edge.commands.check import Check
from lrs_edge.engines.tensorrt.device import Gpu, open_device
from lrs_edge.engines.tensorrt.engine_cache import EngineCache
from lrs_edge.engines.tensorrt.library import MODULES, Library, find_library
from lrs_edge.errors import BackendError


def tensorrt_checks() -> Iterator[Check]:
    """Each library that is installed: whether it loads, finds a GPU, and has engines to run there.

    Neither is needed, so that nothing here is worse than a warning.
    """
    installed = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
    if not installed:
        yield Check("TensorRT", "ok", "not installed; it is needed for --device tensorrt alone")
    for name in installed:
        yield _library(name)


def _library(name: str) -> Check:
    try:
        library = find_library(name)
    except BackendError as error:
        return Check(name, "warn", str(error), "install it again, or use another --device")
    try:
        gpu = open_device().gpu
    except BackendError as error:
        # TensorRT measures kernels, so that it builds nothing either.
        does = "builds engines (--for), and runs none" if library.is_rtx else "cannot be used"
        detail = f"{library.version} {does}: {error}"
        return Check(name, "warn", detail, "needed for its --device alone: docs/tensorrt.md")
    try:
        library.start("Runtime")
    except BackendError as error:
        return Check(name, "warn", str(error), "needed for its --device alone: docs/tensorrt.md")
    found = engines_here(library, gpu)
    if not found:
        advice = f"lrs-edge build BUNDLE --device {name}"
        return Check(name, "ok", f"{library.version}, no engine for {gpu.name} yet", advice)
    size = sum(path.stat().st_size for path in found)
    folder = EngineCache().folder
    detail = (
        f"{library.version}, {len(found)} engines for {gpu.name}, {size / 1e6:.0f} MB, {folder}"
    )
    return Check(name, "ok", detail)


def engines_here(library: Library, gpu: Gpu) -> list[Path]:
    """Engines of all bundles in the cache that run on a GPU."""
    cache = EngineCache()
    if not cache.folder.is_dir():
        return []
    return [
        engine.path
        for bundle in sorted(cache.folder.iterdir())
        if bundle.is_dir()
        for engine in cache.of(bundle.name)
        if engine.record.library == library.name
        and not engine.record.differs(library, gpu)
        and engine.path.is_file()
    ]
