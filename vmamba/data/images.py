"""The one decoder: an image of any kind becomes gray or RGB of 8 bits a value, or is refused in a sentence.  Of another
number of channels it is taken as it is, from NumPy's files and from Pillow's modes with so many.

Of several frames the first counts.  Transparency, EXIF orientation and colour profiles are left aside, as timm does.

Of values with more than 8 bits the file must say which one is white:

- unsigned 16 bits: 65535, as PNG, PGM, TIFF and JPEG 2000 have it, and what the file names where it names another
  (a TIFF of 12 bits, a PGM).  Values of 10 to 14 bits that lie unscaled in a file of 16 are dark, and cannot be told
  from a picture taken in the dark: the first such image that a process meets is named in the log.
- signed, 32 bits, floating point: no format says it, so these are refused.
"""

import io
import logging
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from vmamba.errors import UserError
from vmamba.text import printable

logger = logging.getLogger("vmamba")
COLOURS = (1, 3)  # channels of gray and RGB images

# Pillow names these and has no pixels of them, or starts another program to get some (EPS), or on Windows only (WMF).
_NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}  # modes that become L and RGB
_BY_WAY_OF = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB", "HSV": "RGB"}
_WHITE_IS_65535 = (None, "PNG", "PPM", "TIFF", "JPEG2000")  # formats of 16-bit images; None: made in memory
_DARK = 4  # what stays below this part of white is dark: of 14 bits in 16
_told: set[str] = set()  # of what this process has warned


class UnreadableImage(Exception):
    """An image that cannot be read or decoded.  Its text names the image and says why, in one line."""


def decode(
    image: Image.Image | np.ndarray | bytes | str | Path | BinaryIO, channels: int, name: str | Path
) -> Image.Image | Tensor:
    """`image`, an array (H, W, its channels) of uint8, the bytes of a file, its path or the open file, as gray (1
    channel) or RGB (3), 8 bits a value; of other `channels` as a tensor (channels, H, W), uint8.

    `name` stands in the sentences.  Raises UnreadableImage.
    """
    with reading(name):
        if channels not in COLOURS:
            return _bands(image, channels)
        if isinstance(image, np.ndarray):
            image = _of_array(image)
        if not isinstance(image, Image.Image):
            image = open_image(image)
        if 0 in image.size:
            raise ValueError(f"it is {image.width} x {image.height} pixels, so there is none")
        sixteen_bits = any(re.search("(?<!BGR);16", str(tile[3])) for tile in getattr(image, "tile", ()))
        image.load()
        if image.mode.startswith("I"):
            return _gray(image, name).convert(_mode(channels))
        image = _converted(image, channels)
        if sixteen_bits and np.max(image.getextrema()) < 256 // _DARK:  # Pillow keeps the upper 8 bits
            _tell_dark(name, 65535)
        return image


def decode_pixels(image: Image.Image | bytes | str | Path | BinaryIO, channels: int, name: str | Path) -> Tensor:
    """What `decode` gives of gray or RGB, as a tensor (channels, H, W), uint8; JPEGs by torchvision, which is faster.

    Those are JPEGs of gray or RGB that need no conversion but from gray to RGB; the others are Pillow's.  Raises
    UnreadableImage.
    """
    with reading(name):
        if isinstance(image, (str, Path)):
            image = _content(image)
        if isinstance(image, bytes):
            data, image = image, open_image(image)
            if image.format == "JPEG" and image.mode in ("L", _mode(channels)):
                with suppress(RuntimeError):  # of a damaged one, of which Pillow says more clearly what is wrong
                    return _decode_jpeg(data, channels)
    return pil_to_tensor(decode(image, channels, name))


def check_decoder() -> None:
    """Raises UserError where torchvision does not decode: newer ones call it deprecated."""
    try:
        from torchvision.io import decode_jpeg  # noqa: F401
    except ImportError as error:
        raise UserError("this torchvision decodes no JPEGs; choose DATA.DECODE pillow, or an older one") from error


def _decode_jpeg(data: bytes, channels: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Whatever is raised inside, but a UserError, becomes UnreadableImage: a decoder, or a damaged archive, may raise
    anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UnreadableImage(printable(f"cannot read '{name}': {_reason(error)}")) from error


def suffixes(channels: int = 3) -> set[str]:
    """Of files that `decode` may read of so many channels: in small letters, with their dots."""
    Image.init()
    formats = {*Image.OPEN, "MPO"} - _NO_PIXELS  # MPO is opened as the JPEG that it begins with
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats}
    return known if channels in COLOURS else known | {".npy"}


def _of_array(array: np.ndarray) -> Image.Image:
    """Of (H, W), or (H, W, 1), (H, W, 3) or (H, W, 4): gray, RGB or RGBA."""
    _check_values(array)
    if 0 in array.shape or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"its shape is {array.shape}; an array is (H, W), or (H, W, channels) of 1, 3 or 4 channels")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _check_values(array: np.ndarray) -> None:
    if array.dtype != np.uint8:
        raise ValueError(f"its values are {array.dtype}; scale them to 0..255 and convert them to uint8")


def _bands(image: Image.Image | np.ndarray | bytes | str | Path | BinaryIO, channels: int) -> Tensor:
    """(channels, H, W), uint8, of an array with the channels in front or behind, in front where both could be."""
    if isinstance(image, (str, Path)):
        image = _content(image)
    elif not isinstance(image, (bytes, Image.Image, np.ndarray)):
        image = image.read()
    if isinstance(image, np.ndarray):
        array = image
    elif isinstance(image, bytes) and image.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(image), allow_pickle=False)
    else:
        image = image if isinstance(image, Image.Image) else open_image(image)
        array = np.asarray(image)
    _check_values(array)
    shape = array.shape
    if array.ndim == 3 and shape[0] != channels:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] != channels or 0 in array.shape:
        raise ValueError(f"its values have the shape {shape}, and MODEL.IN_CHANS is {channels}")
    return torch.from_numpy(array.copy())


def _content(path: str | Path) -> bytes:
    """Of a file: what a device or a pipe gives, which a name in annotations may lead to, need not end."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError("it is a device, a pipe or a folder, and no file")
    return Path(path).read_bytes()


def open_image(file: bytes | str | Path | BinaryIO) -> Image.Image:
    """Of its header: pixels are read when they are asked for."""
    if isinstance(file, (str, Path)):
        file = _content(file)
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    Image.init()
    return Image.open(file, formats=[kind for kind in Image.ID if kind not in _NO_PIXELS])


def _mode(channels: int) -> str:
    return "L" if channels == 1 else "RGB"


def _converted(image: Image.Image, channels: int) -> Image.Image:
    """Of a mode of 8 bits."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in _BY_WAY_OF:
        image = image.convert(_BY_WAY_OF[image.mode])
    if image.mode not in _EIGHT_BITS:
        kind = "floating-point numbers" if image.mode == "F" else f"of Pillow's mode {image.mode}"
        raise ValueError(_refusal(kind))
    return image.convert(_mode(channels))


def _gray(image: Image.Image, name: str | Path) -> Image.Image:
    """The 8 bits (mode L) of an image of integers."""
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # of 16 bits in these, though the mode is of 32
        raise ValueError(_refusal("signed or have 32 bits"))
    if image.format not in _WHITE_IS_65535:
        raise ValueError(_refusal(f"of 16 bits in a file of format {image.format}"))
    values, white = np.asarray(image).astype(np.int32), 65535
    if image.format == "TIFF":
        white = 2 ** image.tag_v2[258][0] - 1
        if image.tag_v2.get(262) == 0:  # 0 is white; of 8 bits Pillow knows it
            values = white - values
    gray = (values.clip(0, white) * 255 // white).astype(np.uint8)
    if 0 < values.max() < (white + 1) // _DARK:
        _tell_dark(name, white)
    return Image.fromarray(gray)


def _refusal(kind: str) -> str:
    return f"its values are {kind}, and nothing says which one is white; convert it to 8 or 16 bits a value"


def _tell_dark(name: str | Path, white: int) -> None:
    if "dark" in _told:
        return
    _told.add("dark")
    logger.warning(
        "'%s' is dark: %d is white in it, and nothing is brighter than %d; if its values have fewer bits than "
        "its file, scale the images to the whole range (others like it are not named)",
        printable(name),
        white,
        white // _DARK,
    )


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image of a format that Pillow knows"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more pixels than the {2 * Image.MAX_IMAGE_PIXELS:,} that are taken; make it smaller"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
