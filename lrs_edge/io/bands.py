"""Which bands of a file are shown as red, green and blue, from what the file says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrs_edge.errors import ImageError


@dataclass(frozen=True)
class BandChoice:
    """Bands of one file, 1-based as in GDAL.

    Attributes:
        shown: Bands shown as red, green, blue; or one band shown as grey.
        alpha: Band that hides pixels, or None; never one that is shown.
        palette: Whether the one band indexes the file's colour table.
        warning: What had to be guessed, or None.
    """

    shown: tuple[int, ...]
    alpha: int | None
    palette: bool
    warning: str | None = None


def choose_bands(colours: Sequence[str], requested: Sequence[int] | None) -> BandChoice:
    """Chooses the bands of a file.

    Args:
        colours: Colour interpretation of each band as rasterio names it (`red`, `gray`, `palette`,
            `alpha`, `undefined`, ...); at least one.
        requested: Bands asked for, 1-based: one (grey) or three (red, green, blue); None to choose.

    Raises:
        ImageError: `requested` has another length, or names a band that the file does not have.
    """
    alpha = colours.index("alpha") + 1 if "alpha" in colours else None
    if requested is not None:
        asked = tuple(requested)
        count = len(colours)
        if len(asked) not in (1, 3) or not all(_is_band(band, count) for band in asked):
            listed = ", ".join(f"{i + 1} ({colour})" for i, colour in enumerate(colours[:16]))
            raise ImageError(
                f"bands {list(asked)!r} cannot be shown: give one or three of the image's bands "
                f"{listed}{', ...' if count > 16 else ''}"
            )
        hiding = None if alpha in asked else alpha
        return BandChoice(asked, hiding, asked == (1,) and colours[0] == "palette")
    if all(name in colours for name in ("red", "green", "blue")):
        shown = tuple(colours.index(name) + 1 for name in ("red", "green", "blue"))
        return BandChoice(shown, alpha, False)
    data = [i + 1 for i, colour in enumerate(colours) if colour != "alpha"] or [1]
    if len(data) == 1:
        # A file that is nothing but opacity is shown as grey, not hidden by itself.
        return BandChoice((data[0],), alpha if alpha != data[0] else None, colours[0] == "palette")
    shown = tuple(data[:3]) if len(data) >= 3 else (data[0],)
    if len(data) == 3:
        # JPEG 2000 and plain TIFFs often do not name the colours of three bands; they are RGB.
        return BandChoice(shown, alpha, False)
    meaning = "red, green, blue" if len(shown) == 3 else "grey"
    return BandChoice(
        shown,
        alpha,
        False,
        f"the file does not say which of its {len(colours)} bands are red, green and blue; "
        f"{', '.join(map(str, shown))} is shown as {meaning} (choose others with bands)",
    )


def _is_band(band: object, count: int) -> bool:
    return isinstance(band, int) and not isinstance(band, bool) and 1 <= band <= count
