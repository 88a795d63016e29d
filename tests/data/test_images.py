"""The decoder: each kind of image comes out as it looks, in 8 bits, or is refused in a sentence."""

import io
import os
import struct
import zlib
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmamba.data import images
from vmamba.data.images import UnreadableImage, decode, decode_pixels, reading, suffixes


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(images, "_told", set())


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """`rows`: a zero byte and the values of each row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(data: bytes, width: int, bits: int, *, kind: int = 1, white_is_zero: bool = False, order: str = "<") -> bytes:
    """One row.  `kind` of numbers: 1 unsigned, 2 signed, 3 floating point."""
    shorts = [(256, width), (257, 1), (258, bits), (259, 1), (262, 0 if white_is_zero else 1)]
    shorts += [(273, 8 + 2 + 9 * 12 + 4), (277, 1), (279, len(data)), (339, kind)]
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in shorts)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(shorts))
    return start + entries + struct.pack(f"{order}I", 0) + data


def gray(image) -> list[int]:
    return np.asarray(decode(image, 1, "it")).ravel().tolist()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_every_mode_of_8_bits_becomes_gray_or_rgb(mode):
    red = Image.new("RGB", (5, 3), (200, 30, 40))
    by_way = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}.get(mode, "RGB")
    image = red.convert(by_way).convert(mode)
    colour = {"1": None, "L": (81,) * 3, "LA": (81,) * 3, "La": (81,) * 3}.get(mode, (200, 30, 40))
    assert decode(image, 1, "it").mode == "L" and decode(image, 3, "it").mode == "RGB"
    if colour and mode not in ("P", "PA"):  # to a palette it came by dithering
        assert np.abs(np.subtract(decode(image, 3, "it").getpixel((2, 2)), colour)).max() <= 3
        assert abs(decode(image, 1, "it").getpixel((2, 2)) - 81) <= 3


def test_bytes_a_path_and_an_open_file_are_the_same(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    path = tmp_path / "it.png"
    path.write_bytes(encoded(Image.fromarray(pixels)))
    with path.open("rb") as file:
        for image in (path, str(path), path.read_bytes(), file, Image.open(path)):
            assert np.array_equal(decode(image, 3, "it"), pixels)


def test_of_16_bits_65535_is_white():
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF", "JPEG2000"):
        assert gray(encoded(Image.fromarray(values), kind)) == [0, 0, 127, 255]
    assert gray(b"P5\n4 1\n65535\n" + values.byteswap().tobytes()) == [0, 0, 127, 255]
    assert np.asarray(decode(Image.fromarray(values), 3, "it"))[0, :, 2].tolist() == [0, 0, 127, 255]


def test_older_pillows_make_integers_of_a_png_of_16_bits():
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.int32))
    image.format = "PNG"
    assert gray(image) == [0, 0, 127, 255]


def test_a_file_may_say_that_another_value_is_white():
    assert gray(tiff(bytes([0xFF, 0xF8, 0x00, 0x00, 0x00, 0xF0]), 4, 12)) == [255, 127, 0, 14]  # 4095, 2048, 0, 240
    assert gray(b"P5\n3 1\n4095\n" + struct.pack(">3H", 4095, 2048, 0)) == [255, 127, 0]
    assert gray(tiff(struct.pack("<3H", 0, 65535, 65279), 3, 16, white_is_zero=True)) == [255, 0, 0]
    assert gray(tiff(struct.pack(">3H", 0, 65535, 512), 3, 16, order=">")) == [0, 255, 1]


@pytest.mark.parametrize(
    "dark",
    [
        encoded(Image.fromarray(np.array([[0, 16383]], dtype=np.uint16))),
        encoded(Image.fromarray(np.array([[0, 255]], dtype=np.uint16)), "TIFF"),
        png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 16383, 0, 100)),
        png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 16383, 0, 100, 65535)),  # what is transparent does not count
    ],
)
def test_what_is_dark_in_16_bits_is_told_once(dark, caplog):
    for name in ("first.png", "second.png"):
        decode(dark, 3, name)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "'first.png' is dark: 65535 is white in it, and nothing is brighter than 16383" in caplog.text


def test_what_is_dark_in_8_bits_or_bright_or_black_is_not_told(caplog):
    bright = np.array([[0, 16384]], dtype=np.uint16)
    for image in (Image.new("RGB", (2, 2), (9, 9, 9)), Image.fromarray(bright), Image.fromarray(bright * 0)):
        decode(encoded(image), 3, "it")
    decode(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 16384, 0, 100)), 3, "it")
    assert not caplog.records


@pytest.mark.parametrize(
    "image, kind",
    [
        (tiff(struct.pack("<2I", 0, 255), 2, 32), "signed or have 32 bits"),
        (tiff(struct.pack("<2i", 0, 255), 2, 32, kind=2), "signed or have 32 bits"),
        (tiff(struct.pack("<2h", -5, 255), 2, 16, kind=2), "signed or have 32 bits"),
        (tiff(struct.pack("<2f", 0, 1), 2, 32, kind=3), "floating-point numbers"),
        (Image.new("I", (2, 2)), "signed or have 32 bits"),
        (Image.new("F", (2, 2)), "floating-point numbers"),
    ],
)
def test_a_white_that_nothing_says_is_refused(image, kind):
    sentence = f"cannot read 'deep.tif': its values are {kind}, and nothing says which one is white; convert it to 8 or"
    with pytest.raises(UnreadableImage, match=sentence):
        decode(image, 3, "deep.tif")


def test_a_transparent_palette_keeps_its_colours():
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert decode(encoded(image, transparency=b"\xff\x00"), 3, "it").getpixel((0, 0)) == (10, 200, 30)


def test_the_orientation_of_a_camera_is_left_aside_as_timm_does():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert decode(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif), 3, "it").size == (4, 2)


@pytest.mark.parametrize(
    "image, why",
    [
        (b"text", "it is not an image of a format that Pillow knows"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is not an image of a format that Pillow knows"),
        (png(20000, 20000, 1, 0, b""), "it has more pixels than the 178,956,970 that are taken; make it smaller"),
        (encoded(Image.new("L", (50, 50)), "PNG")[:-30], "image file is truncated"),
        ("/nowhere/it.png", "No such file or directory"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(image, why):
    with pytest.raises(UnreadableImage) as error:
        decode(image, 3, "a\udcff\n.png")
    assert str(error.value).startswith(f"cannot read 'a\\udcff\\n.png': {why}") and str(error.value).encode()


@pytest.mark.parametrize(
    "error", [zlib.error("bad"), struct.error("bad"), SyntaxError("bad"), KeyError(), MemoryError()]
)
def test_whatever_reading_raises_is_told_of_the_image(error):
    with pytest.raises(UnreadableImage, match=f"cannot read 'it': ({type(error).__name__}|bad)$"), reading("it"):
        raise error


def test_the_suffixes_are_those_of_formats_with_pixels():
    known = suffixes()
    assert {".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".mpo"} <= known
    assert not {".eps", ".h5", ".pdf", ".mpg", ".txt", ".heic"} & known  # .pdf is written only


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_other_numbers_of_channels_are_taken_as_they_are(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (13, 5, 7), dtype=np.uint8)
    (tmp_path / "it.npy").write_bytes(npy(values))
    with (tmp_path / "it.npy").open("rb") as file:
        behind = npy(np.asfortranarray(values.transpose(1, 2, 0)))
        for image in (tmp_path / "it.npy", str(tmp_path / "it.npy"), npy(values), file, behind):
            assert np.array_equal(decode(image, 13, "it"), values)
    for mode in ("RGBA", "CMYK"):  # the fourth is no transparency here
        four = Image.frombytes(mode, (7, 5), values[:4].transpose(1, 2, 0).tobytes())
        assert np.array_equal(decode(four, 4, "it"), values[:4])
    assert np.array_equal(decode(encoded(Image.fromarray(values[:4].transpose(1, 2, 0))), 4, "it"), values[:4])
    assert suffixes(13) - suffixes() == {".npy"} and suffixes(1) == suffixes()


@pytest.mark.parametrize(("image", "why"), [
    (npy(np.zeros((13, 5, 5), np.uint16)), "its values are uint16; scale them to 0..255 and convert them to uint8"),
    (npy(np.zeros((12, 5, 5), np.uint8)), r"the shape \(12, 5, 5\), and MODEL.IN_CHANS is 13"),
    (npy(np.zeros((5, 5), np.uint8)), r"the shape \(5, 5\), and MODEL.IN_CHANS is 13"),
    (npy(np.zeros((13, 0, 5), np.uint8)), r"the shape \(13, 0, 5\), and MODEL.IN_CHANS is 13"),
    (npy(np.array([{}], object)), "allow_pickle"),
    (npy(np.zeros((13, 5, 5), np.uint8))[:200], "cannot read 'it'"),
    (Image.new("RGB", (5, 5)), r"the shape \(5, 5, 3\), and MODEL.IN_CHANS is 13"),
])  # fmt: skip
def test_other_channels_that_do_not_fit_are_refused(image, why):
    with pytest.raises(UnreadableImage, match=why):
        decode(image, 13, "it")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    """A name in annotations may lead anywhere."""
    os.mkfifo(tmp_path / "pipe.png")
    readers = (partial(decode, channels=3), partial(decode, channels=13), partial(decode_pixels, channels=3))
    for path, read in product((tmp_path / "pipe.png", "/dev/zero", tmp_path), readers):
        with pytest.raises(UnreadableImage, match="it is a device, a pipe or a folder, and no file"):
            read(path, name=path)


def test_no_image_is_opened_but_by_the_decoder_that_starts_no_program():
    """Pillow hands an EPS, whatever its name ends in, to Ghostscript."""
    sources = Path(images.__file__).parents[1].rglob("*.py")
    assert [path.name for path in sources if "Image.open(" in path.read_text()] == ["images.py"]
    with pytest.raises(UnreadableImage, match="it is not an image of a format that Pillow knows"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", 3, "it")
