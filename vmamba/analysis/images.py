"""The images that models are shown: of a folder, or photographs that come with scikit-learn."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from vmamba.analysis.zoo import Subject
from vmamba.data.folders import LeftOut, image_files
from vmamba.data.images import COLOURS, UnreadableImage, decode
from vmamba.errors import UserError
from vmamba.text import counted, printable


def squares(folder: str | None, count: int, size: int) -> list[Image.Image]:
    """`count` square images of `size` pixels a side.

    Of a folder: the centres of its first ones, by name, folders inside it included.  Without a folder: squares cut at
    random, always the same ones, from scikit-learn's two sample photographs.
    Raises UserError when the folder cannot be looked into or has too few, or one cannot be read.
    """
    if folder is None:
        return [_crop(image, size) for _, image in zip(range(count), _random_squares(), strict=False)]
    left_out = LeftOut()
    paths = sorted(map(Path, image_files(folder, left_out)))[:count]
    if len(paths) < count:
        beside = f" (left out: {left_out})" if left_out else ""
        raise UserError(
            f"'{printable(folder)}' holds {counted(len(paths), 'image')} of the {count} asked for{beside}; lower "
            f"--num-images"
        )
    return [_crop(read(path), size) for path in paths]


def read(path: str | Path | None) -> Image.Image:
    """The image of a file, or scikit-learn's photograph of a flower.  Raises UserError when it cannot be read."""
    if path is None:
        return Image.fromarray(load_sample_images().images[1])
    try:
        return decode(path, 3, path)
    except UnreadableImage as error:
        raise UserError(f"{error}; give another image") from error


def square(path: str | Path | None, size: int) -> Image.Image:
    """The centre of `read(path)`, `size` pixels a side."""
    return _crop(read(path), size)


def tensor(image: Image.Image, subject: Subject) -> Tensor:
    """What the model takes: (1, in_chans, H, W), normalised as it was trained.  Raises UserError for one that takes
    neither gray nor RGB images."""
    if subject.in_chans not in COLOURS:
        raise UserError(
            f"{subject.name} is of images of {subject.in_chans} channels, which no picture shows; choose another"
        )
    if subject.in_chans == 1:
        image = image.convert("L")
    pixels = transforms.to_dtype(transforms.to_image(image), torch.float32, scale=True)
    return transforms.normalize(pixels, list(subject.mean), list(subject.std)).unsqueeze(0)


def _crop(image: Image.Image, size: int) -> Image.Image:
    return transforms.center_crop(transforms.resize(image, [size], antialias=True), [size, size])


def _random_squares() -> Iterator[Image.Image]:
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    while True:
        for image in photographs:
            share, left, top = torch.rand(3, generator=generator).tolist()
            side = int((0.5 + 0.5 * share) * min(image.size))
            left, top = int(left * (image.width - side)), int(top * (image.height - side))
            yield image.crop((left, top, left + side, top + side))
