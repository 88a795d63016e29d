"""The effective receptive field, as RepLKNet (arXiv 2203.06717, section 4) and VMamba (arXiv 2401.10166) measure it.

The last feature map at the image's centre is rectified and summed over its channels; the gradient of that with respect
to the image, rectified and summed over the image's channels, says how much each pixel contributes; images are averaged.
Both papers take the cell behind the middle for the centre.  Of the few cells of a small image none may lie there, so
here the map is read between its cells, linearly.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.colors import LogNorm
from torch import Tensor, nn
from tqdm import tqdm

from vmamba.analysis import images, zoo
from vmamba.analysis.plotting import STYLE, new_figure, save_figure
from vmamba.analysis.tables import check_json, check_page, markdown, write_json, write_tensors
from vmamba.data.folders import image_files
from vmamba.errors import UserError
from vmamba.files import check_keeps, write_text
from vmamba.text import counted

MODELS = ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50", "deit_small_patch16_224")
SHARES = (0.2, 0.3, 0.5, 0.99)  # of the contribution
DECADES = 4  # of the colour scale


def erf(
    *,
    models: Sequence[str] = MODELS,
    weights: Sequence[str] = (),
    size: int = 224,
    images_from: str | None = None,
    num_images: int = 4,
    device: str = "auto",
    output: str = "output/erf",
) -> list[dict[str, Any]]:
    """Measure each model with random weights and, where a checkpoint is given, with those beside it.

    Writes erf.{pdf,png}, erf.md, erf.json and the maps themselves, (rows, size, size), erf.pt, into `output`; prints
    the table.  Returns its rows.
    Raises UserError for unknown models, weights that do not fit, images that cannot be read.
    """
    place = zoo.choose_device(device)
    check_json(Path(output, "erf.json"), "model", "weights", "size", "images")
    check_page(Path(output, "erf.md"), r"\| model \| parameters \| weights \|")
    read = [*filter(None, weights), *(image_files(images_from) if images_from else ())]
    check_keeps(read, *(Path(output, f"erf.{kind}") for kind in ("pdf", "png", "md", "json", "pt")))
    photographs = images.squares(images_from, num_images, size)
    columns = []  # a model each: its subjects and their maps
    rows = []
    for name, path in zip(models, zoo.pair_weights(models, weights), strict=True):
        subjects = [zoo.create_untrained(name, size, path)]
        if path:
            subjects.append(zoo.create(name, size, path))
        columns.append([(subject, measure(subject, photographs, place)) for subject in subjects])
        for (subject, field), file in zip(columns[-1], (None, path), strict=False):
            row = {"model": subject.title, "parameters": subject.parameters, "weights": subject.weights, "file": file}
            rows.append(row | {"size": size, "images": num_images} | _areas(field))
    shown = f"of the folder '{Path(images_from).name}'" if images_from else "cut from scikit-learn's photographs"
    folder = Path(output)
    plot(columns, f"{counted(num_images, 'image')} of {size} x {size} pixels {shown}", folder / "erf")
    write_json(folder / "erf.json", rows)
    write_text(folder / "erf.md", markdown(rows))
    write_tensors(folder / "erf.pt", torch.stack([field for column in columns for _, field in column]))
    print(markdown(rows))
    print(f"written to {folder}")
    return rows


def measure(subject: zoo.Subject, photographs: Sequence, device: torch.device) -> Tensor:
    """(H, W): how much each pixel contributes to the model's last feature map at the centre."""
    model = subject.model.to(device)
    inputs = (images.tensor(image, subject).to(device) for image in photographs)
    progress = tqdm(
        inputs, desc=f"{subject.name}, {subject.weights}", total=len(photographs), leave=False, disable=None
    )
    field = receptive_field(model, progress)
    model.to("cpu")
    return field.cpu()


def receptive_field(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The mean over `inputs`, (1, C, H, W) each, as (H, W)."""
    features = last_features(model)
    total, count = 0, 0
    for image in inputs:
        image = image.detach().requires_grad_()
        with recorded_steps(model) as steps:
            output = features(image)  # (1, channels, H', W')
        rows, columns = (
            _between_cells(centre(steps, axis, image.shape[axis], output.shape[axis]), output.shape[axis])
            for axis in (2, 3)
        )
        value = torch.einsum("chw,h,w->c", output[0], rows.to(output), columns.to(output))
        (gradient,) = torch.autograd.grad(value.relu().sum(), image)
        total, count = total + gradient.relu().sum((0, 1)), count + 1
    return total / count


def last_features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function from images to a model's last feature map, (B, channels, H', W')."""
    if hasattr(model, "forward_intermediates"):
        return lambda x: model.forward_intermediates(x, indices=1, intermediates_only=True)[-1]

    def features(x: Tensor) -> Tensor:
        output = getattr(model, "forward_features", model)(x)
        if output.dim() != 4:
            raise UserError(f"{type(model).__name__} gives features of shape {tuple(output.shape)}, which are no map")
        return output

    return features


@dataclass(frozen=True)
class Step:
    """What a strided convolution or pool did along one side of an image."""

    pixels: int  # that it read
    stride: int
    kernel: int  # its reach, dilation included
    shift: float  # of its cells against patches of `stride` pixels side by side


@contextmanager
def recorded_steps(model: nn.Module) -> Iterator[dict[int, list[Step]]]:
    """The strided convolutions and pools that run in `model` meanwhile, by axis of their images, 2 or 3."""
    steps: dict[int, list[Step]] = {2: [], 3: []}

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        for axis in steps:
            side, stride, padding, dilation = (
                value[axis - 2] if isinstance(value, tuple) else value
                for value in (
                    module.kernel_size,
                    module.stride,
                    0 if module.padding == "valid" else module.padding,
                    getattr(module, "dilation", 1),
                )
            )
            kernel = dilation * (side - 1) + 1
            if stride > 1:
                padding = _padding_in_front(module, args[0].shape[axis], output.shape[axis], kernel, stride, padding)
                shift = (kernel - 1) / 2 - padding - (stride - 1) / 2
                steps[axis].append(Step(args[0].shape[axis], stride, kernel, shift))

    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    handles = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, kinds)]
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()


def _padding_in_front(module: nn.Module, pixels: int, cells: int, kernel: int, stride: int, padding: int) -> int:
    """What a convolution or pool put before the first of `pixels`.

    It is `padding`, as the module says, unless that does not give so many `cells`: then the module pads by itself as
    TensorFlow does ("SAME", timm's tf_ models), half of what the cells need in front, the odd pixel behind.
    """
    as_told = (pixels + 2 * padding - kernel) // stride + 1
    if cells == as_told or getattr(module, "ceil_mode", False):
        return padding
    return ((cells - 1) * stride + kernel - pixels) // 2


def centre(steps: dict[int, list[Step]], axis: int, pixels: int, cells: int) -> float:
    """Where among the `cells` of the last feature map the middle of the image's `pixels` lies, along one side.

    Cells that stand for patches side by side have it in their own middle.  A padded convolution of side 3 and stride 2
    reads around every second pixel, which is half a pixel off the middle of two, and so on through the model: the three
    cells of a ResNet on 96 pixels lie at pixels 0, 32 and 64.  Steps by other means than strided convolutions and pools
    are taken for patches.
    """
    main: dict[int, Step] = {}  # by the pixels read; of several the others are branches
    for step in steps[axis]:
        before = main.get(step.pixels)
        if before is None or (step.stride, -step.kernel) < (before.stride, -before.kernel):
            main[step.pixels] = step
    shift, stride, side = 0.0, 1, pixels
    for step in sorted(main.values(), key=lambda step: -step.pixels):
        stride, side = stride * round(side / step.pixels), step.pixels
        shift += step.shift * stride
    stride *= round(side / cells)
    return min(max(((pixels - stride) / 2 - shift) / stride, 0), cells - 1)


def _between_cells(position: float, cells: int) -> Tensor:
    """(cells,) the weights that read a row of cells at `position`, linearly."""
    return (1 - (torch.arange(cells) - position).abs()).clamp(min=0)


def square_areas(field: Tensor, shares: Sequence[float] = SHARES) -> list[tuple[float, int]]:
    """For each share of the contribution: the smallest square around the image's centre that holds it.

    Returns the square's area over the image's, and its side in pixels; what lies outside the image does not count.
    """
    height, width = field.shape
    rows, columns = ((2 * torch.arange(side) - (side - 1)).abs() for side in (height, width))
    distance = torch.maximum(rows[:, None], columns[None]).flatten()  # from the centre, in half pixels
    held = torch.bincount(distance, weights=field.flatten().double()).cumsum(0)
    pixels = torch.bincount(distance).cumsum(0)
    if not held[-1] > 0:
        raise UserError("no pixel contributes to the centre of the last feature map; check the weights and the images")
    radii = [int(torch.searchsorted(held, share * held[-1])) for share in shares]
    return [(pixels[radius].item() / (height * width), radius + 1) for radius in radii]


def _areas(field: Tensor) -> dict[str, float]:
    found = square_areas(field)
    return {f"area of {share:.0%}": area for share, (area, _) in zip(SHARES, found, strict=True)} | {
        f"side of {share:.0%}": side for share, (_, side) in zip(SHARES, found, strict=True)
    }


def plot(models: Sequence[Sequence[tuple[zoo.Subject, Tensor]]], title: str, path: Path) -> None:
    """The maps of models before training in a row, or, where some are trained, a row a model with the trained beside.

    Every map is in units of its maximum.
    """
    rows = [[maps[0] for maps in models]] if all(len(maps) == 1 for maps in models) else models
    columns = max(map(len, rows))
    with rc_context(STYLE):
        figure = new_figure(2.4 * columns + 0.8, 2.9 * len(rows) + 0.2)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        figure.suptitle(title, fontsize=9)
        for axes in grid.flat:
            axes.set_axis_off()
        for row, axes_of_row in zip(rows, grid, strict=True):
            for (subject, field), axes in zip(row, axes_of_row, strict=False):
                shown = (field / field.max()).clamp(min=10.0**-DECADES)
                norm = LogNorm(10.0**-DECADES, 1)
                mesh = axes.imshow(shown.numpy(), norm=norm, cmap="viridis", interpolation="nearest")
                lines = (subject.title, subject.facts)
                axes.set_title("\n".join(part for line in lines for part in textwrap.wrap(line, 38)), fontsize=7)
        figure.colorbar(mesh, ax=grid, label="contribution / maximum", fraction=0.03)
        save_figure(figure, path)
