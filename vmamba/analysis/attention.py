"""The scan seen as attention: with which weight each earlier pixel of a route reaches a query pixel.

Unrolled, the recurrence of `vmamba_kernels` says for one route, with S[i, j] = delta[j+1] + ... + delta[i]

    y[i, d] = sum_{j <= i} w[i, j, d] u[j, d] + D[d] u[i, d]
    w[i, j, d] = sum_n C[i, n] exp(A[d, n] S[i, j, d]) B[j, n] delta[j, d]

so that C, B and u stand where attention has queries, keys and values (VMamba, arXiv 2401.10166, section 5).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.analysis import images, zoo
from vmamba.analysis.plotting import STYLE, new_figure, save_figure
from vmamba.analysis.tables import write_tensors
from vmamba.errors import UserError
from vmamba.files import check_keeps, check_writable
from vmamba.models.ss2d import SS2D, Mixer2D
from vmamba.models.vssm import VSSM
from vmamba_kernels import cross_scan

DECADES = 4  # of the weights' colour scale
ROUTE_NAMES = {
    "row": "along the rows",
    "col": "down the columns",
    "row_rev": "rows, backwards",
    "col_rev": "columns, upwards",
    "sum": "all routes",
}


def activation_map(
    image: str | None = None,
    *,
    model: str = "vmamba_tiny",
    weights: str | None = None,
    size: int = 224,
    layer: str = "1.1",
    at: tuple[float, float] = (0.5, 0.3),
    channels: Sequence[int | None] = (None,),
    matrix: bool = False,
    device: str = "auto",
    output: str = "output/activation_map",
) -> "Maps":
    """Draw which pixels of `image` (None: scikit-learn's flower) reach the one at `at` in the scan of a layer.

    `channels` are those of the scan, None being the mean of |w| over all.  Writes activation_map.{pdf,png}, the numbers
    as activation_map.pt and, with `matrix`, the weights of all queries, averaged over those channels in absolute value,
    as matrix.pt, (routes, length, length), into `output`.
    Raises UserError for an unknown model, layer, channel or place, and weights or an image that cannot be read.
    """
    place = zoo.choose_device(device)
    chosen = None if None in channels else list(channels)
    if chosen is None and len(channels) > 1:
        raise UserError("--channels names mean and others; name mean alone, or numbers")
    check_writable(Path(output, "activation_map.pt"))
    written = [*(f"activation_map.{kind}" for kind in ("pdf", "png", "pt")), "matrix.pt"]
    check_keeps(filter(None, [image, weights]), *(Path(output, name) for name in written))
    subject = zoo.create(model, size, weights) if weights else zoo.create_untrained(model, size, None)
    mixer = find_block(subject.model, layer).op
    photograph = images.square(image, size)
    x = scan_input(subject.model.to(place), mixer, images.tensor(photograph, subject).to(place))
    found = maps(mixer, x, at, chosen)
    folder = Path(output)
    title = f"{subject.title}, {subject.facts}\nthe scan of layer {layer}, {size} x {size} pixels"
    plot(found, photograph, title, chosen, folder / "activation_map")
    numbers = {"routes": found.names, "weights": found.weights, "similarity": found.similarity}
    write_tensors(folder / "activation_map.pt", numbers)
    if matrix:
        write_tensors(folder / "matrix.pt", torch.stack([mean_matrix(route, chosen) for route in routes(mixer, x)]))
    print(f"written to {folder}")
    return found


@dataclass(frozen=True)
class Route:
    """What the scan of one image along one route is made of, in float32 or wider."""

    name: str
    pixels: Tensor  # (length,) the pixel, row * width + column, at each position
    u: Tensor  # (length, dim)
    delta: Tensor  # (length, dim), positive
    A: Tensor  # (dim, states), negative
    B: Tensor  # (length, states)
    C: Tensor  # (length, states)

    def position(self, pixel: int) -> int:
        return int((self.pixels == pixel).nonzero())

    def row(self, query: int) -> Tensor:
        """w of the query at a position, (length, dim); zeros behind it.  Takes memory of (length, dim, states)."""
        delta, B = self.delta[: query + 1], self.B[: query + 1]
        # S is summed from the query backwards: differences of one running sum would lose the digits of nearby pixels.
        span = F.pad(delta[1:].flip(0).cumsum(0).flip(0), (0, 0, 0, 1))  # (query + 1, dim)
        decay = (span.unsqueeze(-1) * self.A).exp()  # (query + 1, dim, states)
        row = torch.einsum("n,jdn,jn->jd", self.C[query], decay, B) * delta
        return F.pad(row, (0, 0, 0, len(self.delta) - query - 1))

    def similarity(self, query: int) -> Tensor:
        """C . B of the query at a position with each position up to it, (length,); zeros behind it."""
        return F.pad(self.B[: query + 1] @ self.C[query], (0, len(self.B) - query - 1))

    def on_image(self, values: Tensor, height: int, width: int) -> Tensor:
        """(length, *), by position -> (height, width, *)."""
        image = torch.empty_like(values)
        image[self.pixels] = values
        return image.unflatten(0, (height, width))


def find_block(model: nn.Module, layer: str) -> nn.Module:
    """A block of one of our models, "stage.block" counted from zero.  Raises UserError where there is none."""
    if not isinstance(model, VSSM):
        raise UserError(
            f"{type(model).__name__} is none of our models, whose blocks are drawn; name one of vmamba.list_models()"
        )
    try:
        stage, block = (int(number) for number in layer.split("."))
        if stage < 0 or block < 0:
            raise IndexError
        return model.layers[stage].blocks[block]
    except (ValueError, IndexError):
        depths = ", ".join(f"{i}.0 to {i}.{len(stage.blocks) - 1}" for i, stage in enumerate(model.layers))
        raise UserError(f"there is no layer '{layer}'; this model has {depths}") from None


@torch.no_grad()
def scan_input(model: nn.Module, mixer: Mixer2D, images: Tensor) -> Tensor:
    """What goes into the scan of `mixer` when the model is shown `images`: (B, H, W, d_inner)."""
    seen = []
    handle = mixer.act.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def routes(mixer: Mixer2D, x: Tensor) -> list[Route]:
    """The routes of one image's scan, x being (1, H, W, d_inner), what `scan_input` gives.

    Raises UserError for a scan of means, which no route of pixels shows.
    """
    if mixer.pool != "none":
        raise UserError(f"this layer scans the means of {mixer.pool}, and the picture is of pixels; choose pool none")
    height, width = x.shape[1:3]
    x = x if x.dtype == torch.float64 else x.float()
    u = cross_scan(x, mixer.routes)[0]  # (routes, length, dim)
    pixels = cross_scan(torch.arange(height * width, device=x.device).view(1, height, width, 1), mixer.routes)
    numbers = u @ mixer.x_proj_weight.to(x.dtype).transpose(1, 2)
    step, B, C = numbers.split((mixer.dt_rank, mixer.d_state, mixer.d_state), dim=-1)
    A = -mixer.A_logs.to(x.dtype).exp()
    if isinstance(mixer, SS2D):
        step = step @ mixer.dt_projs_weight.to(x.dtype).transpose(1, 2)
        A = A.unflatten(0, (len(mixer.routes), -1))
    delta = F.softplus(step + mixer.dt_projs_bias.to(x.dtype).unsqueeze(1))  # (routes, length, dim or heads)
    if not isinstance(mixer, SS2D):  # a head's step and A are those of all its channels and states
        delta = delta.repeat_interleave(mixer.d_inner // mixer.dt_rank, dim=-1)
        A = A.repeat_interleave(mixer.d_inner // mixer.dt_rank, dim=-1).unsqueeze(-1).expand(-1, -1, mixer.d_state)
    return [
        Route(name, *parts) for name, *parts in zip(mixer.routes, pixels[0, ..., 0], u, delta, A, B, C, strict=True)
    ]


@dataclass(frozen=True)
class Maps:
    """What reaches one query pixel, over the image."""

    query: tuple[int, int]  # row, column
    names: Sequence[str]  # of the routes
    weights: Tensor  # (routes, H, W, channels): w; zero where a route comes only after the query
    similarity: Tensor  # (routes, H, W): C . B


@torch.no_grad()
def maps(mixer: Mixer2D, x: Tensor, at: tuple[float, float], channels: Sequence[int] | None = None) -> Maps:
    """The maps of the pixel at `at` = (x, y), shares of width and height, for all channels or the chosen ones.

    `x` is one image's `scan_input`.  Raises UserError for a place outside the image or a channel that is not there.
    """
    height, width = x.shape[1:3]
    if not all(0 <= share <= 1 for share in at):
        raise UserError(f"--at is {at[0]:g},{at[1]:g}; give x and y as shares of the image, from 0 to 1")
    for channel in channels or ():
        if not 0 <= channel < mixer.d_inner:
            raise UserError(f"there is no channel {channel}; this layer's scan has channels 0 to {mixer.d_inner - 1}")
    column, row = (min(int(share * side), side - 1) for share, side in zip(at, (width, height), strict=True))
    weights, similarity = [], []
    for route in routes(mixer, x):
        query = route.position(row * width + column)
        weights.append(route.on_image(route.row(query), height, width))
        similarity.append(route.on_image(route.similarity(query), height, width))
    chosen = torch.stack(weights)
    return Maps(
        (row, column),
        mixer.routes,
        chosen if channels is None else chosen[..., list(channels)],
        torch.stack(similarity),
    )


@torch.no_grad()
def mean_matrix(route: Route, channels: Sequence[int] | None = None) -> Tensor:
    """(length, length), query first: the mean of |w| over all channels or the chosen ones."""
    rows = (route.row(query).abs() for query in range(len(route.delta)))
    return torch.stack([(row if channels is None else row[:, list(channels)]).mean(1) for row in rows])


def plot(found: Maps, photograph: Image.Image, title: str, channels: Sequence[int] | None, path: Path) -> None:
    """Rows: |w| averaged over all channels, or of each chosen one, on a log scale; then C . B.

    Columns: the routes, and their sum; before them the image with the query.
    """
    weights = found.weights.abs().cpu()
    weights = weights.mean(-1, keepdim=True) if channels is None else weights
    names = ["weight |w|\nmean of channels"] if channels is None else [f"weight |w|\nchannel {c}" for c in channels]
    names.append("C · B alone")
    with rc_context(STYLE):
        figure = new_figure(1.9 * (len(found.names) + 2) + 1.2, 1.9 * len(names) + 0.7)
        figure.suptitle(title, fontsize=9)
        cells = figure.add_gridspec(len(names), len(found.names) + 2)
        image = figure.add_subplot(cells[:, 0])
        grid = [[figure.add_subplot(cells[i, 1 + j]) for j in range(len(found.names) + 1)] for i in range(len(names))]
        for axes in [image, *chain(*grid)]:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        image.imshow(photograph)
        height, width = weights.shape[1:3]
        row, column = found.query
        image.plot((column + 0.5) / width * photograph.width, (row + 0.5) / height * photograph.height, **_QUERY)
        image.set_title("image and query")
        for axes, name in zip(grid[0], [*found.names, "sum"], strict=True):
            axes.set_title(ROUTE_NAMES.get(name, name))
        for axes, name in zip(grid, names, strict=True):
            axes[0].set_ylabel(name)
        for number, axes in enumerate(grid[:-1]):
            shown = torch.cat([weights[..., number], weights[..., number].sum(0, keepdim=True)])
            shown = shown / shown.max().clamp(min=torch.finfo(shown.dtype).tiny)
            norm = LogNorm(10.0**-DECADES, 1)
            _draw_row(axes, shown.clamp(min=10.0**-DECADES), found, "share of the largest", cmap="viridis", norm=norm)
        similarity = torch.cat([found.similarity, found.similarity.sum(0, keepdim=True)]).cpu()
        largest = similarity.abs().max().item()
        _draw_row(grid[-1], similarity, found, "C · B", cmap="PuOr", vmin=-largest, vmax=largest)
        save_figure(figure, path)


_QUERY = dict(marker="o", markersize=6, markerfacecolor="#D55E00", markeredgecolor="white", markeredgewidth=1.2)


def _draw_row(row: Sequence[Axes], shown: Tensor, found: Maps, label: str, **colours: object) -> None:
    """`shown`: (panels, H, W)."""
    for axes, values in zip(row, shown, strict=True):
        mesh = axes.imshow(values.numpy(), interpolation="nearest", **colours)
        axes.plot(found.query[1], found.query[0], **_QUERY)
    row[0].figure.colorbar(mesh, ax=list(row), label=label, fraction=0.03)
