"""The effective receptive field, as RepLKNet (arXiv 2203.06717, section 4) and VMamba (arXiv 2401.10166) measure it.

The centre of the last feature map is rectified and summed over its channels; the gradient of that with respect to the
image, rectified and summed over the image's channels, says how much each pixel contributes; images are averaged.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.colors import LogNorm
from torch import Tensor, nn
from tqdm import tqdm

from vmamba.analysis import images, zoo
from vmamba.analysis.plotting import STYLE, new_figure, save_figure
from vmamba.analysis.tables import markdown, write_json
from vmamba.errors import UserError
from vmamba.files import write_text

SHARES = (0.2, 0.3, 0.5, 0.99)  # of the contribution
DECADES = 4  # of the colour scale


def erf(
    models: Sequence[str],
    weights: Sequence[str],
    size: int,
    images_from: str | None,
    num_images: int,
    device: str,
    output: str,
) -> list[dict[str, Any]]:
    """Measure each model with random weights and, where a checkpoint is given, with those beside it.

    Writes erf.{pdf,png}, erf.md, erf.json and the maps themselves, erf.pt, into `output`; prints the table.
    Returns its rows.  Raises UserError for unknown models, weights that do not fit, images that cannot be read.
    """
    place = zoo.choose_device(device)
    photographs = images.squares(images_from, num_images, size)
    columns = []  # a model each: its subjects and their maps
    for name, path in zip(models, zoo.pair_weights(models, weights), strict=True):
        subjects = [zoo.create_untrained(name, size, path)]
        if path:
            subjects.append(zoo.create(name, size, path))
        columns.append([(subject, measure(subject, photographs, place)) for subject in subjects])
    rows = [
        {"model": subject.name, "weights": subject.weights, "size": size, "images": num_images}
        | {f"area of {share:.0%}": area for share, (area, _) in zip(SHARES, square_areas(field), strict=True)}
        | {f"side of {share:.0%}": side for share, (_, side) in zip(SHARES, square_areas(field), strict=True)}
        for column in columns
        for subject, field in column
    ]
    folder = Path(output)
    plot(columns, folder / "erf")
    write_json(folder / "erf.json", rows)
    write_text(folder / "erf.md", markdown(rows))
    torch.save({(s.name, s.weights): field for column in columns for s, field in column}, folder / "erf.pt")
    print(markdown(rows))
    print(f"written to {folder}")
    return rows


def measure(subject: zoo.Subject, photographs: Sequence, device: torch.device) -> Tensor:
    """(H, W): how much each pixel contributes to the centre of the model's last feature map."""
    model = subject.model.to(device)
    inputs = (images.tensor(image, subject).to(device) for image in photographs)
    progress = tqdm(
        inputs, desc=f"{subject.name}, {subject.weights}", total=len(photographs), leave=False, disable=None
    )
    field = receptive_field(last_features(model), progress)
    model.to("cpu")
    return field.cpu()


def receptive_field(features: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """The mean over `inputs`, (1, C, H, W) each, as (H, W); `features` gives the last map, (1, channels, H', W')."""
    total, count = 0, 0
    for image in inputs:
        image = image.detach().requires_grad_()
        output = features(image)
        centre = output[:, :, output.shape[2] // 2, output.shape[3] // 2]
        (gradient,) = torch.autograd.grad(centre.relu().sum(), image)
        total, count = total + gradient.relu().sum((0, 1)), count + 1
    return total / count


def last_features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function from images to a model's last feature map, (B, channels, H', W')."""
    if hasattr(model, "forward_intermediates"):
        return lambda x: model.forward_intermediates(x, indices=1, intermediates_only=True)[-1]

    def features(x: Tensor) -> Tensor:
        output = model.forward_features(x)
        if output.dim() != 4:
            raise UserError(f"{type(model).__name__} gives features of shape {tuple(output.shape)}, which are no map")
        return output

    return features


def square_areas(field: Tensor, shares: Sequence[float] = SHARES) -> list[tuple[float, int]]:
    """For each share of the contribution: the smallest square around the centre that holds it.

    Returns the square's area over the image's, and its side in pixels; what lies outside the image does not count.
    """
    height, width = field.shape
    rows, columns = torch.arange(height), torch.arange(width)
    distance = torch.maximum((rows - height // 2).abs()[:, None], (columns - width // 2).abs()[None]).flatten()
    held = torch.bincount(distance, weights=field.flatten().double()).cumsum(0)
    pixels = torch.bincount(distance).cumsum(0)
    if not held[-1] > 0:
        raise UserError("no pixel contributes to the centre of the last feature map; check the weights and the images")
    radii = [int(torch.searchsorted(held, share * held[-1])) for share in shares]
    return [(pixels[radius].item() / (height * width), 2 * radius + 1) for radius in radii]


def plot(models: Sequence[Sequence[tuple[zoo.Subject, Tensor]]], path: Path) -> None:
    """The maps of models before training in a row, or, where some are trained, a row a model with the trained beside.

    Every map is in units of its maximum.
    """
    rows = [[maps[0] for maps in models]] if all(len(maps) == 1 for maps in models) else models
    columns = max(map(len, rows))
    with rc_context(STYLE):
        figure = new_figure(2.2 * columns + 0.7, 2.6 * len(rows))
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for row, axes_of_row in zip(rows, grid, strict=True):
            for (subject, field), axes in zip(row, axes_of_row, strict=False):
                shown = (field / field.max()).clamp(min=10.0**-DECADES)
                norm = LogNorm(10.0**-DECADES, 1)
                mesh = axes.imshow(shown.numpy(), norm=norm, cmap="viridis", interpolation="nearest")
                axes.set_title("\n".join([subject.name, *subject.weights.split(", ")]), fontsize=7)
        figure.colorbar(mesh, ax=grid, label="contribution / maximum", fraction=0.03)
        save_figure(figure, path)
