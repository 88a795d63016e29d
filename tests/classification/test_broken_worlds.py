"""Files as they are in the world, by every way of decoding: each comes out as by Pillow, or is named and counted."""

import io
import logging
import os
import re
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from vmamba.classification import nvjpeg
from vmamba.classification.data import LabelledImages, build_eval_loader, build_train_loader
from vmamba.config import get_config
from vmamba.config.keys import keys_of
from vmamba.data.images import decode_pixels
from vmamba.errors import UserError
from vmamba.runtime.feed import Ahead

WAYS = ("pillow", "torchvision", "nvjpeg")
PHOTO = Image.fromarray(load_sample_image("flower.jpg")).resize((120, 90))


def encoded(image=PHOTO, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


def transparent_palette():
    image = PHOTO.quantize(16)
    return encoded(image, "PNG", transparency=3)


def of_size(width, height):
    """A JPEG whose header says so."""
    data = bytearray(encoded())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def flipped():
    data = bytearray(encoded(quality=95))
    place = len(data) // 2
    data[place : place + 40] = bytes(255 - value & 0xFE for value in data[place : place + 40])
    return bytes(data)


READ = {
    "a.jpg": encoded(),
    "png.jpg": encoded(kind="PNG"),
    "jpeg.png": encoded(),
    "cmyk.jpg": encoded(PHOTO.convert("CMYK")),
    "gray.jpg": encoded(PHOTO.convert("L")),
    "progressive.jpg": encoded(progressive=True),
    "444.jpg": encoded(subsampling=0),
    "rgb.jpg": encoded(keep_rgb=True),
    "behind.jpg": encoded() + b"what a camera writes behind its picture" * 9,
    "bits.png": encoded(Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257), "PNG"),
    "palette.png": encoded(PHOTO.quantize(16), "PNG"),
    "transparent.png": transparent_palette(),
    "alpha.png": encoded(PHOTO.convert("RGBA"), "PNG"),
    "turned.jpg": turned(),
    "long.jpg": encoded(PHOTO.resize((30_000, 20))),
    "moving.gif": encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO]),
}  # fmt: skip
REFUSED = {
    "truncated.jpg": (encoded()[:1500], "image file is truncated"),
    "nothing.jpg": (b"", "it is not an image of a format that Pillow knows"),
    "text.jpg": (b"<html>not found</html>", "it is not an image of a format that Pillow knows"),
    "huge.jpg": (of_size(30_000, 30_000), "it has more pixels than the 178,956,970 that are taken"),
    "header.jpg": (encoded()[:80], ""),
    "floats.tif": (encoded(PHOTO.convert("F"), "TIFF"), "its values are floating-point numbers"),
}


def decoded_here(files, channels, device):
    return [decode_pixels(file.numpy().tobytes(), channels, "it") for file in files]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """nvJPEG's decoder is one that decodes here; its own refusals are in test_nvjpeg.py."""
    monkeypatch.setattr(nvjpeg, "check_gpu", lambda config: None)
    monkeypatch.setattr(nvjpeg, "decode_jpegs", decoded_here)
    return request.param


def config_of(root, way, *opts):
    opts = ["DATA.DATA_PATH", str(root), "DATA.DECODE", way, "MODEL.NUM_CLASSES", "2", "DATA.NUM_WORKERS", "0", *opts]
    return get_config(None, ["DATA.IMG_SIZE", "64", "DATA.BATCH_SIZE", "8", "TEST.CROP", "false", *opts])


def write(root, files):
    for split in ("train", "val"):
        for name in ("one", "two"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.jpg").write_bytes(READ["a.jpg"])
        for name, data in files.items():
            (root / split / "two" / name).write_bytes(data)


def test_these_are_all_ways():
    assert keys_of("classification")["DATA.DECODE"].takes.choices == WAYS


def test_what_pillow_reads_comes_out_as_by_pillow(tmp_path, way):
    """To a level or two, which resizing rounds otherwise."""
    write(tmp_path, READ)
    images = {}
    for each in ("pillow", way):
        loader = build_eval_loader(config_of(tmp_path, each), rank=0, world_size=1)
        images[each] = torch.cat([loader.finish(batch)[0] for batch in loader]) * 0.225 * 255
        names = [loader.examples.source.source.name(index) for index in range(loader.images)]
    for name, ours, theirs in zip(names, images[way], images["pillow"], strict=True):
        difference = (ours - theirs).abs()
        assert difference.mean() < 0.4 and difference.max() < 4, name
    assert len(names) == 2 + len(READ)


def test_what_pillow_refuses_is_named_and_counted(tmp_path, way, caplog):
    write(tmp_path, {name: data for name, (data, _) in REFUSED.items()})
    loader = build_eval_loader(config_of(tmp_path, way, "DATA.SKIP_BAD_IMAGES", "true"), rank=0, world_size=1)
    with caplog.at_level(logging.WARNING, "vmamba"):
        labels = torch.cat([loader.finish(batch)[1] for batch in loader])
    assert labels.tolist() == [0, 1] and loader.skipped == len(REFUSED)
    said = sorted(record.getMessage() for record in caplog.records)
    for name, (_, why) in REFUSED.items():
        assert sum(bool(re.search(f"skipped an image: cannot read '.*/{name}': {why}", each)) for each in said) == 1
    assert len(said) == len(REFUSED)


def test_training_goes_on_with_others_in_their_place(tmp_path, way):
    write(tmp_path, {**READ, **{name: data for name, (data, _) in REFUSED.items()}})
    loader = build_train_loader(config_of(tmp_path, way, "DATA.SKIP_BAD_IMAGES", "true"), rank=0, world_size=1)
    batches = [loader.finish(batch)[0] for batch in loader]
    assert [len(images) for images in batches] == [8] * (loader.images // 8) and loader.skipped > 0
    assert all(images.isfinite().all() for images in batches)


@pytest.mark.parametrize("name", REFUSED)
def test_unless_asked_to_skip_a_run_ends_with_its_name(tmp_path, way, name):
    write(tmp_path, {name: REFUSED[name][0]})
    loader = build_eval_loader(config_of(tmp_path, way), rank=0, world_size=1)
    with pytest.raises(UserError, match=f"cannot read '.*/{name}': .*; mend or remove it, or set DATA.SKIP_BAD_IMAG"):
        list(loader)


def test_what_is_damaged_inside_is_what_pillow_makes_of_it(tmp_path, way):
    write(tmp_path, {"flipped.jpg": flipped()})
    ours, theirs = (
        torch.cat([loader.finish(batch)[0] for batch in loader])
        for loader in (build_eval_loader(config_of(tmp_path, each), rank=0, world_size=1) for each in (way, "pillow"))
    )
    assert ours.shape == theirs.shape and (ours - theirs).abs().mean() * 0.225 * 255 < 0.4


def test_a_loading_process_that_is_killed_is_a_sentence(tmp_path, way, monkeypatch):
    write(tmp_path, {})
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # what a thread waits for, not told so
    monkeypatch.setattr(LabelledImages, "load", lambda self, index: os.kill(os.getpid(), signal.SIGKILL))
    loader = build_eval_loader(config_of(tmp_path, way, "DATA.NUM_WORKERS", "1"), rank=0, world_size=1)
    take = partial(next, iter(loader))
    with pytest.raises(UserError, match="a loading process was killed"):
        (Ahead(take) if loader.ahead else take)()
