"""Predictions drawn: text beside a picture, boxes with masks and labels in it, a map of classes over it."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache

import matplotlib
import numpy as np
from matplotlib.font_manager import findfont, fontManager, get_font
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from vmamba.text import some

logger = logging.getLogger("vmamba")
_LEGEND = 12  # classes in it
BACKGROUND = "background"  # a class of this name is left as it is in the image
_COLOURS = (  # of S. Trubetskoy's distinct colours
    *("#e6194B", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4"),  # red, green, yellow, blue, orange, purple
    *("#42d4f4", "#f032e6", "#bfef45", "#fabed4", "#469990", "#9A6324"),  # cyan, magenta, lime, pink, teal, brown
)


def colour(number: int) -> tuple[int, int, int]:
    """Of a class or an object: the first ones are far apart, later ones in hue from their neighbours in number."""
    if number < len(_COLOURS):
        return ImageColor.getrgb(_COLOURS[number])
    red, green, blue, _ = matplotlib.colormaps["hsv"](number * 0.381966 % 1, bytes=True)
    return int(red), int(green), int(blue)


def _font(picture: Image.Image, lines: Sequence[str]) -> ImageFont.FreeTypeFont:
    """For the lines, in a size for the picture."""
    side = min(max(picture.size) / 45, min(picture.size) / 6)
    return ImageFont.truetype(_font_file(frozenset("".join(lines))), max(12, round(side)))


@cache
def _font_file(letters: frozenset[str]) -> str:
    """DejaVu Sans, which comes with matplotlib; where it lacks a letter, a font of this machine that has them all."""
    usual = findfont("DejaVu Sans")
    others = {each.fname for each in fontManager.ttflist if not each.name.startswith("Last Resort")}  # that is boxes
    for file in (usual, *sorted(others)):
        if letters <= _letters_of(file):
            return file
    logger.warning(
        "no font here has %s; pictures show boxes in their place (the JSON has the names), until a font such as Noto "
        "Sans CJK is installed",
        some(sorted(letters - _letters_of(usual))),
    )
    return usual


@cache
def _letters_of(font: str) -> frozenset[str]:
    return frozenset(map(chr, get_font(font).get_charmap()))


def beside(
    picture: Image.Image, lines: Sequence[str], colours: Sequence[tuple[int, int, int] | None] = ()
) -> Image.Image:
    """`picture` with lines of text at its right, each behind a square of its colour where it has one."""
    font = _font(picture, lines)
    step = round(1.5 * font.size)
    indent = step if colours else 0
    width = round(max((font.getlength(line) for line in lines), default=0)) + indent + step
    height = max(picture.height, step * len(lines) + step // 2)
    whole = Image.new("RGB", (picture.width + width, height), "white")
    whole.paste(picture, (0, 0))
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        x, y = picture.width + step // 2, step // 4 + number * step
        if colours and colours[number]:
            draw.rectangle((x, y + step // 8, x + font.size, y + step // 8 + font.size), fill=colours[number])
        draw.text((x + indent, y), line, fill="black", font=font)
    return whole


def draw_objects(
    picture: Image.Image, boxes: Sequence[Sequence[float]], mask: Callable[[int], Tensor], labels: Sequence[str]
) -> Image.Image:
    """Boxes in the picture's pixels, masks and labels, the best on top; `mask` gives each by its number, (H, W) of any
    size, one at a time."""
    picture, font = picture.copy(), _font(picture, labels)
    pad = font.size // 4
    widths = [font.getlength(label) + 2 * pad for label in labels]
    for number in reversed(range(len(labels))):
        shade = Image.fromarray(mask(number).numpy().astype(np.uint8) * 140)
        shade = shade.resize(picture.size, Image.Resampling.NEAREST)
        picture.paste(colour(number), (0, 0, *picture.size), shade)
    whole = Image.new("RGB", (max([picture.width, *map(math.ceil, widths)]), picture.height), "white")
    whole.paste(picture, (0, 0))  # the longest label may reach beyond a narrow picture
    draw = ImageDraw.Draw(whole)
    for number in reversed(range(len(labels))):
        draw.rectangle(boxes[number], outline=colour(number), width=max(1, font.size // 8))
    taken: list[tuple[float, float, float, float]] = []
    for number, label in enumerate(labels):  # the best choose their places first
        place = _label_place(boxes[number], (widths[number], font.size + 2 * pad), whole.size, taken)
        taken.append(place)
        draw.rectangle(place, fill=colour(number))
        light = np.dot(colour(number), (0.299, 0.587, 0.114)) > 140
        draw.text((place[0] + pad, place[1] + pad), label, fill="black" if light else "white", font=font)
    return whole


def _label_place(
    box: Sequence[float],
    size: tuple[float, float],
    whole: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Where at `box` a label of `size` (width, height) is in a picture of size `whole` and covers none of `taken`;
    above the box where it must cover one.  All are x1, y1, x2, y2."""
    (left, top, right, bottom), (width, height) = box, size
    places = []
    for x in (left, right - width, right, left - width):
        for y in (top - height, bottom, top, bottom - height):
            x1, y1 = (max(0, min(at, most - side)) for at, most, side in zip((x, y), whole, size, strict=True))
            places.append((x1, y1, x1 + width, y1 + height))
    free = [place for place in places if not any(_overlap(place, other) for other in taken)]
    return (free or places)[0]


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def paint(picture: Image.Image, classes: Tensor, names: Sequence[str]) -> Image.Image:
    """`picture` in grey under the colours of a map (h, w) of classes, but for the background."""
    colours = np.array([colour(label) for label in range(len(names))], np.uint8)
    painted = Image.fromarray(colours[classes.numpy()]).resize(picture.size, Image.Resampling.NEAREST)
    shares = np.array([0 if name == BACKGROUND else 160 for name in names], np.uint8)
    shade = Image.fromarray(shares[classes.numpy()]).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(painted, picture.convert("L").convert("RGB"), shade)


def legend(order: Sequence[int], names: Sequence[str]) -> tuple[list[str], list[tuple[int, int, int] | None]]:
    """Lines and their colours; of more classes than are told apart the last line stands for the rest."""
    lines = [names[label] for label in order[:_LEGEND]]
    if len(order) > _LEGEND:
        lines.append(f"and {some([names[label] for label in order[_LEGEND:]])}")
    return lines, [None if names[label] == BACKGROUND else colour(label) for label in order[: len(lines)]]
