"""An answer as one picture: the image level by level, what was kept of it, and the words."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from lrs_edge.answer.answer import Answer, LevelReport, Region
from lrs_edge.pyramid.box import Box
from lrs_edge.reports.views import (
    PART,
    Compass,
    Views,
    compass,
    confidence_words,
    evidence_of,
    heat,
    scale_bar,
    shown,
)

#: Pixels of a panel's longer side, of what stands around it, and of letters.
PANEL = 440
MARGIN = 16
TEXT = 16
LINE = TEXT * 3 // 2
#: Panels in a row, and the narrowest column: captions of narrow images need room.
_ACROSS = 3
#: An image so much wider than high has one panel in a row, as wide as two.
_WIDE = 1.8
_NARROWEST = 300
#: Longest question and answer, in characters.
_LONGEST = 600

BACKGROUND = (255, 255, 255)
INK = (30, 30, 30)
FAINT = (110, 110, 110)
SEEN = (255, 255, 255)
EVIDENCE = (0, 220, 255)
OBJECT = (255, 90, 200)
#: Colours of the lowest and of the highest score.
HEAT = ((255, 238, 120), (230, 40, 0))
#: How much of a heated pixel is colour.
_OPACITY = 0.6
#: Light of what was not looked at, of 255.
_DARK = 95

_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class _Panel:
    picture: Image.Image
    caption: str


def to_png(answer: Answer, views: Views) -> bytes:
    """The bytes of a PNG."""
    stream = io.BytesIO()
    draw(answer, views).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def draw(answer: Answer, views: Views) -> Image.Image:
    """Question, one panel per level from coarse to fine, the best evidence from near, answer."""
    width, height = answer.image_size
    is_wide = width > _WIDE * height
    whole = views.overview(2 * PANEL + MARGIN if is_wide else PANEL)
    directions = compass(views.raster)
    panels = [
        _Panel(_level_panel(answer, level, whole), _caption(answer, level))
        for level in answer.levels
    ] or [_Panel(whole, "no level was searched")]
    across = 1 if is_wide else min(len(panels), _ACROSS)
    rows = [panels[start : start + across] for start in range(0, len(panels), across)]
    near = []
    for number, region in enumerate(evidence_of(answer)[: max(across, 2)], 1):
        size = region.bounds[2] - region.bounds[0]
        wide = f"{size:.0f} px"
        if directions is not None:
            wide += f", {size * directions.metres:,.3g} m"
        near.append(_Panel(_close_up(answer, region, views), f"evidence {number}: {wide} wide"))
    rows += [near] if near else []
    return _sheet(answer, rows, directions, whole.width / width)


def _level_panel(answer: Answer, level: LevelReport, whole: Image.Image) -> Image.Image:
    """The image with one level's tiles: looked at light, others dark; kept tokens coloured."""
    scale = (whole.width / answer.image_size[0], whole.height / answer.image_size[1])
    seen = [region for region in answer.regions if region.level == level.level]
    light = Image.new("L", whole.size, _DARK)
    pen = ImageDraw.Draw(light)
    for region in seen:
        pen.rectangle(_scaled(region.bounds, scale, whole), fill=255)
    panel = Image.composite(whole, Image.new("RGB", whole.size), light)
    panel = _heated(panel, answer, level.level, scale)
    pen = ImageDraw.Draw(panel)
    for region in seen:
        pen.rectangle(_scaled(region.bounds, scale, panel), outline=SEEN, width=1)
    for number, region in enumerate(evidence_of(answer), 1):
        _frame(pen, _scaled(region.bounds, scale, panel), EVIDENCE, str(number))
    return panel


def _close_up(answer: Answer, region: Region, views: Views) -> Image.Image:
    """The best tile with as many pixels as the image has, its kept tokens and objects outlined."""
    part = views.part(region.bounds, PART)
    x0, y0, x1, y1 = region.bounds
    growth = PANEL / max(part.width, part.height)
    size = (max(round(part.width * growth), 1), max(round(part.height * growth), 1))
    part = part.resize(size, Image.Resampling.BICUBIC)
    scale = (part.width / (x1 - x0), part.height / (y1 - y0))
    pen = ImageDraw.Draw(part)
    level = next((kept for kept in answer.kept if kept.level == region.level), None)
    for bounds in level.bounds if level else ():
        if _meet(bounds, region.bounds):
            pen.rectangle(_scaled(_moved(bounds, x0, y0), scale, part), outline=HEAT[1], width=1)
    for found in answer.objects:
        if not found.doubtful and _meet(found.bbox, region.bounds):
            box = _scaled(_moved(found.bbox, x0, y0), scale, part)
            _frame(pen, box, OBJECT, shown(found.label, 24))
    return part


def _heated(
    panel: Image.Image, answer: Answer, level: int, scale: tuple[float, float]
) -> Image.Image:
    """A panel under the colours of a level's kept tokens."""
    tokens = next((kept for kept in answer.kept if kept.level == level), None)
    if tokens is None:
        return panel
    colours = Image.new("RGB", panel.size)
    mask = Image.new("L", panel.size)
    pen, veil = ImageDraw.Draw(colours), ImageDraw.Draw(mask)
    for bounds, share in zip(tokens.bounds, heat(tokens.scores), strict=True):
        box = _scaled(bounds, scale, panel)
        pen.rectangle(box, fill=_colour(share))
        veil.rectangle(box, fill=round(255 * _OPACITY))
    return Image.composite(colours, panel, mask)


def _colour(share: float) -> tuple[int, int, int]:
    low, high = HEAT
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _sheet(
    answer: Answer, rows: list[list[_Panel]], directions: Compass | None, scale: float
) -> Image.Image:
    """All panels under the question and over answer and legend."""
    width = max(
        2 * _NARROWEST + 3 * MARGIN,
        *(MARGIN + sum(_column(panel) + MARGIN for panel in row) for row in rows),
    )
    inner = width - 2 * MARGIN
    question = _wrapped(f"Q: {shown(answer.question, _LONGEST)}", inner, _font(TEXT + 4))
    reply = _wrapped(f"A: {shown(answer.text, _LONGEST) or '(nothing)'}", inner, _font(TEXT + 4))
    small = _wrapped(_facts(answer), inner, _font())
    tall = [max(panel.picture.height for panel in row) + LINE + MARGIN for row in rows]
    height = (len(question) + len(reply)) * (LINE + 6) + len(small) * LINE + sum(tall)
    sheet = Image.new("RGB", (width, height + LINE * 2 + MARGIN * 4), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    top = _write(pen, question, MARGIN, _font(TEXT + 4), INK) + MARGIN // 2
    for row, high in zip(rows, tall, strict=True):
        left = MARGIN
        for panel in row:
            sheet.paste(panel.picture, (left, top))
            pen.text((left, top + panel.picture.height + 5), panel.caption, INK, _font())
            left += _column(panel) + MARGIN
        top += high
    _legend(pen, top, width, directions, scale)
    top = _write(pen, reply, top + LINE * 2 + MARGIN, _font(TEXT + 4), INK)
    _write(pen, small, top + 4, _font(), FAINT)
    return sheet


def _column(panel: _Panel) -> int:
    return max(panel.picture.width, _NARROWEST)


def _legend(
    pen: ImageDraw.ImageDraw, top: int, width: int, directions: Compass | None, scale: float
) -> None:
    """What colours mean; scale and north where they are known."""
    left, side, line = MARGIN, TEXT - 2, top
    for fill, outline, name in (
        ((190, 190, 190), FAINT, "tile looked at"),
        (BACKGROUND, EVIDENCE, "evidence, best first"),
        (BACKGROUND, OBJECT, "object found"),
    ):
        pen.rectangle((left, line + 2, left + side, line + 2 + side), fill, outline, 2)
        pen.text((left + side + 8, line), name, INK, _font())
        left += side + 28 + round(_font().getlength(name))
    left, line = MARGIN, top + LINE
    for step in range(60):
        pen.rectangle((left + step, line + 2, left + step, line + 2 + side), _colour(step / 59))
    pen.text((left + 68, line), "kept token, low to high score", INK, _font())
    if directions is None:
        return
    length, name = scale_bar(directions.metres / scale, PANEL / 3)
    right = width - MARGIN - 44
    bar = (right - length, line + TEXT - 2)
    pen.line((*bar, right, bar[1]), INK, 3)
    for end in (bar[0], right):
        pen.line((end, bar[1] - 5, end, bar[1] + 1), INK, 2)
    label = _font().getlength(name)
    pen.text((right - label, line - 10), name, INK, _font())
    _arrow(pen, (width - MARGIN - 18, top + LINE - 2), directions.north)


def _arrow(pen: ImageDraw.ImageDraw, centre: tuple[float, float], north: float) -> None:
    """An arrow to the north, with its letter at the tip."""
    turn = math.radians(north)
    across, up = (math.cos(turn), math.sin(turn)), (math.sin(turn), -math.cos(turn))

    def place(sideways: float, ahead: float) -> tuple[float, float]:
        return (
            centre[0] + sideways * across[0] + ahead * up[0],
            centre[1] + sideways * across[1] + ahead * up[1],
        )

    pen.polygon([place(0, 12), place(-7, -12), place(0, -7), place(7, -12)], fill=INK)
    pen.text(place(0, 21), "N", INK, _font(13), anchor="mm")


def _facts(answer: Answer) -> str:
    width, height = answer.image_size
    end = "" if answer.search_end == "finest_level" else f"; search ended by {answer.search_end}"
    cut = "" if answer.finish_reason == "stop" else f"; answer ended by {answer.finish_reason}"
    return (
        f"{confidence_words(answer)}; {len(answer.regions)} tiles of {width} x {height} pixels on "
        f"{len(answer.levels)} levels; {answer.tokens.sent} of {answer.tokens.seen} vision tokens "
        f"sent; {answer.timings.total:.1f} s; model {shown(answer.model, 60)}{end}{cut}"
    )


def _caption(answer: Answer, level: LevelReport) -> str:
    seen = sum(region.level == level.level for region in answer.regions)
    total = level.tile_rows * level.tile_cols
    return f"level {level.level}: {level.width} px wide, {seen} of {total} tiles"


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _moved(bounds: Box, x: float, y: float) -> Box:
    return bounds[0] - x, bounds[1] - y, bounds[2] - x, bounds[3] - y


def _scaled(
    bounds: Box, scale: tuple[float, float], panel: Image.Image
) -> tuple[int, int, int, int]:
    """A window in a panel, its last row and column included, one pixel at least."""
    x0, x1 = (round(min(max(bounds[i] * scale[0], 0), panel.width)) for i in (0, 2))
    y0, y1 = (round(min(max(bounds[i] * scale[1], 0), panel.height)) for i in (1, 3))
    x0, y0 = min(x0, panel.width - 1), min(y0, panel.height - 1)
    return x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)


def _frame(
    pen: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    colour: tuple[int, int, int],
    label: str,
) -> None:
    """An outline, and its label on a dark ground inside the top left corner."""
    pen.rectangle(box, outline=colour, width=2)
    size = _font(12)
    wide = round(size.getlength(label))
    pen.rectangle((box[0], box[1], box[0] + wide + 5, box[1] + 14), fill=INK)
    pen.text((box[0] + 3, box[1]), label, colour, size)


def _wrapped(text: str, width: int, font: _Font) -> list[str]:
    """Lines that fit a width in pixels; words that do not are cut."""
    lines, line = [], ""
    for whole in text.split(" "):
        word = whole
        while font.getlength(word) > width:
            fits = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width)
            lines += [line] if line else []
            lines.append(word[:fits])
            word, line = word[fits:], ""
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line] if line else lines


def _write(
    pen: ImageDraw.ImageDraw, lines: list[str], top: int, font: _Font, ink: tuple[int, int, int]
) -> int:
    """Write lines; returns the place below them."""
    step = LINE + 6 if font is not _font() else LINE
    for line in lines:
        pen.text((MARGIN, top), line, ink, font)
        top += step
    return top


_FONTS: dict[int, _Font] = {}


def _font(size: int = TEXT) -> _Font:
    """Pillow's own font: Latin letters only, and the same everywhere."""
    if size not in _FONTS:
        _FONTS[size] = ImageFont.load_default(size)
    return _FONTS[size]
