"""Boxes of held-out real images, and what they can be trusted for.

`vhr10_rgb` boxes ten classes, `airport_338` airplanes, `simd552_640` some of the vehicles, aircraft
and boats that it shows. The first two are trusted for presence, absence and count, the last for
presence alone. All pictures of vhr10_rgb's test split were looked at: what they show without a box
is named below, and is neither asked about as absent nor counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the image."""

CLASSES = (
    *("airplane", "ship", "storage tank", "baseball diamond", "tennis court", "basketball court"),
    *("ground track field", "harbor", "bridge", "vehicle"),
)

SPLITS = {"vhr10_rgb": "test", "airport_338": "val", "simd552_640": "val"}
"""The folders of DATA and the split of each that no training has seen."""

_BOXED = {"vhr10_rgb": frozenset(CLASSES) - {"vehicle"}, "airport_338": frozenset({"airplane"})}
"""Classes that a folder boxes wherever they are."""

_SIMD = {
    **dict.fromkeys(("airliner", "chartered", "propeller", "trainer", "fighter"), "airplane"),
    **dict.fromkeys(("car", "van", "truck", "bus", "longvehicle"), "vehicle"),
    "boat": "ship",
}

_UNBOXED: dict[str, tuple[str, ...]] = {
    "ship": (
        *("269", "274", "279", "282", "284", "290", "312", "319", "324", "326", "327", "506"),
        *("503", "513", "517", "558"),
    ),
    "storage tank": ("177", "327", "541"),
    "baseball diamond": ("142", "144", "177", "197", "487", "498", "596"),
    "tennis court": ("251", "348", "498", "569"),
    "basketball court": ("142", "345", "348", "360"),
    "ground track field": ("126", "142", "149", "309", "319", "322", "345", "498"),
    "bridge": (
        *("086", "101", "144", "197", "212", "234", "238", "307", "309", "312", "322", "324"),
        *("327", "348", "349", "454", "464", "477", "482", "546", "584", "617"),
    ),
}
"""vhr10_rgb's test images that show, or may show, more of a class than is boxed."""

_NO_VEHICLE = frozenset({"064", "126", "347", "501", "503", "506", "513", "517"})
"""vhr10_rgb's test images in which no vehicle can be seen."""

_FALSE_COLOUR = frozenset(
    {*("371", "372", "373", "379", "381", "402", "406", "412"),
     *("421", "426", "427", "429", "439", "443")}
)  # fmt: skip
"""vhr10_rgb's test images of infrared light, with red or glowing green plants: left out."""


@dataclass(frozen=True)
class Labelled:
    """One image with its boxes.

    Attributes:
        folder: Folder of DATA.
        file: Path inside it.
        width: Pixels.
        height: Pixels.
        boxes: By class of `CLASSES`; only classes that are there.
    """

    folder: str
    file: str
    width: int
    height: int
    boxes: dict[str, tuple[Box, ...]]

    @property
    def image(self) -> str:
        """Path inside DATA."""
        return f"{self.folder}/{self.file}"

    @property
    def _number(self) -> str:
        return Path(self.file).stem

    @property
    def is_false_colour(self) -> bool:
        """Whether it shows infrared light as a colour."""
        return self.folder == "vhr10_rgb" and self._number in _FALSE_COLOUR

    def is_whole(self, name: str) -> bool:
        """Whether every instance of a class has a box."""
        if self.folder not in _BOXED or name not in _BOXED[self.folder]:
            return False
        return not (self.folder == "vhr10_rgb" and self._number in _UNBOXED.get(name, ()))

    def lacks(self, name: str) -> bool:
        """Whether a class is not in the picture, for certain."""
        if name in self.boxes:
            return False
        if name == "vehicle":
            return self.folder == "vhr10_rgb" and self._number in _NO_VEHICLE
        return self.is_whole(name)


def read(data: Path) -> list[Labelled]:
    """The held-out images of DATA, sorted by folder and file.

    Raises:
        OSError: A folder is not there.
    """
    found = []
    for folder, split in SPLITS.items():
        lines = (data / folder / "labels.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["split"] == split]
        for row in sorted(rows, key=lambda row: row["file"]):
            boxes: dict[str, list[Box]] = {}
            for thing in row["objects"]:
                name = _SIMD.get(thing["class"], thing["class"])
                if name in CLASSES:
                    boxes.setdefault(name, []).append(tuple(thing["bbox"]))
            whole = {name: tuple(each) for name, each in boxes.items()}
            image = Labelled(folder, row["file"], row["width"], row["height"], whole)
            if not image.is_false_colour:
                found.append(image)
    return found
