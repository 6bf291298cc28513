"""Which labels make a background, and which must not be asked about beside which.

A label is one image's main content, not all of it: a picture of a school often shows a playground,
a commercial area has parking lots. Questions about such a label would have a wrong answer in
scenes where the other one lies, so they are not asked there, and the two are not planned together.
The tables name the 30 classes of AID; other labels simply have no entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

#: Labels that lie beside each other in one background, for each setting.
RURAL_GROUPS = (
    ("farmland", "meadow", "forest"),
    ("farmland", "bare land"),
    ("desert", "bare land"),
    ("mountain", "forest"),
    ("meadow", "forest"),
)
URBAN_GROUPS = (
    ("dense residential area", "medium residential area"),
    ("dense residential area", "commercial area"),
    ("industrial area", "commercial area"),
    ("medium residential area",),
)

#: What pictures of a label often show besides: those labels are not asked about beside it.
SHOWS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        label: frozenset(others.split(", "))
        for label, others in {
            "airport": "parking lot",
            "bare land": "desert, meadow, farmland, mountain",
            "bridge": "river, port",
            "center": "square, parking lot",
            "church": "square",
            "commercial area": "parking lot, square, center, church, school, park, stadium, "
            "dense residential area, medium residential area, industrial area",
            "dense residential area": "parking lot, church, school, park, square, playground, "
            "center, medium residential area, sparse residential area, commercial area",
            "desert": "bare land, mountain, beach",
            "farmland": "meadow, bare land, pond, sparse residential area",
            "forest": "mountain, meadow, park",
            "industrial area": "parking lot, storage tanks, commercial area, center, "
            "dense residential area, railway station",
            "meadow": "farmland, bare land, forest, park",
            "medium residential area": "parking lot, church, school, park, playground, pond, "
            "dense residential area, sparse residential area, commercial area, resort",
            "mountain": "forest, desert, bare land, meadow, river",
            "park": "pond, meadow, forest, square",
            "playground": "stadium",
            "port": "river, beach",
            "railway station": "parking lot",
            "resort": "pond, beach, park",
            "river": "bridge, pond",
            "school": "playground, baseball field, parking lot",
            "sparse residential area": "farmland, meadow, forest, bare land",
            "square": "center, park, parking lot, church",
            "stadium": "playground, baseball field, parking lot",
            "viaduct": "bridge",
        }.items()
    }
)

#: Labels that are taken for one another: what is asked for where the answer is no.
CONFUSED = (
    ("dense residential area", "medium residential area", "sparse residential area"),
    ("commercial area", "industrial area", "center", "railway station"),
    ("center", "square", "church", "stadium", "park", "school", "resort", "railway station"),
    ("pond", "river", "port", "beach", "bridge", "viaduct"),
    ("bridge", "viaduct"),
    ("playground", "baseball field", "stadium"),
    ("bare land", "desert", "farmland", "forest", "meadow", "mountain"),
    ("airport", "parking lot", "railway station", "industrial area", "storage tanks"),
)

#: Labels that are not a single thing: one tile may hold several, so they are never counted.
UNCOUNTED = frozenset(
    {"bare land", "desert", "farmland", "forest", "meadow", "mountain", "storage tanks"}
)


@dataclass(frozen=True)
class SceneRules:
    """What may lie and be asked about in one scene.

    Attributes:
        rural: Groups of labels; one group's labels may share a rural background.
        urban: The same for an urban background.
        shows: For each label, what its pictures often show besides.
        confused: Groups of labels that are taken for one another.
        uncounted: Labels that are never counted.
    """

    rural: tuple[tuple[str, ...], ...] = RURAL_GROUPS
    urban: tuple[tuple[str, ...], ...] = URBAN_GROUPS
    shows: Mapping[str, frozenset[str]] = field(default_factory=lambda: SHOWS)
    confused: tuple[tuple[str, ...], ...] = CONFUSED
    uncounted: frozenset[str] = UNCOUNTED

    def apart(self, label: str, others: Iterable[str]) -> bool:
        """Whether a label may be planned beside others: neither shows the other."""
        shown = self.shows.get(label, frozenset())
        return all(
            other not in shown and label not in self.shows.get(other, frozenset())
            for other in others
        )

    def hidden_by(self, labels: Iterable[str]) -> frozenset[str]:
        """These labels, and what their pictures may show besides."""
        held = frozenset(labels)
        return held.union(*(self.shows.get(label, frozenset()) for label in held))

    def confused_with(self, label: str) -> frozenset[str]:
        """Labels that are easily taken for this one, without itself."""
        groups = (frozenset(group) for group in self.confused if label in group)
        return frozenset().union(*groups) - {label}


#: The tables above.
DEFAULT_RULES = SceneRules()
