"""Grad-CAM (arXiv 1610.02391) through the package grad-cam: where the image speaks for a class."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import rc_context
from PIL import Image
from torch import Tensor, nn

from vmamba.analysis import images, zoo
from vmamba.analysis.attention import find_block
from vmamba.analysis.plotting import STYLE, new_figure, save_figure
from vmamba.analysis.tables import write_tensors
from vmamba.errors import UserError
from vmamba.files import check_keeps, check_writable


def gradcam(
    image: str | None = None,
    *,
    model: str = "vmamba_tiny",
    weights: str | None = None,
    size: int = 224,
    layers: Sequence[str] = ("1.1", "3.1"),
    target: int | None = None,
    device: str = "auto",
    output: str = "output/gradcam",
) -> Tensor:
    """Draw what in `image` (None: scikit-learn's flower) speaks for class `target` (None: the one predicted).

    `layers` are blocks, "stage.block" counted from zero.  Writes gradcam.{pdf,png} and the maps, gradcam.pt, into
    `output`, and returns the maps, (layers, size, size), of values in 0..1.
    Raises UserError for an unknown model or layer, a class that is not there, or where grad-cam is not installed.
    """
    check_writable(Path(output, "gradcam.pt"))
    check_keeps(filter(None, [image, weights]), *(Path(output, f"gradcam.{kind}") for kind in ("pdf", "png", "pt")))
    subject = zoo.create(model, size, weights) if weights else zoo.create_untrained(model, size, None)
    place = zoo.choose_device(device)
    photograph = images.square(image, size)
    inputs = images.tensor(photograph, subject).to(place)
    subject.model.to(place)
    with torch.no_grad():
        logits = subject.model(inputs)[0]
    target = int(logits.argmax()) if target is None else target
    if not 0 <= target < len(logits):
        raise UserError(f"there is no class {target}; this model has classes 0 to {len(logits) - 1}")
    maps = torch.stack([class_map(subject.model, layer, inputs, target) for layer in layers])
    title = f"{subject.title}, {subject.facts}\nfor class {target}, {size} x {size} pixels"
    plot(maps, photograph, layers, title, Path(output) / "gradcam")
    write_tensors(Path(output) / "gradcam.pt", maps)
    print(f"written to {output}")
    return maps


def class_map(model: nn.Module, layer: str, inputs: Tensor, target: int) -> Tensor:
    """(H, W) of the image, from 0 to 1: what of the output of block `layer` speaks for class `target`."""
    block = find_block(model, layer)
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise UserError("Grad-CAM needs the package grad-cam; pip install -e '.[analysis]'") from error
    with GradCAM(model, [block], reshape_transform=lambda x: x.permute(0, 3, 1, 2)) as cam:
        return torch.from_numpy(cam(inputs, [ClassifierOutputTarget(target)])[0])


def plot(maps: Tensor, photograph: Image.Image, layers: Sequence[str], title: str, path: Path) -> None:
    """The image, then each layer's map over it."""
    with rc_context(STYLE):
        figure = new_figure(2.3 * (len(maps) + 1) + 0.6, 3.0)
        grid = figure.subplots(1, len(maps) + 1)
        figure.suptitle(title, fontsize=9)
        for axes, name in zip(grid, ["image", *(f"layer {layer}" for layer in layers)], strict=True):
            axes.set_axis_off()
            axes.set_title(name)
            axes.imshow(photograph)
        for axes, values in zip(grid[1:], maps, strict=True):
            mesh = axes.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=1, alpha=0.6)
        figure.colorbar(mesh, ax=grid, label="share of the map's largest", fraction=0.03)
        save_figure(figure, path)
