"""Protobuf's wire format without the protobuf package: reading with limits, and writing.

Reading is stricter than protobuf's own readers, so that no file means one thing here and another
there: fields of an unexpected type, groups, and single fields that come twice are errors, where
those readers would skip or merge them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """The data is not a message of the expected kind."""


class Span(NamedTuple):
    """A length-delimited value: its place in the data."""

    start: int
    end: int


class Field(NamedTuple):
    """How a field is encoded, and whether it may come more than once."""

    wire: int
    repeated: bool = False


class Reader:
    """Reads messages of one buffer.

    Args:
        data: The whole file.
        most_fields: Fields of all messages together, as a bound on time and memory.
    """

    def __init__(self, data: bytes, most_fields: int) -> None:
        self.data = data
        self._left = most_fields

    def message(self, span: Span, fields: Mapping[int, Field]) -> dict[int, list[int | Span]]:
        """Values of one message by field number, in the order of the file.

        Args:
            span: Where the message is.
            fields: All fields that it may have.

        Raises:
            WireError: The message is cut off, has other fields, or too many.
        """
        found: dict[int, list[int | Span]] = {}
        place, end = span
        while place < end:
            self._left -= 1
            if self._left < 0:
                raise WireError("it has too many fields")
            key, place = self._varint(place, end)
            number, wire = key >> 3, key & 7
            field = fields.get(number)
            if field is None:
                raise WireError(f"it has a field {number} that is not allowed here")
            value, place = self._value(wire, place, end)
            if place > end:
                raise WireError("it is cut off")
            # Numbers of a repeated field may be packed into one value.
            if wire != field.wire and not (field.repeated and wire == BYTES):
                raise WireError(f"its field {number} has another type")
            values = found.setdefault(number, [])
            if values and not field.repeated:
                raise WireError(f"its field {number} comes twice")
            values.append(value)
        return found

    def numbers(self, values: list[int | Span]) -> list[int]:
        """A repeated varint field as signed 64-bit integers, packed or not. Raises WireError."""
        found = []
        for value in values:
            if isinstance(value, Span):
                place = value.start
                while place < value.end:
                    self._left -= 1
                    if self._left < 0:
                        raise WireError("it has too many numbers")
                    number, place = self._varint(place, value.end)
                    found.append(signed(number))
            else:
                found.append(signed(value))
        return found

    def bytes(self, value: int | Span) -> bytes:
        """A length-delimited value's content. Raises WireError."""
        if not isinstance(value, Span):
            raise WireError("a number stands where text should be")
        return self.data[value.start : value.end]

    def text(self, value: int | Span) -> str:
        """A length-delimited value as text. Raises WireError."""
        try:
            return self.bytes(value).decode()
        except UnicodeDecodeError as error:
            raise WireError("it has text that is not UTF-8") from error

    def _value(self, wire: int, place: int, end: int) -> tuple[int | Span, int]:
        """A value of any type, and the place after it, which may be beyond the end."""
        if wire == BYTES:
            size, place = self._varint(place, end)
            return Span(place, place + size), place + size
        if wire == VARINT:
            return self._varint(place, end)
        if wire not in (FIXED32, FIXED64):
            raise WireError("it has a group")
        size = 4 if wire == FIXED32 else 8
        return int.from_bytes(self.data[place : place + size], "little"), place + size

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        if place < end and (byte := self.data[place]) < 0x80:
            return byte, place + 1
        value = shift = 0
        while True:
            if place >= end or shift > 63:
                raise WireError("it is cut off")
            byte = self.data[place]
            value |= (byte & 0x7F) << shift
            place += 1
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, place
            shift += 7


def signed(value: int) -> int:
    """A 64-bit pattern as a signed integer."""
    return value - (1 << 64) if value >> 63 else value


def number_field(number: int, value: int) -> bytes:
    """A varint field of a message; `value` >= 0."""
    return _encoded(number << 3 | VARINT) + _encoded(value)


def bytes_field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a message: bytes, or another message."""
    return _encoded(number << 3 | BYTES) + _encoded(len(content)) + content


def text_field(number: int, text: str) -> bytes:
    """A length-delimited field of a message: UTF-8 text."""
    return bytes_field(number, text.encode())


def _encoded(value: int) -> bytes:
    """A varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
