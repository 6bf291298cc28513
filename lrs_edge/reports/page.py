"""An answer as one HTML file that works offline: a map to pan and zoom, and the words.

Nothing is loaded from anywhere: pictures are data URLs, style and script stand in the file, and its
content security policy allows these two, by their hashes, and nothing else. Questions, answers and
names are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator
from html import escape
from importlib.resources import files

from PIL import Image

from lrs_edge.answer.answer import Answer, KeptTokens, LevelReport
from lrs_edge.answer.report import ImageFacts
from lrs_edge.pyramid.box import Box
from lrs_edge.reports.views import (
    OVERVIEW,
    PART,
    Compass,
    Views,
    compass,
    confidence_words,
    evidence_of,
    heat,
)

#: Tiles that are shown in more detail than the overview.
_MOST_PARTS = 24
_QUALITY = 82

#: Colours of kept tokens, from low to high scores: classes h0 to h4.
_HEATS = 5


def to_html(answer: Answer, facts: ImageFacts, views: Views) -> str:
    """The whole page."""
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    directions = compass(views.raster)
    body = "\n".join(
        [
            _words(answer),
            _controls(answer),
            _map(answer, views, directions),
            _legend(),
            _evidence(answer),
            _levels(answer),
            _facts(answer, facts, views),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(answer.question)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return files("lrs_edge.reports").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"


def _text(text: str) -> str:
    """Untrusted text: escaped, without control characters; directions stay in their element."""
    return escape("".join(char for char in text if char in "\n\t" or char.isprintable()))


def _words(answer: Answer) -> str:
    meter = ""
    if answer.confidence is not None:
        meter = (
            f'<meter min="0" max="1" low="0.6" high="0.8" optimum="1" '
            f'value="{answer.confidence:.4f}" aria-label="confidence"></meter> '
        )
    cut = {"timeout": ", cut by the time limit", "length": ", cut by --max-tokens"}
    return (
        f'<header>\n<h1 dir="auto">{_text(answer.question)}</h1>\n'
        f'<p class="answer" dir="auto">{_text(answer.text) or "(no answer)"}</p>\n'
        f'<p class="faint">{meter}{confidence_words(answer)}'
        f"{cut.get(answer.finish_reason, '')}</p>\n</header>"
    )


def _controls(answer: Answer) -> str:
    levels = "".join(
        f'<label><input type="radio" name="level" value="{level.level}"'
        f"{' checked' if level is answer.levels[-1] else ''}> {level.level}</label>"
        for level in answer.levels
    )
    layers = "".join(
        f'<label><input type="checkbox" id="layer-{name}"{checked}> {label}</label>'
        for name, checked, label in (
            ("dim", " checked", "darken the rest"),
            ("tile", " checked", "tiles"),
            ("heat", " checked", "tokens"),
            ("evidence", " checked", "evidence"),
            ("object", " checked", "objects"),
            ("doubtful", "", "doubtful objects"),
        )
    )
    every = "" if answer.levels else " checked"
    return (
        '<div class="bar">\n<fieldset><legend>Level, coarse to fine</legend>'
        f'<label><input type="radio" name="level" value="all"{every}> all</label>{levels}'
        f"</fieldset>\n<fieldset><legend>Show</legend>{layers}</fieldset>\n"
        '<button type="button" id="in" aria-label="Zoom in">+</button>'
        '<button type="button" id="out" aria-label="Zoom out">&minus;</button>'
        '<button type="button" id="all">Whole image</button>\n</div>'
    )


def _map(answer: Answer, views: Views, directions: Compass | None) -> str:
    width, height = answer.image_size
    around = ""
    if directions is not None:
        around = (
            '<div class="scale"><span></span><i></i></div>'
            '<svg class="north" viewBox="-20 -20 40 40" role="img" aria-label="North arrow">'
            f'<g transform="rotate({directions.north:.2f})">'
            '<path d="M0-8 6 12 0 8-6 12Z"/><text y="-9" text-anchor="middle" '
            'font-size="10">N</text></g></svg>'
        )
    metres = "" if directions is None else f' data-metres="{directions.metres:.9g}"'
    drawn = "".join(
        [
            _picture(views.overview(OVERVIEW), (0, 0, width, height)),
            *_parts(answer, views),
            *(_level(answer, level) for level in answer.levels),
            _objects(answer),
            _outlines(answer),
        ]
    )
    return (
        f'<div id="map" tabindex="0" role="application" data-width="{width}" '
        f'data-height="{height}"{metres} aria-label="The image. Arrow keys move it, plus and minus '
        'zoom, 0 shows all of it.">\n'
        f'<svg class="image" viewBox="0 0 {width} {height}" aria-hidden="true">{drawn}</svg>'
        f"{around}\n</div>\n"
        '<p class="faint">Drag or arrow keys move, wheel or + and &minus; zoom, 0 shows all.</p>'
    )


def _parts(answer: Answer, views: Views) -> Iterator[str]:
    """The best tiles looked at, where they hold more than the overview; finer ones on top."""
    finer = [
        region
        for region in answer.regions
        if region.kept and _finer(region.bounds, answer.image_size)
    ][:_MOST_PARTS]
    for region in reversed(finer):
        yield _picture(views.part(region.bounds, PART), region.bounds)


def _finer(bounds: Box, size: tuple[int, int]) -> bool:
    """Whether a tile is shown larger by itself than in the overview."""
    side = max(bounds[2] - bounds[0], bounds[3] - bounds[1])
    return side > 0 and min(PART / side, 1.0) > 1.2 * min(OVERVIEW / max(size), 1.0)


def _picture(picture: Image.Image, bounds: Box) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_QUALITY)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<image {_place(bounds)} preserveAspectRatio="none" href="data:image/jpeg;base64,{data}"/>'
    )


def _place(bounds: Box) -> str:
    x0, y0, x1, y1 = bounds
    return f'x="{x0:.6g}" y="{y0:.6g}" width="{x1 - x0:.6g}" height="{y1 - y0:.6g}"'


def _level(answer: Answer, level: LevelReport) -> str:
    """What was not looked at, tiles and kept tokens of one level."""
    width, height = answer.image_size
    seen = [region for region in answer.regions if region.level == level.level]
    # Holes in a dark sheet: tiles of a level never overlap.
    holes = "".join(_path(region.bounds) for region in seen)
    tiles = "".join(f'<rect class="tile" {_place(region.bounds)}/>' for region in seen)
    tokens = next((kept for kept in answer.kept if kept.level == level.level), None)
    return "".join(
        f'<g data-level="{level.level}" data-layer="{layer}"{hidden}>{content}</g>'
        for layer, hidden, content in (
            # What was not looked at is dark on one level only: the script shows it.
            (
                "dim",
                ' display="none"',
                f'<path class="dim" fill-rule="evenodd" d="M0 0H{width}V{height}H0Z{holes}"/>',
            ),
            ("heat", "", "" if tokens is None else _heats(tokens)),
            ("tile", "", tiles),
        )
    )


def _heats(tokens: KeptTokens) -> str:
    """Kept tokens as one path for each of five colours."""
    paths = [""] * _HEATS
    for bounds, share in zip(tokens.bounds, heat(tokens.scores), strict=True):
        paths[min(int(share * _HEATS), _HEATS - 1)] += _path(bounds)
    return "".join(
        f'<path class="heat h{place}" d="{path}"/>' for place, path in enumerate(paths) if path
    )


def _path(bounds: Box) -> str:
    x0, y0, x1, y1 = bounds
    return f"M{x0:.6g} {y0:.6g}H{x1:.6g}V{y1:.6g}H{x0:.6g}Z"


def _outlines(answer: Answer) -> str:
    marks = "".join(
        f'<rect class="evidence" {_place(region.bounds)}><title>evidence {number}</title></rect>'
        for number, region in enumerate(evidence_of(answer), 1)
    )
    return f'<g data-always data-layer="evidence">{marks}</g>'


def _objects(answer: Answer) -> str:
    """What the detector found, the doubtful ones in a group of their own."""
    marks = {"object": "", "doubtful": ""}
    for found in answer.objects:
        marks["doubtful" if found.doubtful else "object"] += (
            f'<rect class="object{" doubtful" if found.doubtful else ""}" {_place(found.bbox)}>'
            f"<title>{_text(found.label)} {found.score:.2f}</title></rect>"
        )
    return "".join(
        f'<g data-always data-layer="{layer}">{drawn}</g>' for layer, drawn in marks.items()
    )


def _legend() -> str:
    keys = (
        ("tile", "tile looked at"),
        ("heat", "kept token, low to high score"),
        ("evidence", "evidence"),
        ("object", "object found (dashed: doubtful)"),
    )
    return (
        '<p class="bar">'
        + "".join(f'<span><i class="key k-{name}"></i>{label}</span>' for name, label in keys)
        + "</p>"
    )


def _evidence(answer: Answer) -> str:
    """A table of the best tiles; its buttons show them on the map."""
    rows = []
    for number, region in enumerate(evidence_of(answer), 1):
        box = " ".join(f"{value:.6g}" for value in region.bounds)
        place = ""
        if region.centre_wgs84 is not None:
            place = "{1:.6f}, {0:.6f}".format(*region.centre_wgs84)
        x0, y0, x1, y1 = (round(value) for value in region.bounds)
        rows.append(
            f'<tr><td><button type="button" data-box="{box}">Show {number}</button></td>'
            f"<td>{region.level}</td><td>{x0}..{x1}, {y0}..{y1}</td><td>{region.score:.3f}</td>"
            f"<td>{region.tokens_kept}</td><td>{place}</td></tr>"
        )
    if not rows:
        return "<h2>Evidence</h2>\n<p>No tile of the finest level was kept.</p>"
    return (
        '<h2>Evidence</h2>\n<div class="scroll"><table><thead><tr><th>tile</th><th>level</th>'
        "<th>x, y in pixels</th><th>score</th><th>tokens kept</th><th>latitude, longitude</th>"
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _levels(answer: Answer) -> str:
    rows = "".join(
        f"<tr><td>{level.level}</td><td>{level.width} &times; {level.height}</td>"
        f"<td>{level.tiles_encoded + level.tiles_from_cache} of "
        f"{level.tile_rows * level.tile_cols}</td><td>{level.tokens_scored}</td>"
        f"<td>{level.tokens_kept}</td></tr>"
        for level in answer.levels
    )
    return (
        '<h2>Search</h2>\n<div class="scroll"><table><thead><tr><th>level</th><th>pixels</th>'
        "<th>tiles looked at</th><th>tokens scored</th><th>tokens kept</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _facts(answer: Answer, facts: ImageFacts, views: Views) -> str:
    tokens, times = answer.tokens, answer.timings
    entries = [
        ("image", facts.path),
        ("size", f"{facts.width} x {facts.height} pixels"),
        ("CRS", facts.crs or "none"),
        ("pixel", "unknown" if facts.gsd is None else f"{facts.gsd:.3g} m"),
        ("model", f"{answer.model}, {answer.policy} policy, {answer.search} search"),
        ("search ended by", answer.search_end),
        ("tokens", f"{tokens.sent} vision tokens sent of {tokens.seen}, {tokens.text} of text"),
        ("time", f"{times.total:.2f} s"),
        *(("warning", warning) for warning in (*answer.warnings, *views.notes)),
    ]
    items = "".join(f'<dt>{name}</dt><dd dir="auto">{_text(value)}</dd>' for name, value in entries)
    return f"<h2>Facts</h2>\n<dl>{items}</dl>"
