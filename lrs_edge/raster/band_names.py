"""Which bands a file names red, green and blue: by words, by wavelengths, by codes of sensors.

Only what is certain is taken. `red edge`, `infrared`, `green_i` or `coastal_blue` are other bands;
`B4` is red in Sentinel-2 and Landsat 8 but near infrared in Landsat 5, so that bare codes count
only where the other bands' codes, or a tag of the file, say which sensor it was.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

Triple = tuple[int, int, int]

_WORDS = (
    "red rot rouge rojo roja rosso vermelho rood röd rød czerwony красный 红 红色 红光 紅 赤",
    "green grün gruen vert verde groen grön grønn grøn zielony зелёный зеленый 绿 绿色 绿光 綠 緑",
    "blue blau bleu azul blu azzurro blauw blå niebieski синий голубой 蓝 蓝色 蓝光 藍 青",
)
_COLOURS = {word: place for place, words in enumerate(_WORDS) for word in words.split()}
_LETTERS = {"r": 0, "g": 1, "b": 2}
#: Words beside a colour that leave it that colour.
_HARMLESS = frozenset(
    [
        "band",
        "bands",
        "bande",
        "banda",
        "kanal",
        "channel",
        "ch",
        "canal",
        "sr",
        "toa",
        "boa",
        "rrs",
        "surface",
        "reflectance",
        "reflectivity",
        "radiance",
        "dn",
        "nm",
        "um",
        "µm",
        "nanometer",
        "nanometers",
        "micrometer",
        "micrometers",
        "light",
        "visible",
        "vis",
        "colour",
        "color",
        "srgb",
        "mean",
        "median",
        "average",
        "composite",
        "mosaic",
        "central",
        "wavelength",
        "sentinel",
        "landsat",
        "planet",
        "planetscope",
        "skysat",
        "worldview",
        "geoeye",
        "pleiades",
        "spot",
        "naip",
        "msi",
        "oli",
        "etm",
        "tm",
        "scaled",
        "normalized",
        "corrected",
    ]
)
#: `B04`, `S2`, `LC08`, `665`, `10m`: numbers, and numbers after or before a few letters.
_CODE = re.compile(r"[a-z]{0,4}\d+[a-z]{0,2}")
#: Words that only a band of measurements bears: one so named is not an alpha.
_MEASURED = frozenset(
    [
        "nir",
        "nir1",
        "nir2",
        "infrared",
        "infrarot",
        "swir",
        "swir1",
        "swir2",
        "mir",
        "tir",
        "thermal",
        "rededge",
        "edge",
        "pan",
        "panchromatic",
        "dem",
        "dsm",
        "dtm",
        "elevation",
        "height",
        "ndvi",
        "ndwi",
        "evi",
        "vv",
        "vh",
        "hh",
        "hv",
        "coastal",
        "yellow",
        "cirrus",
        "pir",
    ]
)
_BAND_CODE = re.compile(r"(?:^|[^a-z0-9])b(0?\d{1,2})(a?)(?![a-z0-9])")
_BAND_NUMBER = re.compile(
    r"(?:^|[^a-z0-9])(?:b|band|banda|bande|kanal)[ _-]?0?(\d{1,2})(?![a-z0-9])"
)
_WAVELENGTH = re.compile(r"(\d+(?:[.,]\d+)?)\s*(nm|nanomet|um\b|µm|μm|micromet)")
_VISIBLE_NM = ((620.0, 655.0, 690.0), (525.0, 560.0, 595.0), (450.0, 485.0, 515.0))
#: Tags in which files name their satellite.
_SENSOR_TAGS = frozenset(
    [
        "SPACECRAFT_ID",
        "SPACECRAFT",
        "SPACECRAFT_NAME",
        "SATELLITE",
        "SATELLITEID",
        "PLATFORM",
        "PLATFORM_NAME",
        "MISSION",
        "MISSION_ID",
        "SENSOR",
        "SENSOR_ID",
        "SENSOR_TYPE",
        "INSTRUMENT",
    ]
)
_BLUE_IS_2 = re.compile(r"sentinel[-_ ]?2|\bs2[abc]\b|landsat[-_ ]?0?[89]|\bl[co]0[89]\b|\boli\b")
_BLUE_IS_1 = re.compile(r"landsat[-_ ]?0?[457]|\bl[te]0[457]\b|\b(?:etm|thematic mapper)\b")


def named_bands(
    names: Sequence[str | None],
    wavelengths: Sequence[float | None] = (),
    tags: Mapping[str, str] | None = None,
) -> tuple[Triple | None, bool]:
    """The bands, 1-based, that are named red, green and blue.

    Args:
        names: Description of each band, or None.
        wavelengths: Central wavelength of each band in nanometres, where the file's tags have it.
        tags: Tags of the file, looked at for the name of a satellite.

    Returns:
        Red, green, blue, or None where that is not certain of all three; and whether there are
        several of a kind, of which the first is taken.
    """
    words = [_tokens(name or "") for name in names]
    found, several = _by_word(words)
    if found is not None:
        return found, several
    for choice in (
        _by_wavelength([_wavelength(name, n, wavelengths) for n, name in enumerate(names)]),
        _by_code([(name or "").lower() for name in names], _sensor(tags or {})),
    ):
        if choice is not None:
            return choice, False
    return None, False


def is_measured(name: str | None) -> bool:
    """Whether a band's name says that it holds measurements, so that it cannot be opacity."""
    text = (name or "").lower()
    tokens = set(_tokens(text))
    return bool(
        tokens & _MEASURED
        or tokens & set(_COLOURS)
        or _BAND_CODE.search(text)
        or _WAVELENGTH.search(text)
    )


def _tokens(name: str) -> list[str]:
    """Lower-case words and codes: `RedEdge_1` is red, edge, 1; `redEdge`, `red-edge` likewise."""
    text = unicodedata.normalize("NFC", name)
    text = re.sub(r"(?<=[a-zäöüß])(?=[A-ZÄÖÜ])", " ", text).lower()
    return [word for word in re.split(r"[\W_]+", text) if word]


def _by_word(words: Sequence[list[str]]) -> tuple[Triple | None, bool]:
    candidates: list[list[tuple[int, int]]] = [[], [], []]
    for band, tokens in enumerate(words, 1):
        rest = [t for t in tokens if t not in _HARMLESS and not _CODE.fullmatch(t)]
        if len(rest) == 1 and rest[0] in _COLOURS:
            candidates[_COLOURS[rest[0]]].append((len(tokens), band))
    if not all(candidates):
        letters = [_LETTERS[t[0]] if len(t) == 1 and t[0] in _LETTERS else None for t in words]
        if sorted(place for place in letters if place is not None) != [0, 1, 2]:
            return None, False
        return (letters.index(0) + 1, letters.index(1) + 1, letters.index(2) + 1), False
    red, green, blue = (min(found)[1] for found in candidates)
    several = any(sorted(n for n, _ in found)[:2] == [min(found)[0]] * 2 for found in candidates)
    return (red, green, blue), several


def _wavelength(name: str | None, band: int, known: Sequence[float | None]) -> float | None:
    given = known[band] if band < len(known) else None
    match = _WAVELENGTH.search((name or "").lower())
    if given is not None or match is None:
        return given
    value = float(match[1].replace(",", "."))
    return value if match[2].startswith("n") else value * 1000


def _by_wavelength(known: Sequence[float | None]) -> Triple | None:
    found = []
    for low, middle, high in _VISIBLE_NM:
        inside = [
            (abs(nm - middle), band)
            for band, nm in enumerate(known, 1)
            if nm is not None and low <= nm <= high
        ]
        if not inside:
            return None
        found.append(min(inside)[1])
    return found[0], found[1], found[2]


def _sensor(tags: Mapping[str, str]) -> int | None:
    """Number of the blue band of the satellite that the tags name, or None."""
    text = " ".join(value for key, value in tags.items() if key.upper() in _SENSOR_TAGS).lower()
    if _BLUE_IS_2.search(text):
        return 2
    return 1 if _BLUE_IS_1.search(text) else None


def _by_code(names: Sequence[str], blue: int | None) -> Triple | None:
    codes = [_BAND_CODE.search(name) for name in names]
    if blue is not None:
        numbers = [_BAND_NUMBER.search(name) for name in names]
        places = {int(match[1]): band for band, match in enumerate(numbers, 1) if match}
    else:
        places = {int(m[1]): band for band, m in enumerate(codes, 1) if m and not m[2]}
        known = set(places)
        padded = {m[1] for m in codes if m} >= {"02", "03", "04"}
        # B8A is Sentinel-2's alone; so are 11 and 12 with gaps among the others. Beyond 12 bands
        # it is another sensor (Himawari's B03 is red).
        if any(m and m[2] for m in codes) or (
            max(known, default=0) <= 12
            and (padded or (known >= {11, 12} and known != set(range(1, 13))))
        ):
            blue = 2
        elif all("sr_b" in name for name, m in zip(names, codes, strict=True) if m) and known:
            # Collection 2 surface reflectance: only Landsat 8 and 9 have a band 6.
            blue = 2 if known >= {2, 3, 4, 6} else 1 if known == {1, 2, 3, 4, 5, 7} else None
    if blue is None or not places.keys() >= {blue, blue + 1, blue + 2}:
        return None
    return places[blue + 2], places[blue + 1], places[blue]
