"""Augmentation by batches against timm's, which Pillow does image by image."""

import io

import numpy as np
import pytest
import timm.data.auto_augment as timms
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms.functional import pil_to_tensor

from vmamba.classification import on_device
from vmamba.classification.data import build_eval_loader, build_train_loader
from vmamba.classification.nvjpeg import CutLong
from vmamba.classification.on_device import Augment, Operation, in_passes
from vmamba.classification.transforms import Normalise, build_pixels, collate
from vmamba.config import get_config
from vmamba.data.draws import IMAGE, preserved_generators, seed_generators
from vmamba.data.images import UnreadableImage, decode, decode_pixels
from vmamba.errors import UserError
from vmamba.runtime.feed import to_device

FILL = (124, 116, 104)
VALUES = {
    "AutoContrast": [0], "Equalize": [0], "Invert": [0], "Posterize": [1, 4, 7, 8], "Solarize": [0, 100, 256],
    "SolarizeAdd": [0, 44, 110], "Color": [0.1, 0.7, 1.9], "Contrast": [0.1, 0.55, 1.9], "Brightness": [0.1, 1.9],
    "Sharpness": [0.1, 0.6, 1.9], "Rotate": [-27.3, 12, 0], "ShearX": [-0.3, 0.17], "ShearY": [0.29],
    "TranslateX": [10.5], "TranslateY": [-7.2], "TranslateXRel": [-0.4, 0.13], "TranslateYRel": [0.31],
}  # fmt: skip
WITHOUT_VALUE, WHOLE = ("AutoContrast", "Equalize", "Invert"), ("Posterize", "Solarize", "SolarizeAdd")


def photos(mode="RGB"):
    """Two photographs, and an image that has one value a channel."""
    arrays = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    images = [Image.fromarray(array).resize((64, 48)) for array in arrays]
    return [each.convert(mode) for each in (*images, Image.new("RGB", (64, 48), (7, 7, 200)))]


def pixels(images):
    return torch.stack([torch.from_numpy(np.array(each).reshape(48, 64, -1)).permute(2, 0, 1) for each in images])


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", VALUES)
def test_an_operation_is_pillows(name, mode):
    """To the bit where values change; where pixels move, to one level in few of them."""
    images, moves = photos(mode), name in on_device._MOVES
    fill = FILL if mode == "RGB" else FILL[:1]
    options = dict(fillcolor=FILL if mode == "RGB" else FILL[0])
    for value in VALUES[name]:
        arguments = () if name in WITHOUT_VALUE else (int(value) if name in WHOLE else value,)
        for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[: 2 if moves else 1]:
            theirs = [timms.NAME_TO_OP[name](each, *arguments, resample=resample, **options) for each in images]
            done = in_passes([[Operation(name, value, int(resample))]] * len(images), 48, 64)
            difference = (Augment(fill)(pixels(images), done).int() - pixels(theirs).int()).abs()
            assert difference.max() <= (1 if moves else 0)
            assert (difference > 0).float().mean() < 0.05


def test_every_image_has_its_own_operations_in_their_order():
    images, augment = pixels(photos()), Augment(FILL)
    each = [[Operation("Invert"), Operation("HorizontalFlip")], [], [Operation("Brightness", 0.5), Operation("Invert")]]
    out = augment(images.clone(), in_passes(each, 48, 64))
    assert torch.equal(out[0], (255 - images[0]).flip(2)) and torch.equal(out[1], images[1])
    assert torch.equal(out[2], 255 - (images[2] * 0.5).to(torch.uint8))
    nothing = in_passes([[], [], []], 48, 64)
    assert not nothing["passes"] and torch.equal(augment(images.clone(), nothing), images)


def jpeg(mode="RGB", quality=90):
    file = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).resize((300, 200)).convert(mode).save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_decodes_what_pillow_does(mode, channels):
    theirs = decode(jpeg(mode), channels, "it")
    ours = decode_pixels(jpeg(mode), channels, "it")
    assert torch.equal(ours, torch.from_numpy(np.array(theirs).reshape(200, 300, -1)).permute(2, 0, 1))


def test_broken_files_are_said_as_by_pillow(tmp_path):
    png = tmp_path / "a.png"
    Image.new("RGB", (5, 4), (1, 2, 3)).save(png)
    assert decode_pixels(png, 3, "it")[:, 0, 0].tolist() == [1, 2, 3]
    for broken in (jpeg()[:3000], b"", b"no image", jpeg()[:100]):
        with pytest.raises(UnreadableImage, match="cannot read 'it': "):
            decode_pixels(broken, 3, "it")


@pytest.mark.parametrize("opts", [
    "",
    "AUG.AUTO_AUGMENT null AUG.VFLIP 0.5",
    "AUG.AUTO_AUGMENT original-mstd0.5 DATA.INTERPOLATION bilinear",
    "AUG.AUTO_AUGMENT rand-m15-n3-mmax20",
    "DATA.IMG_SIZE 32",
])  # fmt: skip
def test_an_image_is_what_it_is_by_pillow(opts):
    """Crops, operations and erased patches are drawn alike; resizing rounds differently, by a level at most in most
    images, which an operation behind it may make more of."""
    image, made = jpeg(), {}
    for way, decoder in (("pillow", decode), ("torchvision", decode_pixels)):
        config = get_config(None, ["DATA.IMG_SIZE", 64, *opts.replace("null", "None").split(), "DATA.DECODE", way])
        transform, samples = build_pixels(config, training=True), []
        for index in range(24):
            with preserved_generators():
                seed_generators(0, IMAGE, 0, index)
                samples.append((transform(decoder(image, 3, "it")), 0))
        made[way] = Normalise(config)(collate(samples))[0] * 0.225 * 255  # about levels of 0 to 255
    difference = (made["pillow"] - made["torchvision"]).abs().flatten(1).mean(1)
    assert difference.median() < 0.3 and difference.max() < 5


@pytest.mark.parametrize("opts", ["TEST.CROP true", "TEST.CROP false", "DATA.INTERPOLATION bilinear"])
def test_an_image_to_be_evaluated_is_what_it_is_by_pillow(opts):
    made = []
    for way, decoder in (("pillow", decode), ("torchvision", decode_pixels)):
        config = get_config(None, ["DATA.IMG_SIZE", 96, "DATA.DECODE", way, *opts.split()])
        made.append(build_pixels(config, training=False)(decoder(jpeg(), 3, "it")).values.int())
    difference = (made[0] - made[1]).abs().float()
    assert made[0].shape == (3, 96, 96) and difference.max() <= 2 and difference.mean() < 0.05


@pytest.mark.parametrize("size, parts", [(64, 64), (48, 100), (100, 7)])
def test_the_nearest_pixels_are_pillows(size, parts):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (parts, parts + 9, 3), dtype=np.uint8))
    made = []
    for way, given in (("pillow", image), ("torchvision", pil_to_tensor(image))):
        opts = ["DATA.IMG_SIZE", size, "DATA.DECODE", way, "DATA.INTERPOLATION", "nearest"]
        made.append(build_pixels(get_config(None, opts), training=False)(given).values)
    assert torch.equal(*made)


def draws(image, way, opts="AUG.AUTO_AUGMENT None AUG.COLOR_JITTER 0", images=40):
    transform = build_pixels(get_config(None, ["DATA.IMG_SIZE", 64, "DATA.DECODE", way, *opts.split()]), training=True)
    for index in range(images):
        with preserved_generators():
            seed_generators(0, IMAGE, 0, index)
            yield transform(image).values


def test_a_crop_without_pixels_is_black_as_by_pillow():
    for size in ((1, 1), (1, 3), (2, 1)):
        image = Image.new("RGB", size, (200, 150, 250))
        ways = [draws(each, way) for way, each in (("pillow", image), ("torchvision", pil_to_tensor(image)))]
        made = [torch.stack([*each]) for each in ways]
        assert torch.equal(*made) and not made[0].flatten(1).any(1).all()
    bands = "MODEL.IN_CHANS 5 DATA.MEAN 0.5 DATA.STD 0.25 AUG.AUTO_AUGMENT None AUG.COLOR_JITTER 0 AUG.REPROB 0"
    made = torch.stack([*draws(torch.full((5, 1, 1), 200, dtype=torch.uint8), "pillow", bands)])
    assert {*made.flatten(1).float().mean(1).tolist()} == {0, 200}


@pytest.mark.parametrize("size", [(4000, 50), (50, 4001), (3333, 101)])
@pytest.mark.parametrize("way", ["pillow", "torchvision"])
def test_of_a_very_long_image_the_middle_alone_is_resized(size, way, monkeypatch):
    """It shows what it showed, but for half a pixel where the middles of both do not fall together; others are not cut.
    Smooth, so that half a pixel is a few levels."""
    noise = np.random.default_rng(0).integers(0, 256, (1 + size[1] // 40, 1 + size[0] // 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    image = image if way == "pillow" else pil_to_tensor(image)
    config = get_config(None, ["DATA.IMG_SIZE", 64, "DATA.DECODE", way])
    made = build_pixels(config, training=False)(image).values.int()
    monkeypatch.setattr(CutLong, "__call__", lambda self, image: image)
    whole = build_pixels(config, training=False)(image).values.int()
    assert (made - whole).abs().float().mean() < 3 and (made - whole).abs().max() <= 12
    monkeypatch.undo()
    assert CutLong((64, 64)).middle(50, 1600) == (0, 0, 50, 1600)
    assert CutLong((64, 64)).middle(4, 30000) == (0, 14936, 4, 128)
    assert CutLong((64, 64)).middle(30001, 4) == (14936, 0, 129, 4)
    assert CutLong((64, 128)).middle(4, 30000)[3] == 256


def test_loaders_give_the_same_images_either_way():
    batches = []
    for way in ("pillow", "torchvision"):
        opts = ["DATA.DECODE", way, "AUG.REPROB", 0.5, "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1"]
        config = get_config("configs/vmamba_digits.yaml", opts)
        train, evaluate = (build(config, rank=0, world_size=1) for build in (build_train_loader, build_eval_loader))
        train.set_epoch(3, 0, 1)
        batches.append([loader.finish(batch) for loader in (train, evaluate) for batch in loader][:2])
    for (ours, labels), (theirs, expected) in zip(*batches, strict=True):
        assert torch.equal(labels, expected)
        assert (ours - theirs).abs().flatten(1).mean(1).median() < 0.05


@pytest.mark.parametrize("opts, sentence", [
    ("AUG.AUTO_AUGMENT augmix-m3", "DATA.DECODE torchvision does not do AugMixAugment; choose DATA.DECODE pillow"),
    ("AUG.AUTO_AUGMENT 3a", "DATA.DECODE torchvision does not do Desaturate; choose DATA.DECODE pillow"),
    ("DATA.INTERPOLATION lanczos", "DATA.INTERPOLATION is lanczos, which DATA.DECODE torchvision does not do"),
])  # fmt: skip
def test_what_it_does_not_do_is_a_sentence(opts, sentence):
    config = get_config(None, [*opts.split(), "DATA.DECODE", "torchvision"])
    with pytest.raises(UserError, match=sentence):
        build_pixels(config, training=True)


def drawn(policy="rand-m9-mstd0.5-inc1", images=128):
    """A collated batch of training, and its config."""
    config = get_config(None, ["DATA.IMG_SIZE", 64, "DATA.DECODE", "torchvision", "AUG.AUTO_AUGMENT", policy])
    transform, image = build_pixels(config, training=True), decode_pixels(jpeg(), 3, "it")
    with preserved_generators():
        seed_generators(0)
        return config, collate([(transform(image), 0) for _ in range(images)])


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", None])
def test_passes_are_few_however_many_images_and_operations_there_are(policy):
    """Each is 3 to 65 calls of a GPU, 10 us each; by name and turn it took 4,500 calls a batch."""
    _, batch = drawn(policy)
    todo = batch["operations"]
    assert len(todo["passes"]) <= 9 and len(todo["places"]) > 128
    kinds = [kind for kind, _ in todo["passes"]]
    assert kinds[0] == "HorizontalFlip" and kinds.count("HorizontalFlip") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", None])
def test_a_gpu_does_the_same_without_being_waited_for(policy):
    config, batch = drawn(policy)
    device, ours = torch.device("cuda", 0), Normalise(config)
    expected, _ = Normalise(config)({**batch, "images": batch["images"].clone()})
    sent = [to_device(batch, device) for _ in range(2)]
    ours(sent[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, _ = ours(sent[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    levels = (images.cpu() - expected).abs() * 0.23 * 255
    assert levels.max() < 2 and (levels > 0.5).float().mean() < 1e-4
