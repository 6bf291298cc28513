"""Importing TensorRT or TensorRT-RTX, and what each of them says."""

from __future__ import annotations

import importlib
import importlib.util
from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import Any

from lrs_edge.errors import BackendError, UsageError, out_of_memory
from lrs_edge.requests.memory import means_no_memory

#: Names of both, as `--device` takes them, and the packages they are imported from.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

#: How to get them.
_ADVICE = {
    "tensorrt": "on a Jetson it comes with JetPack (apt install python3-libnvinfer, and a virtual "
    "environment made with --system-site-packages); elsewhere run: pip install '.[tensorrt]' where "
    "lrs-edge was installed from",
    "tensorrt-rtx": "run, where lrs-edge was installed from: pip install '.[tensorrt-rtx]'",
}

#: The first versions that graphs are written for, and those that update buffers in place.
OLDEST = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 7)}
_IN_PLACE = {"tensorrt": (10, 15), "tensorrt-rtx": (1, 7)}

#: How they say that memory has run out; "memory" alone stands in other errors, too.
_NO_MEMORY = (
    "out of memory",
    "outofmemory",
    "memory allocation",
    "insufficient memory",
    "could not be allocated",
    "cannot allocate memory",
)


@dataclass(frozen=True)
class Library:
    """One of both, imported.

    Attributes:
        name: `tensorrt` or `tensorrt-rtx`.
        module: The package.
        version: Such as `10.16.1.11`.
    """

    name: str
    module: Any
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.name == "tensorrt-rtx"

    def logger(self) -> Log:
        """The logger that keeps what the library says: one for the whole process.

        The library registers the first that it is given, warns of any other, and may go on using
        the first when whatever brought it is gone.
        """
        return _log_of(self.module)

    def start(self, kind: str) -> Any:
        """Its `Builder` or `Runtime`.

        Raises:
            BackendError: It cannot use CUDA here, which its Python package reports as a null
                pointer.
        """
        log = self.logger()
        log.clear()
        try:
            return getattr(self.module, kind)(log.handle)
        except (TypeError, RuntimeError) as error:
            reason = log.last_error() or " ".join(str(error).split())[:200]
            raise BackendError(
                f"{self.name} {self.version} does not start ({reason}): its CUDA must not be newer "
                "than the driver's; install one that is built for this driver, or use --device cpu"
            ) from error

    @property
    def updates_in_place(self) -> bool:
        """Whether it has TensorScatter and Attention, so that buffers stay where they are."""
        return self._numbers >= _IN_PLACE[self.name]

    @property
    def _numbers(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.split(".")[:2])

    def check_operators(self) -> None:
        """Raises BackendError where graphs need operators that this version lacks."""
        oldest = OLDEST[self.name]
        if self._numbers < oldest:
            wanted = ".".join(map(str, oldest))
            raise BackendError(
                f"{self.name} {self.version} is too old: graphs are written for {wanted} and "
                "later; update it (on a Jetson: JetPack 6.2 or later), or use --device cpu"
            )


def find_library(name: str) -> Library:
    """Import one of both.

    Raises:
        BackendError: It is not installed, or does not load; the message says what to do.
        UsageError: There is no such library.
    """
    if name not in MODULES:
        raise UsageError(f"there is no TensorRT called {name!r}; use {' or '.join(MODULES)}")
    try:
        module = importlib.import_module(MODULES[name])
        version = str(module.__version__)
        # NVIDIA's package on the public index is an empty shell where its libraries are missing.
        _ = module.Logger, module.Builder, module.Runtime
    except ModuleNotFoundError as error:
        raise BackendError(f"{name} is not installed: {_ADVICE[name]}") from error
    except Exception as error:
        if means_no_memory(error):
            raise out_of_memory(f"{name} cannot be imported", error) from error
        reason = " ".join(str(error).split())[:200]
        raise BackendError(
            f"{name} is installed but does not load ({reason}): {_ADVICE[name]}"
        ) from error
    return Library(name, module, version)


def installed_library() -> Library:
    """TensorRT where it is installed, else TensorRT-RTX.

    Raises:
        BackendError: Neither is.
    """
    for name, module in MODULES.items():
        if importlib.util.find_spec(module) is not None:
            return find_library(name)
    raise BackendError(
        f"neither tensorrt nor tensorrt-rtx is installed: {_ADVICE['tensorrt']}; "
        "on a GeForce RTX or RTX PRO also tensorrt-rtx: pip install '.[tensorrt-rtx]'"
    )


class Log:
    """What a library said: the last of its errors and warnings.

    Attributes:
        handle: The logger to give to the library.
    """

    def __init__(self, handle: Any, errors: deque[str]) -> None:
        self.handle = handle
        self._errors = errors

    def last_error(self) -> str:
        """The last errors on one line; empty where there was none."""
        return "; ".join(self._errors)[:400]

    def says_no_memory(self) -> bool:
        """Whether the last errors say that memory has run out."""
        return any(sign in self.last_error().lower() for sign in _NO_MEMORY)

    def clear(self) -> None:
        """Forget what was said."""
        self._errors.clear()


@cache
def _log_of(module: Any) -> Log:
    errors: deque[str] = deque(maxlen=2)
    severe = {module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR}

    class Keeping(module.ILogger):  # type: ignore[misc]
        """Keeps errors; nothing is written to the terminal, where an answer may stand."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in severe:
                errors.append(" ".join(message.split()))

    return Log(Keeping(), errors)
