"""How an image looks: which pixels are hidden, what is black and white, and what is doubtful.

Decided once per image from a sample of it, so that all windows agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lrs_edge.errors import ImageError
from lrs_edge.raster.bands import BandChoice
from lrs_edge.raster.source import ImageHeader, Source
from lrs_edge.raster.stretch import Tone, percentile_ranges
from lrs_edge.raster.window import WindowReader

#: What hides pixels: `auto` believes alpha, masks and nodata, but no alpha that holds data;
#: `apply` believes all; `ignore` shows every pixel.
Transparency = Literal["auto", "apply", "ignore"]
_TRANSPARENCIES: tuple[Transparency, ...] = ("auto", "apply", "ignore")

#: An 8-bit image without larger intensities in its sample is called dark.
_DARK = 24 / 255
_DARK_NOTE = "the image uses few of its 256 values and is shown nearly black; give a value range"
#: Pixels up to which an image without overviews is sampled only to find out whether it is dark.
_SMALL = 16_000_000
#: Shares of visible pixels below which the reader of an answer is told.
_HARDLY_VISIBLE, _MOSTLY_HIDDEN = 0.1, 0.5
#: An alpha band is none where more than this share of what it does not wholly hide is translucent.
_TRANSLUCENT = 0.5
#: ... in more degrees than this, or so that most of it is hidden; a drawing on a transparent
#: ground has soft edges, and shows less than this share of itself.
_DEGREES, _DRAWING = 16, 0.25


@dataclass(frozen=True)
class Appearance:
    """How one image is shown.

    Attributes:
        reader: Reads the bands shown, and what hides them.
        tone: From raw values to intensities.
        stretched: Whether `tone.ranges` differ from those of the file's type.
        warnings: What is doubtful, one line each.
    """

    reader: WindowReader
    tone: Tone
    stretched: bool
    warnings: tuple[str, ...]


def check_transparency(value: str) -> Transparency:
    """The value, if it is one.

    Raises:
        ImageError: It is none of `Transparency`.
    """
    for known in _TRANSPARENCIES:
        if value == known:
            return known
    raise ImageError(f"transparency {value!r} is unknown; use 'auto', 'apply' or 'ignore'")


def find_appearance(
    source: Source,
    choice: BandChoice,
    value_range: tuple[float, float] | None,
    transparency: Transparency,
) -> Appearance:
    """Looks at a sample of an image and decides how it is shown.

    Args:
        source: The open image.
        choice: Its bands.
        value_range: Black and white for all bands, or None to find them.
        transparency: What hides pixels.

    Raises:
        ImageError: The sample cannot be decoded.
    """
    header, hides = source.header, transparency != "ignore"
    # Each band is read once, however many channels show it.
    bands = list(dict.fromkeys(choice.shown))
    reader = WindowReader(source, bands, choice.alpha if hides else None, masked=hides)
    nodata = tuple(header.nodata[band - 1] if hides else None for band in bands)
    eight_bit = header.dtype(bands) == np.uint8
    stretched = not choice.palette and (value_range is not None or not eight_bit)
    if not _needs_sample(reader, header, nodata, choice, value_range):
        tone = _tone(header, choice, nodata, value_range, hides)
        return Appearance(reader, tone, stretched, ())

    everything = WindowReader(source, reader.read_bands, None, masked=hides)
    raw, mask = everything.sample(_SMALL if eight_bit or value_range is not None else None)
    notes = []
    if transparency == "auto" and reader.alpha is not None and _is_no_alpha(raw[-1]):
        notes.append(
            f"band {reader.alpha} is marked as alpha but holds values as of a band of data "
            "(near infrared?), not opacity: it hides nothing (with transparency 'apply' it does)"
        )
        reader = WindowReader(source, bands, None, masked=hides)
    shown, visible = reader.split(raw, mask)
    empty = False
    if choice.palette or value_range is not None or eight_bit:
        tone = _tone(header, choice, nodata, value_range, hides)
    else:
        ranges, empty = percentile_ranges(shown, visible, nodata)
        tone = Tone(_black_first(ranges, header, choice), nodata)
    planes, counts = tone.apply(shown, visible)
    hidden = _hidden_note(reader, header, nodata, visible, counts)
    if hidden:
        notes.append(hidden)
    elif empty:
        notes.append("a sample of a band has no valid pixel; give a value range")
    seen = planes if counts is None else planes[:, counts]
    looked_for = not stretched and not choice.palette and not any(header.bits)
    if looked_for and seen.size and seen.max() <= _DARK:
        notes.append(_DARK_NOTE)
    return Appearance(reader, tone, stretched, tuple(notes))


def _needs_sample(
    reader: WindowReader,
    header: ImageHeader,
    nodata: tuple[float | None, ...],
    choice: BandChoice,
    value_range: tuple[float, float] | None,
) -> bool:
    hiding = (
        reader.alpha is not None
        or (reader.masked and (header.has_mask or bool(header.masked_bands)))
        or any(value is not None for value in nodata)
    )
    if hiding or choice.palette:
        return hiding
    if header.dtype(reader.bands) != np.uint8:
        return value_range is None
    small = header.height * header.width <= _SMALL or bool(header.overviews)
    return value_range is None and small and not any(header.bits)


def _tone(
    header: ImageHeader,
    choice: BandChoice,
    nodata: tuple[float | None, ...],
    value_range: tuple[float, float] | None,
    hides: bool,
) -> Tone:
    """The tone of an image whose range need not be found."""
    bands = list(dict.fromkeys(choice.shown))
    if choice.palette and header.palette is not None:
        palette: NDArray[np.float32] = (header.palette / 255).astype(np.float32)
        if not hides:
            palette[:, 3] = 1
        return Tone(((0.0, 1.0),), nodata, palette)
    bits = [header.bits[band - 1] if header.bits else None for band in bands]
    full = tuple(value_range or (0.0, float(2 ** min(b or 8, 8) - 1)) for b in bits)
    return Tone(_black_first(full, header, choice), nodata)


def _black_first(
    ranges: tuple[tuple[float, float], ...], header: ImageHeader, choice: BandChoice
) -> tuple[tuple[float, float], ...]:
    """Low and high as black and white: exchanged where the file counts down from white."""
    if header.white_is_zero and choice.shown == (1,) and not choice.palette:
        return tuple((high, low) for low, high in ranges)
    return ranges


def _is_no_alpha(alpha: NDArray[Any]) -> bool:
    """Whether a band marked as alpha holds data: opacity is nearly always all or nothing."""
    eight_bit = alpha.dtype == np.uint8
    full = 255 if eight_bit else alpha.max()
    some = alpha[alpha > 0]
    if some.size <= _DRAWING * alpha.size:
        return False
    partial = some[some < full]
    if partial.size <= _TRANSLUCENT * some.size:
        return False
    hidden = np.count_nonzero(some < 128) if eight_bit else 0
    return bool(hidden > _MOSTLY_HIDDEN * some.size or len(np.unique(partial)) > _DEGREES)


def _hidden_note(
    reader: WindowReader,
    header: ImageHeader,
    nodata: tuple[float | None, ...],
    visible: NDArray[np.bool_] | None,
    counts: NDArray[np.bool_] | None,
) -> str | None:
    """What to say where little of the image can be seen."""
    if counts is None or not counts.size:
        return None
    share = np.count_nonzero(counts) / counts.size
    covered = 0.0 if visible is None else 1 - np.count_nonzero(visible) / visible.size
    causes = []
    if reader.alpha is not None:
        causes.append(f"alpha band {reader.alpha}")
    if reader.masked and (header.has_mask or header.masked_bands):
        causes.append("mask")
    values = {value for value in nodata if value is not None and not math.isnan(value)}
    causes += [f"nodata value {value:g}" for value in sorted(values)]
    cause = " and ".join(causes) or "values that are not finite"
    look_past = "transparency 'ignore' shows what they hide" if causes else "all else is black"
    if share == 0:
        return f"a sample of the image has no valid pixel: {cause} hides everything ({look_past})"
    if share < _HARDLY_VISIBLE:
        return f"only {share:.2%} of the image is visible, hidden by {cause} ({look_past})"
    if reader.alpha is not None and covered > _MOSTLY_HIDDEN:
        return f"{cause} hides {covered:.0%} of the image ({look_past})"
    return None
