"""Decoding on the GPU, all of it but the GPU's decoder itself, in whose place stands one that decodes here."""

import io
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from vmamba.classification import nvjpeg
from vmamba.classification.data import build_eval_loader, build_train_loader
from vmamba.classification.nvjpeg import Crop, Decoder, Encoded, check_gpu, crop_and_resize, decode_later, in_one_piece
from vmamba.classification.transforms import Normalise, build_pixels, collate
from vmamba.config import get_config
from vmamba.data.draws import IMAGE, preserved_generators, seed_generators
from vmamba.data.images import UnreadableImage, decode_pixels
from vmamba.errors import UserError
from vmamba.runtime.feed import Feed
from vmamba_kernels.private import TorchDispatchMode


def here(files, channels, device):
    """In the place of the GPU's: of a list that holds a file that it cannot decode none is decoded."""
    try:
        return [decode_pixels(file.numpy().tobytes(), channels, "it") for file in files]
    except UnreadableImage as error:
        raise RuntimeError(f"Error while decoding JPEG images: {error}\nmore") from error


@pytest.fixture(autouse=True)
def decoded_here(monkeypatch, request):
    if request.node.get_closest_marker("gpu"):
        return
    monkeypatch.setattr(nvjpeg, "decode_jpegs", here)
    monkeypatch.setattr(nvjpeg, "check_gpu", lambda config: None)
    monkeypatch.setattr(nvjpeg, "_told", set())


def resized(images, crops, interpolation):
    return crop_and_resize(in_one_piece(images), [image.shape for image in images], crops, interpolation)


def photo(width=300, height=200, mode="RGB", kind="JPEG", **options):
    file = io.BytesIO()
    image = Image.fromarray(load_sample_image("china.jpg")).resize((width, height)).convert(mode)
    image.save(file, kind, **{"quality": 90, **options})
    return file.getvalue()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_are_resized_as_pillow_does(interpolation):
    """Smaller and larger, of images of several sizes in their order, and what is cut out of them; a level at most
    apart, where rounding falls otherwise."""
    sizes = [(300, 200), (90, 120), (640, 480), (31, 20)]
    photos = [Image.open(io.BytesIO(photo(*size))) for size in sizes]
    parts = [(10, 20, 150, 250), (5, 0, 61, 87), (3, 5, 470, 333), (2, 1, 9, 17)]
    crops = [Crop(*part, (70, 80), (3, 5), (64, 48)) for part in parts]
    images = [torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in photos]
    ours = resized(images, crops, interpolation)
    for out, image, (top, left, height, width) in zip(ours, photos, parts, strict=True):
        box = image.crop((left, top, left + width, top + height))
        theirs = np.array(box.resize((80, 70), Image.Resampling[interpolation.upper()]))[3:67, 5:53]
        difference = (out.int() - torch.from_numpy(theirs).permute(2, 0, 1).int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.02


def test_a_gpu_is_asked_for_no_more_when_there_are_more_crops():
    counts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            counts[-1] += 1
            return function(*arguments, **(options or {}))

    for number in (2, 50):
        pixels, shapes = in_one_piece([torch.zeros(3, 20, 30, dtype=torch.uint8)] * number), [(3, 20, 30)] * number
        counts.append(0)
        with Count():
            crop_and_resize(pixels, shapes, [Crop(1, 2, 15, 20, (8, 8), (0, 0), (8, 8))] * number, "bicubic")
    assert counts[0] == counts[1] < 160


def test_crops_that_would_take_much_memory_together_are_resized_in_turns(monkeypatch):
    images = [torch.full((3, size, 2 * size), size, dtype=torch.uint8) for size in (40, 10, 90, 20, 80)]
    crops = [Crop(0, 0, *image.shape[1:], (8, 8), (0, 0), (8, 8)) for image in images]
    monkeypatch.setattr(nvjpeg, "_MOST_VALUES", 3 * 2 * 40 * 80)
    assert nvjpeg._alike(crops, 3) == [[1, 3], [0], [4], [2]]
    assert resized(images, crops, "bicubic")[:, 0, 0, 0].tolist() == [40, 10, 90, 20, 80]


@pytest.mark.parametrize("opts", [
    "",
    "DATA.IMG_SIZE [64,96] DATA.INTERPOLATION bilinear AUG.AUTO_AUGMENT original-mstd0.5",
    "TEST.CROP false",
    "TEST.CROP_PCT 0.7",
])  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_an_image_is_what_it_is_by_torchvision(opts, training, caplog):
    """Of a batch some of whose images the loading process decodes."""
    files = [photo(), photo(90, 120), photo(kind="PNG"), photo(333, 500), photo(mode="L"), photo(300, 200)]
    made = {}
    for way, decoder in (("torchvision", decode_pixels), ("nvjpeg", decode_later)):
        config = get_config(None, ["DATA.IMG_SIZE", "64", *opts.split(), "DATA.DECODE", way])
        transform, samples = build_pixels(config, training), []
        for index, file in enumerate(files):
            with preserved_generators():
                seed_generators(0, IMAGE, 0, index)
                samples.append((transform(decoder(file, 3, f"it {index}")), index))
        batch = collate(samples)
        with caplog.at_level(logging.INFO, "vmamba"):
            made[way], labels = Normalise(config, Decoder(config) if way == "nvjpeg" else None)(batch)
        assert labels.tolist() == [*range(len(files))]
    assert batch["files"].places == [0, 1, 3, 5] and len(batch["images"]) == 2
    assert [record.args for record in caplog.records] == [(2, 6)]
    assert torch.equal(made["nvjpeg"][[2, 4]], made["torchvision"][[2, 4]])
    difference = (made["nvjpeg"] - made["torchvision"]).abs().flatten(1).mean(1) * 0.225 * 255  # about levels
    assert difference.median() < 0.2 and difference.max() < 3


@pytest.mark.parametrize("opts", ["", "TEST.CROP false", "DATA.IMG_SIZE [64,96]", "TEST.CROP_PCT 0.91"])
def test_crops_are_as_large_and_lie_where_timms_do(opts):
    config = get_config(None, ["DATA.IMG_SIZE", "63", *opts.split(), "DATA.DECODE", "nvjpeg"])
    *cut, resize, middle = build_pixels(config, training=False).crop.steps
    for height, width in [(64, 64), (63, 500), (500, 63), (333, 500), (501, 375), (97, 101), (20, 640)]:
        crop = nvjpeg.draw_crop([*cut, resize, middle], Encoded(b"", height, width, "it"), 3).crop
        seen = torch.arange(height * width).view(1, height, width).expand(3, -1, -1)
        resized = resize(seen.to("meta", torch.uint8))
        assert crop.scaled == resized.shape[1:]
        rows, columns = torch.meshgrid(*map(torch.arange, crop.scaled), indexing="ij")
        top, left = middle(torch.stack([rows, columns]))[:, 0, 0].tolist()
        assert crop.shift == (top, left) and crop.size == middle.size


def test_an_image_that_is_very_long_or_tiny_is_what_it_is_by_torchvision():
    config = get_config(None, ["DATA.IMG_SIZE", "64", "DATA.DECODE", "nvjpeg"])
    for size in ((4000, 50), (50, 4001)):
        file, made = photo(*size), []
        for decoder in (decode_pixels, decode_later):
            batch = collate([(build_pixels(config, training=False)(decoder(file, 3, "it")), 0)])
            made.append(batch["images"] if decoder is decode_pixels else Decoder(config)(batch))
        assert (made[0].int() - made[1].int()).abs().max() <= 1
    with preserved_generators():
        for index in range(40):
            seed_generators(0, IMAGE, 0, index)
            values = build_pixels(config, training=True)(decode_later(photo(1, 1), 3, "it")).values
            if isinstance(values, torch.Tensor):
                break
    assert values.shape == (3, 64, 64) and not values.any()


@pytest.mark.parametrize("file", [
    photo(kind="PNG"),
    photo(mode="L"),
    photo(mode="CMYK"),
    photo(progressive=True),
    photo()[:-2] + b"\0\0" * 40,  # its end is not where it should be
    photo(kind="WEBP"),
])  # fmt: skip
def test_what_a_gpu_may_see_otherwise_is_decoded_while_loading(file):
    assert torch.equal(decode_later(file, 3, "it"), decode_pixels(file, 3, "it"))
    assert decode_later(photo(), 3, "it") == Encoded(photo(), 200, 300, "it")
    assert isinstance(decode_later(photo(mode="L"), 1, "it"), Encoded)


@pytest.mark.parametrize("file", [photo()[:3000], b"", b"no image", photo()[:100]])
def test_a_broken_file_is_said_by_the_loading_process(file):
    with pytest.raises(UnreadableImage, match="cannot read 'it': "):
        decode_later(file, 3, "it")


def test_an_image_of_very_many_pixels_is_decoded_while_loading(monkeypatch):
    monkeypatch.setattr(nvjpeg, "_MOST_PIXELS", 300 * 200 - 1)
    assert isinstance(decode_later(photo(), 3, "it"), torch.Tensor)


def batch_of(files, size=32):
    config = get_config(None, ["DATA.IMG_SIZE", "64", "DATA.DECODE", "nvjpeg"])
    transform = build_pixels(config, training=False)
    return Decoder(config), collate([(transform(file), 0) for file in files])


def test_what_the_gpu_does_not_decode_is_told_once_and_decoded_here(monkeypatch, caplog):
    files = [replace(decode_later(photo(), 3, f"{name}.jpg")) for name in "abcd"]
    decoder, batch = batch_of(files)
    expected = decoder(batch)
    calls = []

    def picky(files, channels, device):
        calls.append(len(files))
        if len(files) > 1 or len(calls) in (3, 4):
            raise RuntimeError("Error while decoding JPEG images: 5\nwhere")
        return here(files, channels, device)

    monkeypatch.setattr(nvjpeg, "decode_jpegs", picky)
    with caplog.at_level(logging.WARNING, "vmamba"):
        assert torch.equal(decoder(batch), expected)
    assert calls == [4, 1, 1, 1, 1]
    (record,) = caplog.records
    assert "nvJPEG does not decode 'b.jpg' (Error while decoding JPEG images: 5); the training" in record.getMessage()


def test_an_image_of_another_size_than_its_header_says_is_not_taken(monkeypatch, caplog):
    decoder, batch = batch_of([decode_later(photo(), 3, name) for name in "ab"])
    expected = decoder(batch)
    monkeypatch.setattr(nvjpeg, "decode_jpegs", lambda *args: [image[:, 1:] for image in here(*args)])
    assert torch.equal(decoder(batch), expected)
    assert r"the size (3, 199, 300), not (3, 200, 300)" in caplog.text


def test_what_nobody_decodes_is_a_sentence():
    broken = Encoded(photo()[:3000], 200, 300, "b.jpg")
    decoder, batch = batch_of([decode_later(photo(), 3, "a.jpg"), broken])
    with pytest.raises(UserError, match="cannot read 'b.jpg': image file is truncated.*; mend or remove it"):
        decoder(batch)


@pytest.fixture
def of_folders(tmp_path):
    """A config of images, of which some are no JPEGs, by a way of decoding and a number of loading processes."""
    for split in ("train", "val"):
        for label in range(2):
            (tmp_path / split / f"{label}").mkdir(parents=True)
            for index in range(4):
                file = photo(200 + 10 * index, 150, kind="PNG" if index == 3 else "JPEG")
                (tmp_path / split / f"{label}" / f"{index}.jpg").write_bytes(file)

    def config(way, workers):
        opts = ["DATA.DATA_PATH", str(tmp_path), "MODEL.NUM_CLASSES", "2", "DATA.BATCH_SIZE", "4", "AUG.REPROB", "0.5"]
        return get_config(None, [*opts, "DATA.DECODE", way, "DATA.IMG_SIZE", "64", "DATA.NUM_WORKERS", str(workers)])

    return config


def loaders(config):
    train, evaluate = (build(config, rank=0, world_size=1) for build in (build_train_loader, build_eval_loader))
    train.set_epoch(1)
    return train, evaluate


def test_loaders_give_the_same_images_as_by_torchvision(of_folders):
    """In loading processes too, with patches; training and evaluation."""
    batches = []
    for way, workers in (("torchvision", 0), ("nvjpeg", 2)):
        both = loaders(of_folders(way, workers))
        batches.append([loader.finish(batch) for loader in both for batch in loader])
        assert all(loader.ahead is (way == "nvjpeg") for loader in both)
    assert len(batches[0]) == 4
    for (ours, labels), (theirs, expected) in zip(*batches, strict=True):
        assert torch.equal(labels, expected)
        assert (ours - theirs).abs().flatten(1).mean(1).median() < 0.05


@pytest.mark.gpu
def test_the_gpus_own_decoder_gives_nearly_the_same_images(of_folders):
    """By the thread that is ahead of a step: chroma is made larger by nvJPEG and libjpeg in two ways."""
    device, batches = torch.device("cuda", 0), []
    for way, workers in (("torchvision", 0), ("nvjpeg", 2)):
        feeds = [Feed(loader, device, loader.finish, loader.ahead) for loader in loaders(of_folders(way, workers))]
        batches.append([batch for feed in feeds for batch in feed])
    assert len(batches[1]) == 4
    for (ours, labels), (theirs, expected) in zip(*batches, strict=True):
        assert torch.equal(labels, expected)
        difference = (ours - theirs).abs().flatten(1).mean(1) * 0.225 * 255  # about levels
        assert difference.median() < 4 and difference.max() < 12


@pytest.mark.parametrize("opts, sentence", [
    ("AUG.AUTO_AUGMENT augmix-m3", "DATA.DECODE nvjpeg does not do AugMixAugment; choose DATA.DECODE pillow"),
    ("DATA.INTERPOLATION nearest", "DATA.INTERPOLATION is nearest, which DATA.DECODE nvjpeg does not do; choose one"),
    ("DATA.IMG_SIZE 32", "DATA.DECODE nvjpeg does not do RandomCrop, as small images are augmented by; choose DATA.DE"),
])  # fmt: skip
def test_what_it_does_not_do_is_a_sentence(opts, sentence):
    config = get_config(None, [*opts.split(), "DATA.DECODE", "nvjpeg"])
    with pytest.raises(UserError, match=sentence):
        build_pixels(config, training=True)


def test_without_a_gpu_or_its_decoder_it_is_a_sentence(monkeypatch):
    config = get_config(None, ["DATA.DECODE", "nvjpeg", "DEVICE", "cpu"])
    with pytest.raises(UserError, match="DATA.DECODE nvjpeg decodes on an NVIDIA GPU, and DEVICE is cpu; choose"):
        check_gpu(config)

    def without(*_):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nvjpeg, "decode_jpegs", without)
    config = get_config(None, ["DATA.DECODE", "nvjpeg"])
    with pytest.raises(UserError, match="decodes no JPEG on this GPU .*not compiled with nvJPEG support.; choose"):
        check_gpu(config)
