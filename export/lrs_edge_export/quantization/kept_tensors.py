"""Weights that are read once while a layer runs over many inputs."""

from __future__ import annotations

from collections.abc import Iterable

from lrs_edge_export.checkpoints.tensors import Array, Scoped


class KeptTensors:
    """A tensor source that keeps what was read until `forget`.

    Args:
        tensors: Where tensors come from.
    """

    def __init__(self, tensors: Scoped) -> None:
        self._tensors = tensors
        self._kept: dict[str, Array] = {}

    def names(self) -> Iterable[str]:
        """All names."""
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError when it is not there."""
        return self._tensors.shape(name)

    def read(self, name: str) -> Array:
        """One tensor as float32. Raises KeyError when it is not there."""
        if name not in self._kept:
            self._kept[name] = self._tensors.read(name)
        return self._kept[name]

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Some rows of a tensor; see `TensorSource.rows`. They are not kept."""
        return self._tensors.rows(name, start, stop)

    def stored(self, name: str) -> str:
        """The name that a tensor has in the checkpoint's files; see `TensorSource.stored`."""
        return self._tensors.stored(name)

    def forget(self) -> None:
        """Let go of everything that was read."""
        self._kept = {}
