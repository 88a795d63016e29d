"""What the figures share: colours that colour-blind readers tell apart, labels inside the page, a PDF and a PNG."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from vmamba.files import make_folder, write_atomically

# Okabe and Ito's palette (jfly.uni-koeln.de/color), without its yellow, which is faint on paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
STYLE = {
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
}


def line_style(number: int) -> dict[str, object]:
    """Colour and marker of one of several lines; a marker at the edge of the axes is drawn whole."""
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]  # another one when the colours begin again
    return dict(color=COLOURS[number % len(COLOURS)], marker=marker, clip_on=False)


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches whose labels make room for themselves."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def place_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]], size: float = 7) -> None:
    """Write (x, y, text, colour) beside each point, where it covers no point, no other text and little of the lines.

    For a figure that has been drawn, so that the axes have their place; the layout does not look at these texts.
    """
    scale = axes.figure.dpi / 72  # pixels a typographic point
    points = [axes.transData.transform((x, y)) for x, y, *_ in labels]
    taken = [Bbox.from_bounds(x - 3 * scale, y - 3 * scale, 6 * scale, 6 * scale) for x, y in points]
    lines = [_along(axes.transData.transform(line.get_xydata())) for line in axes.lines]
    for x, y, text, colour in labels:
        style = dict(fontsize=size, color=colour, ha="center", va="center")
        written = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", **style)
        written.set_in_layout(False)
        own = written.get_window_extent()

        def cost(offset: tuple[float, float], own: Bbox = own) -> tuple[float, ...]:
            box = own.translated(offset[0] * scale, offset[1] * scale)
            outside = not (axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max))
            covered = sum(box.contains(*place) for line in lines for place in line)
            return box.count_overlaps(taken) + outside, covered, math.hypot(*offset)

        width, height = own.width / scale / 2 + 4, own.height / scale / 2 + 4
        nearby = [(a * width * far, b * height * far) for far in (1, 1.5, 2.2) for a in (-1, 0, 1) for b in (1, 0, -1)]
        best = min((offset for offset in nearby if any(offset)), key=cost)
        written.xyann = best
        taken.append(own.translated(best[0] * scale, best[1] * scale))


def _along(corners: np.ndarray) -> np.ndarray:
    """Places on a line through (N, 2) `corners`, a pixel or two apart."""
    parts = [np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / 2))) for a, b in itertools.pairwise(corners)]
    return np.concatenate(parts) if parts else corners


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write `path` with the suffixes .pdf and .png.  Raises UserError where they cannot be written."""
    make_folder(path.parent)
    for kind in ("pdf", "png"):
        write_atomically(
            path.with_suffix(f".{kind}"),
            lambda file, kind=kind: figure.savefig(
                file, format=kind, dpi=dpi, metadata={"pdf": {"CreationDate": None}}.get(kind)
            ),
        )
