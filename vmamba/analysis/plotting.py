"""What the figures share: colours that colour-blind readers tell apart, labels inside the page, a PDF and a PNG."""

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
