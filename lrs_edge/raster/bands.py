"""Which bands of a file are shown as red, green and blue, from what the file says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lrs_edge.errors import ImageError
from lrs_edge.raster.band_names import is_measured, named_bands

#: Names quoted in a warning at most.
_QUOTED = 8


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


def choose_bands(
    colours: Sequence[str],
    requested: Sequence[int] | None,
    names: Sequence[str | None] = (),
    wavelengths: Sequence[float | None] = (),
    tags: Mapping[str, str] | None = None,
) -> BandChoice:
    """Chooses the bands of a file: those asked for, else those named, else those coloured.

    Args:
        colours: Colour interpretation of each band as rasterio names it (`red`, `gray`, `palette`,
            `alpha`, `undefined`, ...); at least one.
        requested: Bands asked for, 1-based: one (grey) or three (red, green, blue); None to choose.
        names: Description of each band, or None.
        wavelengths: Central wavelength of each band in nanometres, or None.
        tags: Tags of the file, in which a satellite may be named.

    Raises:
        ImageError: `requested` has another length, or names a band that the file does not have.
    """
    alpha, note = _alpha_band(colours, names)
    if requested is not None:
        asked = _checked(requested, colours)
        hiding = None if alpha in asked else alpha
        return BandChoice(asked, hiding, asked == (1,) and colours[0] == "palette", note)
    named, several = named_bands(names, wavelengths, tags)
    coloured = tuple(
        colours.index(name) + 1 for name in ("red", "green", "blue") if name in colours
    )
    if named is not None:
        if len(coloured) == 3 and coloured != named:
            note = (
                f"the file's colours say that bands {_listed(coloured)} are red, green and blue, "
                f"its names ({_quoted(names)}) that {_listed(named)} are; the names are believed "
                "(choose others with bands)"
            )
        elif several:
            note = (
                f"several bands are named red, green or blue ({_quoted(names)}); {_listed(named)} "
                "are shown (choose others with bands)"
            )
        return BandChoice(named, None if alpha in named else alpha, False, note)
    if len(coloured) == 3:
        return BandChoice(coloured, alpha, False, note)
    data = [i + 1 for i, colour in enumerate(colours) if colour != "alpha" or alpha is None] or [1]
    if len(data) == 1:
        # A file that is nothing but opacity is shown as grey, not hidden by itself.
        hiding = alpha if alpha != data[0] else None
        return BandChoice((data[0],), hiding, colours[0] == "palette", note)
    shown = tuple(data[:3]) if len(data) >= 3 else (data[0],)
    told = [names[band - 1] for band in shown if band <= len(names)]
    if len(data) == 3 and not any(is_measured(name) for name in told):
        # JPEG 2000 and plain TIFFs often do not name the colours of three bands; they are RGB.
        return BandChoice(shown, alpha, False, note)
    meaning = "red, green, blue" if len(shown) == 3 else "grey"
    if any(names):
        doubt = (
            f"the names of the {len(colours)} bands ({_quoted(names)}) do not say for certain "
            "which are red, green and blue"
        )
    else:
        doubt = f"the file does not say which of its {len(colours)} bands are red, green and blue"
    return BandChoice(
        shown,
        alpha,
        False,
        f"{doubt}; {_listed(shown)} is shown as {meaning} (choose others with bands)",
    )


def _alpha_band(
    colours: Sequence[str], names: Sequence[str | None]
) -> tuple[int | None, str | None]:
    """The first band marked as alpha, unless its name says that it is none."""
    if "alpha" not in colours:
        return None, None
    alpha = colours.index("alpha") + 1
    name = names[alpha - 1] if alpha <= len(names) else None
    if not is_measured(name):
        return alpha, None
    return None, f"band {alpha} is marked as alpha but named {name!r}: it hides nothing"


def _checked(requested: Sequence[int], colours: Sequence[str]) -> tuple[int, ...]:
    asked, count = tuple(requested), len(colours)
    if len(asked) not in (1, 3) or not all(_is_band(band, count) for band in asked):
        listed = ", ".join(f"{i + 1} ({colour})" for i, colour in enumerate(colours[:16]))
        raise ImageError(
            f"bands {list(asked)!r} cannot be shown: give one or three of the image's bands "
            f"{listed}{', ...' if count > 16 else ''}"
        )
    return asked


def _is_band(band: object, count: int) -> bool:
    return isinstance(band, int) and not isinstance(band, bool) and 1 <= band <= count


def _listed(bands: Sequence[int]) -> str:
    return ", ".join(map(str, bands))


def _quoted(names: Sequence[str | None]) -> str:
    shown = [(name or "-")[:40] for name in names[:_QUOTED]]
    return ", ".join(shown) + (", ..." if len(names) > _QUOTED else "")
