"""Warnings about scenes that are unlike those a model was trained on."""

from __future__ import annotations

from collections.abc import Iterator

from lrs_edge.bundle.calibration import Domain
from lrs_edge.vision.colours import Colours, distance

_SO = "the answer, and its confidence, may be worth less than usual"


def domain_warnings(domain: Domain, gsd: float | None, colours: Colours | None) -> Iterator[str]:
    """One sentence for each way in which a scene is unlike the model's.

    Args:
        domain: What the model was trained on.
        gsd: Ground resolution of the image in metres a pixel, None where it is not known.
        colours: Of its global view, None where they are not known.
    """
    ranges = domain.resolutions
    if gsd is not None and ranges and not any(low <= gsd <= high for low, high in ranges):
        known = ", ".join(f"{low:g} to {high:g}" for low, high in ranges)
        yield (
            f"a pixel of the image measures {gsd:.3g} m, the model was trained on {known} m: {_SO}"
        )
    if domain.colours is not None and colours is not None:
        off = distance(colours, domain.colours)
        if off > domain.colours.limit:
            yield (
                "the image's colours are unlike those that the model was trained on (distance "
                f"{off:.1f}, usual up to {domain.colours.limit:.1f}; wrong --bands or --range?): "
                f"{_SO}"
            )
