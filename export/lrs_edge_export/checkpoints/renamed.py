"""Tensors of another layout under the names that the canonical stages read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.tensors import Array, TensorSource, rows_shape


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor, such as the keys' in a fused projection of queries, keys and values.

    Attributes:
        name: Of the whole tensor.
        start: First row, along the first axis.
        stop: Row after the last.
    """

    name: str
    start: int
    stop: int


class Renamed:
    """A source whose tensors go by other names; nothing is copied, and nothing read twice.

    Args:
        source: Where the tensors are.
        names: What is read under each of the new names: a tensor of the source, or a piece of one.
            Tensors that are not named are not there.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str | Piece]) -> None:
        self._source = source
        self._names = dict(names)

    @classmethod
    def by_rules(cls, source: TensorSource, rules: Iterable[tuple[str, str]]) -> Renamed:
        r"""Rename by expressions.

        Args:
            source: Where the tensors are.
            rules: Expression for the start of a name, and what takes its place, as in `re.sub`. The
                first rule that fits is taken; a name that none fits stays as it is.

        Raises:
            ExportError: Two tensors get the same name.
        """
        chosen = [(re.compile(pattern), text) for pattern, text in rules]
        names: dict[str, str | Piece] = {}
        for name in source.names():
            found = next(((m, text) for rule, text in chosen if (m := rule.match(name))), None)
            new = name if found is None else found[0].expand(found[1]) + name[found[0].end() :]
            if new in names:
                raise ExportError(
                    f"the checkpoint has both {names[new]} and {name}, which are one tensor; save "
                    "it again with one of them"
                )
            names[new] = name
        return cls(source, names)

    def names(self) -> list[str]:
        """All names."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError when it is not there."""
        place = self._names[name]
        if isinstance(place, str):
            return self._source.shape(place)
        whole = self._source.shape(place.name)
        return rows_shape(place.name, whole, place.start, place.stop)

    def read(self, name: str) -> Array:
        """One tensor as float32. Raises KeyError when it is not there, ExportError when damaged."""
        place = self._names[name]
        if isinstance(place, str):
            return self._source.read(place)
        return self._source.rows(place.name, place.start, place.stop)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Some rows of a tensor; see `TensorSource.rows`."""
        place = self._names[name]
        if isinstance(place, str):
            return self._source.rows(place, start, stop)
        rows_shape(name, self.shape(name), start, stop)
        return self._source.rows(place.name, place.start + start, place.start + stop)

    def stored(self, name: str) -> str:
        """The name that a tensor has in the checkpoint's files. Raises KeyError."""
        place = self._names[name]
        return self._source.stored(place if isinstance(place, str) else place.name)
