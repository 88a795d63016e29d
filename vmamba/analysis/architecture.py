"""The drawing of a model: the ways its scan takes through an image, and what a block is made of."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from vmamba.analysis import zoo
from vmamba.analysis.plotting import STYLE, new_figure, save_figure
from vmamba.errors import UserError
from vmamba.files import check_writable
from vmamba.models.vssm import VSSM, Block
from vmamba.text import counted
from vmamba_kernels import cross_scan

SIDE = 4  # pixels of the image that routes are drawn on
_COLOURS = {"scan": "#f6d5a8", "mix": "#cfe2f3", "norm": "#e4e4e4", "point": "#d9ead3"}


def architecture(model: str = "vmamba_tiny_s1l8", *, output: str = "output/architecture") -> list[list[str]]:
    """Draw the routes and the first block of a model into architecture.{pdf,png} in `output`.

    Returns the steps of the block's branches, in order.  Raises UserError for a model that is none of ours.
    """
    check_writable(Path(output, "architecture.png"))
    subject = zoo.create(model, 224)
    if not isinstance(subject.model, VSSM):
        raise UserError(f"{model} has no routes to draw; name one of vmamba.list_models() that is a VMamba")
    block = next(iter(subject.model.layers[0].blocks))
    branches = steps(block)
    routes = list(dict.fromkeys(block.op.routes))
    with rc_context(STYLE):
        figure = new_figure(1.25 * len(routes) + 5.6, 2.3)
        figure.suptitle(f"{subject.title}: the routes of its scan, and a block", fontsize=9)
        *left, right = figure.subplots(1, len(routes) + 1, gridspec_kw=dict(width_ratios=[1.25] * len(routes) + [5.6]))
        for axes, route in zip(left, routes, strict=True):
            draw_route(axes, route)
        draw_block(right, branches)
        save_figure(figure, Path(output, "architecture"))
    print(f"written to {output}")
    return branches


def steps(block: Block) -> list[list[str]]:
    """What a block does, a list for each of its branches, each of which is added to what comes in; in words."""
    op = block.op
    scan = "selective scan" if hasattr(op, "dt_projs_weight") else "SSD scan"
    conv = [] if isinstance(op.conv2d, torch.nn.Identity) else [f"depthwise\nconv {_side(op.conv2d)}"]
    core = [
        "norm",
        "linear",
        *conv,
        type(op.act).__name__,
        f"{scan}\n{counted(len(op.routes), 'route')}, summed",
        "norm",
    ]
    core += ["times gate"] if op.gate else []
    mlp = ["norm", "linear", type(block.mlp.act).__name__, "linear"] if block.mlp is not None else []
    return [[*core, "linear"], *([mlp] if mlp else [])]


def _side(conv: torch.nn.Module) -> str:
    height, width = next(module for module in conv.modules() if isinstance(module, torch.nn.Conv2d)).kernel_size
    return f"{height} x {width}"


def draw_route(axes: Axes, route: str) -> None:
    """The pixels of a small image in the order in which the scan meets them."""
    pixels = torch.arange(SIDE * SIDE).view(1, SIDE, SIDE, 1)
    order = cross_scan(pixels, (route,))[0, 0, :, 0].tolist()
    places = [(pixel % SIDE, pixel // SIDE) for pixel in order]
    for number, (x, y) in enumerate(places):
        axes.add_patch(
            FancyBboxPatch((x - 0.24, y - 0.24), 0.48, 0.48, "round,pad=0.04", fc=_COLOURS["mix"], ec="0.6", lw=0.6)
        )
        axes.text(x, y + 0.02, str(number + 1), ha="center", va="center", fontsize=6)
    for (x, y), (to_x, to_y) in pairwise(places):
        near = abs(x - to_x) + abs(y - to_y) == 1
        arrow = dict(arrowstyle="->", color="#b45f06" if near else "0.8", lw=1.0 if near else 0.7, shrinkA=7, shrinkB=7)
        axes.annotate("", (to_x, to_y), (x, y), arrowprops=arrow, zorder=2 if near else 0)
    axes.set(xlim=(-0.7, SIDE - 0.3), ylim=(SIDE - 0.3, -0.7), aspect="equal", title=route)
    axes.axis("off")


def draw_block(axes: Axes, branches: Sequence[Sequence[str]]) -> None:
    """The branches one above the other, each beside the line that it is added to."""
    for row, branch in enumerate(branches):
        y = 1.0 - 1.75 * row
        x, ends = 0.6, []
        for step in branch:
            width = 0.36 + 0.118 * max(map(len, step.splitlines()))
            colour = "scan" if "scan" in step else "norm" if step == "norm" else "mix" if "conv" in step else "point"
            axes.add_patch(
                FancyBboxPatch((x, y - 0.28), width, 0.56, "round,pad=0.06", fc=_COLOURS[colour], ec="0.4", lw=0.8)
            )
            axes.text(x + width / 2, y, step, ha="center", va="center", fontsize=6)
            ends.append((x, x + width))
            x += width + 0.35
        for (_, end), (start, _) in pairwise(ends):
            axes.annotate("", (start, y), (end, y), arrowprops=dict(arrowstyle="->", color="0.3", lw=0.8))
        plus = (x + 0.1, y - 0.85)
        axes.plot([0.2, plus[0] - 0.16], [plus[1]] * 2, color="0.3", lw=0.9)
        middle = sum(ends[0]) / 2
        axes.annotate("", (middle, y - 0.34), (middle, plus[1]), arrowprops=dict(arrowstyle="->", color="0.3", lw=0.8))
        bend = dict(arrowstyle="->", color="0.3", lw=0.8, connectionstyle="angle,angleA=0,angleB=90")
        axes.annotate("", (plus[0], plus[1] + 0.16), (ends[-1][1], y), arrowprops=bend)
        axes.text(*plus, "+", ha="center", va="center", bbox=dict(boxstyle="circle,pad=0.15", fc="white", ec="0.3"))
        axes.text(0.1, plus[1], "x", ha="right", va="center", fontsize=8, style="italic")
    axes.set(xlim=(-0.3, axes.dataLim.x1 + 0.4), ylim=(1.0 - 1.75 * (len(branches) - 1) - 1.25, 1.4))
    axes.axis("off")
