"""Scenes made of scikit-learn's handwritten digits pasted on its sample photographs, with exact truths.

Which pixels are whose is known from the pasting.  A scene is a function of its split and index; those to train on are
made of other digits and other parts of the photographs than those held out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

CLASSES = tuple(str(digit) for digit in range(10))
TRAINING_DIGITS = 1437  # of 1797; the others are held out, as in classification
TRAINING_WIDTH = 0.7  # likewise the left part of each photograph
_LEAST = 6  # pixels of a digit
_TURN = 25  # degrees, either way
_VISIBLE = 0.4  # of which less can be seen is no object
_STREAM = 5  # first word of a scene's seed


@dataclass(frozen=True)
class Scene:
    image: Image.Image  # RGB
    masks: np.ndarray  # (N, H, W) bool: the visible part of each digit of which enough can be seen
    labels: np.ndarray  # (N,) int64: the digit
    classes: np.ndarray  # (H, W) uint8: 0 where no ink is, else the digit and 1, however little of it can be seen

    def boxes(self) -> np.ndarray:
        """(N, 4) float32: x1, y1, x2, y2 around the visible parts, whose last column and row end there."""
        found = np.zeros((len(self.masks), 4), np.float32)
        for box, mask in zip(found, self.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return found


def scene(
    index: int,
    training: bool,
    side: int = 128,
    most: int = 8,
    sizes: Sequence[float] = (0.2, 0.5),
    contrast: bool = False,
) -> Scene:
    """Scene `index` of a split, `side` pixels square, with one to `most` digits pasted one over the other.

    Args:
        sizes: the least and the largest of a digit, as shares of the scene's side.
        contrast: digits are dark where the scene is light and light where it is dark; False: either anywhere.
    """
    draw = np.random.default_rng((_STREAM, training, index))
    canvas = _background(draw, training, side)
    digits, names = _digits()
    first, end = (0, TRAINING_DIGITS) if training else (TRAINING_DIGITS, len(names))
    masks, areas, labels = [], [], []
    classes = np.zeros((side, side), np.uint8)
    for _ in range(draw.integers(1, most + 1)):
        which = draw.integers(first, end)
        ink = _turned(draw, digits[which], max(_LEAST, round(draw.uniform(*sizes) * side)))[:side, :side]
        y, x = (draw.integers(0, side - length + 1) for length in ink.shape)
        place = np.s_[y : y + ink.shape[0], x : x + ink.shape[1]]
        light = draw.random() < 0.5
        if contrast:
            light = canvas[place].mean() < 0.5
        colour = draw.uniform(0.75, 1.0, 3) if light else draw.uniform(0.0, 0.25, 3)
        canvas[place] += ink[..., None] * (colour - canvas[place])
        mask = np.zeros((side, side), bool)
        mask[place] = ink > 0.5
        masks = [*(below & ~mask for below in masks), mask]
        areas.append(mask.sum())
        labels.append(names[which])
        classes[mask] = names[which] + 1
    seen = [mask.sum() >= max(1, _VISIBLE * area) for mask, area in zip(masks, areas, strict=True)]
    image = Image.fromarray((canvas.clip(0, 1) * 255).round().astype(np.uint8))
    return Scene(image, np.array(masks)[seen], np.array(labels, np.int64)[seen], classes)


def _background(draw: np.random.Generator, training: bool, side: int) -> np.ndarray:
    """(side, side, 3) of 0 to 1: a square of a photograph, perhaps mirrored."""
    photograph = _photographs()[draw.integers(2)]
    height, width = photograph.shape[:2]
    border = int(width * TRAINING_WIDTH)
    left, right = (0, border) if training else (border, width)
    length = int(draw.integers(96, min(height, right - left) + 1))
    x, y = draw.integers(left, right - length + 1), draw.integers(0, height - length + 1)
    square = photograph[y : y + length, x : x + length]
    square = square[:, ::-1] if draw.random() < 0.5 else square
    image = Image.fromarray(np.ascontiguousarray(square)).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / 255


def _turned(draw: np.random.Generator, digit: np.ndarray, length: int) -> np.ndarray:
    """(h, w) of 0 to 1: where the ink of a digit is, scaled to `length` and turned, without the empty border."""
    image = Image.fromarray(np.pad(digit, 2)).resize((length * 12 // 8,) * 2, Image.Resampling.BICUBIC)
    image = image.rotate(draw.uniform(-_TURN, _TURN), Image.Resampling.BICUBIC)
    ink = (np.asarray(image, np.float32) / 255 * 1.6 - 0.3).clip(0, 1)  # a firmer edge
    rows, columns = np.flatnonzero((ink > 0.5).any(1)), np.flatnonzero((ink > 0.5).any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 and their labels."""
    from sklearn.datasets import load_digits  # takes a second, and the classes' names are asked for without it

    found = load_digits()
    return (found.images * (255 / 16)).astype(np.uint8), found.target


@cache
def _photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images
