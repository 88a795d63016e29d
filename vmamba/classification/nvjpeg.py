"""JPEGs decoded, cropped and resized by batches on the GPU that computes (DATA.DECODE nvjpeg).

A loading process reads a file and its header, and draws the crop.  What a GPU may not do or do otherwise than Pillow it
decodes itself, as by DATA.DECODE torchvision: other formats, JPEGs that are gray, progressive, in other colours,
without their end, or of very many pixels.
"""

import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import crop, get_dimensions
from yacs.config import CfgNode

from vmamba.data.images import UnreadableImage, check_decoder, decode_pixels, open_image, reading
from vmamba.errors import UserError

logger = logging.getLogger("vmamba")

FILTERS = ("bilinear", "bicubic")
_MOST_PIXELS = 2**24  # of an image: 50 MB on the GPU
_MOST_VALUES = 2**27  # of crops that are resized at once, filled up to one size
_MIDDLE = 128  # of 0 to 255: the nearer to it, the finer a number of 16 bits is
_END = b"\xff\xd9"  # of a JPEG; in its pixels it does not occur
_told: set[str] = set()  # of what this process has warned


@dataclass(frozen=True)
class Encoded:
    """The file of an image of this size that the GPU shall decode."""

    file: bytes
    height: int
    width: int
    name: str  # for a sentence


@dataclass(frozen=True)
class Crop:
    """Of an image the part that is resized, to which size, and what is cut out of that."""

    top: int
    left: int
    height: int
    width: int
    scaled: tuple[int, int]  # height and width
    shift: tuple[int, int]  # of the upper left corner of what is cut out
    size: tuple[int, int]  # of that


@dataclass(frozen=True)
class Later:
    """Stands for the pixels of an image."""

    image: Encoded
    crop: Crop
    channels: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.channels, *self.crop.size])


@dataclass(frozen=True)
class Files:
    """Of a batch the images that the GPU shall decode.  They stay in the host's memory, which `Feed` knows: this is no
    tensor."""

    data: Tensor  # of all files, one behind the other, uint8
    lengths: list[int]
    names: list[str]
    crops: list[Crop]
    places: list[int]  # in the batch
    shapes: list[tuple[int, int, int]]  # (C, H, W) of the images as decoded


def decode_later(
    image: Image.Image | bytes | str | Path | BinaryIO, channels: int, name: str | Path
) -> Encoded | Tensor:
    """What the GPU can decode as it is, and other images as `decode_pixels` gives them.  Raises UnreadableImage."""
    with reading(name):
        if isinstance(image, (str, Path)):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            header = open_image(image)
            if _is_plain(header, channels) and _END in image[-64:]:
                return Encoded(image, header.height, header.width, str(name))
    return decode_pixels(image, channels, name)


def _is_plain(header: Image.Image, channels: int) -> bool:
    """Whether a JPEG is one that all decoders see alike: baseline, gray or YCbCr by its components' numbers."""
    return (
        header.format == "JPEG"
        and header.mode == ("L" if channels == 1 else "RGB")
        and not header.info.get("progressive")
        and header.info.get("adobe_transform", 1) == 1
        and [component[0] for component in header.layer] != [*b"RGB"]
        and header.height * header.width <= _MOST_PIXELS
    )


def draw_crop(steps: Sequence[Callable], image: Encoded, channels: int) -> Later | Tensor:
    """What the first steps of timm's transform do to an image, drawn as they draw; of a crop without a pixel black."""
    part, shift = (0, 0, image.height, image.width), (0, 0)
    scaled = size = part[2:]
    for step in steps:
        seen = torch.empty(channels, *part[2:], dtype=torch.uint8, device="meta")
        if isinstance(step, CutLong):
            part = step.middle(*part[2:])
        elif isinstance(step, RandomResizedCropAndInterpolation):
            part = step.get_params(seen, step.scale, step.ratio)
            scaled = size = step.size
        elif isinstance(step, ResizeKeepRatio):
            scaled = size = tuple(step.get_params(seen, step.size, step.longest))
        elif isinstance(step, transforms.Resize):
            scaled = size = resized_size(step.size, *part[2:])
        else:  # CenterCrop
            size = step.size
            shift = tuple(round((old - new) / 2) for old, new in zip(scaled, size, strict=True))
    if 0 in part[2:]:
        return torch.zeros(channels, *size, dtype=torch.uint8)
    return Later(image, Crop(*part, scaled, shift, size), channels)


class CutLong:
    """A step before an image is resized to a short side and its middle of `size` (h, w) cut out: of one more than 32
    times as long as it is wide the middle is enough, and all of it would take gigabytes.

    What is seen lies where it did, but for half a pixel.
    """

    def __init__(self, size: Sequence[int]):
        self.most = 32 * max(size) / min(size)

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        _, height, width = get_dimensions(image)
        middle = self.middle(height, width)
        return image if middle == (0, 0, height, width) else crop(image, *middle)  # Pillow would copy it

    def middle(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Its top, left, height and width."""
        tall, wide = self._kept(height, width), self._kept(width, height)
        return (height - tall) // 2, (width - wide) // 2, tall, wide

    def _kept(self, side: int, other: int) -> int:
        """Of a side, with as much left out at both ends."""
        kept = min(side, math.ceil(self.most * other))
        return kept + (side - kept) % 2


def resized_size(size: int | Sequence[int], height: int, width: int) -> tuple[int, int]:
    """Height and width that torchvision's Resize makes of an image: `size`, or of one number the short side."""
    if not isinstance(size, int):
        return tuple(size)
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def check_steps(steps: Sequence[Callable]) -> None:
    """Raises UserError for one that `draw_crop` does not know."""
    known = (CutLong, RandomResizedCropAndInterpolation, transforms.Resize, ResizeKeepRatio, transforms.CenterCrop)
    for step in steps:
        if not isinstance(step, known):
            raise UserError(
                f"DATA.DECODE nvjpeg does not do {type(step).__name__}, as small images are augmented by; choose "
                "DATA.DECODE torchvision or pillow"
            )


def gather_files(images: Sequence[Later], places: list[int]) -> Files:
    files = [each.image for each in images]
    return Files(
        torch.frombuffer(bytearray().join(file.file for file in files), dtype=torch.uint8),
        [len(file.file) for file in files],
        [file.name for file in files],
        [each.crop for each in images],
        places,
        [(each.channels, file.height, file.width) for each, file in zip(images, files, strict=True)],
    )


class Decoder:
    """Makes a batch's images whole: those that its `files` hold are decoded, cropped and resized on the device.

    Waits for the device, so `Feed` lets a thread do it.  Raises UserError where `check_gpu` does.
    """

    def __init__(self, config: CfgNode):
        check_gpu(config)
        self.filter = config.DATA.INTERPOLATION

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, C, H, W) uint8, on the device of `batch`."""
        ready, files, device = batch["images"], batch.get("files"), batch["labels"].device
        if len(ready) and "others" not in _told:
            _told.add("others")
            logger.info(
                "loading processes decode what is no baseline JPEG of the model's colours: %d of the %d images of this "
                "batch (said once)",
                len(ready),
                len(batch["labels"]),
            )
        if files is None:
            return ready
        with _decoding(device) as stream:
            pixels = in_one_piece(self._decoded(files, device))
            if stream:
                stream.synchronize()  # nvJPEG reads the files, and writes to memory that was read here before
        if stream:
            pixels.record_stream(torch.cuda.current_stream(device))
        seen = crop_and_resize(pixels, files.shapes, files.crops, self.filter)
        images = seen.new_empty(len(batch["labels"]), *seen.shape[1:])
        others = sorted({*range(len(images))} - {*files.places})
        for part, places in ((seen, files.places), (ready, others)):
            images.index_copy_(0, _to(places, device), part)
        return images

    def _decoded(self, files: Files, device: torch.device) -> list[Tensor]:
        encoded = [*files.data.split(files.lengths)]
        try:
            decoded = decode_jpegs(encoded, files.shapes[0][0], device)
            if [tuple(image.shape) for image in decoded] == files.shapes:
                return decoded
        except RuntimeError:  # it does not say which one it could not decode
            pass
        each = zip(encoded, files.names, files.shapes, strict=True)
        return [self._one(file, name, shape, device) for file, name, shape in each]

    def _one(self, file: Tensor, name: str, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        try:
            image = decode_jpegs([file], shape[0], device)[0]
            why = f"the size {(*image.shape,)}, not {shape}" if tuple(image.shape) != shape else ""
        except RuntimeError as error:
            why = str(error).splitlines()[0]
        if not why:
            return image
        if "nvjpeg" not in _told:
            _told.add("nvjpeg")
            logger.warning(
                "nvJPEG does not decode '%s' (%s); the training process does, slowly (others like it are not named)",
                name,
                why,
            )
        try:
            return decode_pixels(file.numpy().tobytes(), shape[0], name).to(device)
        except UnreadableImage as error:
            raise UserError(
                f"{error}; mend or remove it: DATA.DECODE nvjpeg finds it too late to skip it, torchvision and pillow "
                "do not"
            ) from error


def decode_jpegs(files: list[Tensor], channels: int, device: torch.device) -> list[Tensor]:
    """Bytes (N,) each, on the host -> images (C, H, W), uint8, on the GPU.  Raises RuntimeError where one cannot be
    decoded."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(files, ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB, device)


def check_gpu(config: CfgNode) -> None:
    """Raises UserError where there is no GPU, or torchvision decodes nothing on it, as when built without nvJPEG."""
    if config.DEVICE == "cpu" or not torch.cuda.is_available():
        why = "DEVICE is cpu" if config.DEVICE == "cpu" else "here is none"
        raise UserError(
            f"DATA.DECODE nvjpeg decodes on an NVIDIA GPU, and {why}; choose DATA.DECODE torchvision or pillow"
        )
    check_decoder()
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        decode_jpegs([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], 3, device)
    except RuntimeError as error:
        raise UserError(
            f"this torchvision decodes no JPEG on this GPU ({str(error).splitlines()[0]}); choose DATA.DECODE "
            "torchvision or pillow"
        ) from error


@contextmanager
def _decoding(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """On a GPU a stream of its own, on which nothing else is waited for than decoding."""
    if device.type != "cuda":
        yield None
        return
    with torch.cuda.stream(_stream(device)):
        yield _stream(device)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _to(values: Sequence, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------ resizing


def in_one_piece(images: Sequence[Tensor]) -> Tensor:
    """All values of images (C, H, W), one behind the other, and zeros as many as the longest row: what is read from a
    pixel on, up to the length of a row, is there."""
    longest = max(image.shape[2] for image in images)
    return torch.cat([*(image.flatten() for image in images), images[0].new_zeros(longest)])


def crop_and_resize(
    pixels: Tensor, shapes: Sequence[tuple[int, int, int]], crops: Sequence[Crop], interpolation: str
) -> Tensor:
    """Of images (C, H, W), uint8, of these shapes `in_one_piece` -> (B, C, h, w) uint8, `crops` being of one size.

    As Pillow does it: rows first, then columns, both with a low pass and rounded to bytes; here as products of the
    crops, filled up to one size, with a matrix of weights for each.
    """
    starts = [0, *accumulate(math.prod(shape) for shape in shapes)]
    parts, order = [], []
    for some in _alike(crops, shapes[0][0]):
        places = [_place(starts[each], shapes[each], crops[each]) for each in some]
        parts.append(_resized(pixels, shapes[0][0], places, [crops[each] for each in some], interpolation))
        order += some
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts)[_to(back, pixels.device)]


def _place(start: int, shape: tuple[int, int, int], crop: Crop) -> tuple[int, int, int]:
    """Of a crop of an image that begins at `start` the first pixel, and how far it is to the next channel and row."""
    _, height, width = shape
    return start + crop.top * width + crop.left, height * width, width


def _alike(crops: Sequence[Crop], channels: int) -> list[list[int]]:
    """The crops by size, cut where filled up to one size they would take too much memory."""
    groups: list[list[int]] = []
    height = width = 0
    for each in sorted(range(len(crops)), key=lambda each: (crops[each].height * crops[each].width, each)):
        height, width = max(height, crops[each].height), max(width, crops[each].width)
        if not groups or (len(groups[-1]) + 1) * channels * height * width > _MOST_VALUES:
            groups.append([])
            height, width = crops[each].height, crops[each].width
        groups[-1].append(each)
    return groups


def _resized(
    pixels: Tensor, channels: int, places: Sequence[tuple[int, int, int]], crops: Sequence[Crop], interpolation: str
) -> Tensor:
    height, width = max(crop.height for crop in crops), max(crop.width for crop in crops)
    kind = torch.float16 if pixels.is_cuda else torch.float32
    filled = _filled(pixels, channels, places, height, width).to(kind).sub_(_MIDDLE)
    down = [(crop.height, crop.scaled[0], crop.shift[0]) for crop in crops]
    across = [(crop.width, crop.scaled[1], crop.shift[1]) for crop in crops]
    of_rows = _weights(down, crops[0].size[0], height, interpolation, filled)[:, None]
    of_columns = _weights(across, crops[0].size[1], width, interpolation, filled).mT
    lines = _as_bytes(torch.bmm(filled.flatten(1, 2), of_columns)).unflatten(1, (channels, height))
    return _as_bytes(of_rows @ lines).add_(_MIDDLE).to(torch.uint8)


def _filled(pixels: Tensor, channels: int, places: Sequence[tuple[int, int, int]], height: int, width: int) -> Tensor:
    """The crops as (B, C, height, width), uint8; below and to the right of each lie any pixels, which get no weight.

    Row by row, all at once: to be asked for a copy of each crop takes a GPU longer than the copies.
    """
    start, channel, row = _to(places, pixels.device)[:, :, None, None].unbind(1)
    each, lines = (torch.arange(number, device=pixels.device) for number in (channels, height))
    at = start + channel * each[:, None] + row * lines  # (B, C, height)
    return pixels.unfold(0, width, 1)[at.clamp(max=len(pixels) - width)]


def _as_bytes(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(-_MIDDLE, 255 - _MIDDLE)


def _weights(
    lines: Sequence[tuple[int, int, int]], wanted: int, filled: int, interpolation: str, like: Tensor
) -> Tensor:
    """Of each line (its length, the length it is scaled to, the first pixel wanted of that) the matrix (`wanted`,
    `filled`) from its pixels to those, as Pillow reckons it."""
    reach = 1 if interpolation == "bilinear" else 2  # of the filter, in pixels of the longer of both
    most = 2 * math.ceil(reach * max(1, *(length / scaled for length, scaled, _ in lines))) + 1
    length, scaled, first = _to(lines, like.device).float()[:, :, None, None].unbind(1)
    scale = length / scaled
    stretch = scale.clamp(min=1)
    middle = (torch.arange(wanted, device=like.device)[:, None] + first + 0.5) * scale
    start = (middle - reach * stretch + 0.5).floor().clamp(min=0)
    pixels = start + torch.arange(most, device=like.device)
    away = ((pixels + 0.5 - middle) / stretch).abs()
    if interpolation == "bilinear":
        weights = (1 - away).clamp(min=0)
    else:  # cubic with a = -0.5
        near, far = (1.5 * away - 2.5) * away * away + 1, ((2.5 - 0.5 * away) * away - 4) * away + 2
        weights = torch.where(away < 1, near, torch.where(away < 2, far, 0))
    end = torch.minimum((middle + reach * stretch + 0.5).floor(), length)
    weights = torch.where(pixels < end, weights, 0)
    weights = weights / weights.sum(2, keepdim=True)
    matrix = like.new_zeros(len(lines), wanted, filled + most)
    return matrix.scatter_(2, pixels.long(), weights.to(like.dtype))[:, :, :filled]
