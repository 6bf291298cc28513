"""The words that a vision token may carry, and what each source's boxes say about them.

A word is known at a token where the source says so: a box of it, or its absence from a picture
whose boxes of that word are complete. Everything else is left out of the loss.
"""

from __future__ import annotations

from common import SCENES

OBJECTS = (
    "airplane", "ship", "storage tank", "baseball diamond", "tennis court", "basketball court",
    "ground track field", "harbor", "bridge", "vehicle", "helicopter", "building", "tree", "road",
    "vegetation", "water", "bare land", "car", "van", "truck", "bus", "longvehicle", "airliner",
    "chartered", "trainer", "propeller",
)  # fmt: skip
PLACES = tuple(sorted(SCENES))
WORDS = (*OBJECTS, *PLACES)

COVERS = ("building", "land", "road", "vegetation", "water")
"""Land cover of dubai_cc0's masks, values 1 to 5, by its labels."""

BOXED = OBJECTS[:10]
"""Classes of vhr10_rgb."""

_AIRCRAFT = ("airliner", "chartered", "trainer", "propeller", "fighter")
_VEHICLES = ("car", "van", "truck", "bus", "minibus", "longvehicle", "stairtruck", "pushbacktruck")
_ALSO: dict[str, tuple[str, ...]] = {
    **{name: (name, "airplane") for name in _AIRCRAFT},
    **{name: (name, "vehicle") for name in _VEHICLES},
    "boat": ("ship",),
    "land": ("bare land",),
}
NATURAL = ("BareLand", "Desert", "Farmland", "Forest", "Meadow", "Mountain")
"""Scenes of AID in which none of the boxed classes but vehicles and bridges is found."""
_DRY = ("airplane", "ship", "storage tank", "baseball diamond", "tennis court", "basketball court",
        "ground track field", "harbor", "helicopter")  # fmt: skip
_HOUSES = ("DenseResidential", "MediumResidential", "SparseResidential")


def also(label: str) -> tuple[str, ...]:
    """Words that a box of this label shows."""
    return _ALSO.get(label, (label,))


def words_of(label: str) -> list[int]:
    """Their indices in `WORDS`."""
    return [WORDS.index(word) for word in also(label) if word in WORDS]


def absent_in(scene: str) -> tuple[str, ...]:
    """Objects that no picture of this class of AID shows."""
    if scene in NATURAL:
        return _DRY
    if scene in _HOUSES:
        return ("airplane", "storage tank", "harbor", "helicopter")
    return ("airplane",) if scene in ("Beach", "Mountain", "River", "Pond", "Church") else ()


def complete_of(folder: str, labelled: list[str], held: set[str]) -> list[str]:
    """Labels that are boxed densely in one picture: what is not boxed is not there.

    Args:
        folder: The source.
        labelled: Classes that the source says it boxes there.
        held: Classes that are boxed in this picture.
    """
    if folder == "vhr10_rgb":
        # Vehicles are boxed in some pictures only; there all of them.
        return [c for c in BOXED if c != "vehicle" or c in held]
    if folder == "airport_338":
        return ["airplane"]
    if folder == "open_objects":
        return [*labelled, "vehicle"] if "car" in labelled else list(labelled)
    return []
