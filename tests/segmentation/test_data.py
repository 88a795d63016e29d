"""What is read and drawn: pairs of images and maps, crops, and what each mistake in a data set says."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.config import get_config
from vmamba.data import scenes
from vmamba.data.images import UnreadableImage
from vmamba.errors import UserError
from vmamba.runtime.trainer import run
from vmamba.segmentation.data import build_eval_loader, build_train_loader
from vmamba.segmentation.datasets import Sample, open_dataset
from vmamba.segmentation.models import create_segmenter
from vmamba.segmentation.transforms import EvalTransform, TrainTransform

from .tiny import CLASSES, HELD_OUT, TRAINING, log, tiny_config, write

PICTURE = np.full((24, 32, 3), 200, np.uint8)
MAP = np.ones((24, 32), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def batches(config, epoch=0, first=0):
    loader = build_train_loader(config, rank=0, world_size=1)
    loader.set_epoch(epoch, first)
    return list(loader)


def test_what_is_drawn_is_a_function_of_seed_epoch_and_index(folder):
    reference = batches(tiny_config(folder), epoch=1)
    with_workers = batches(tiny_config(folder, "DATA.NUM_WORKERS", 2), epoch=1)
    resumed = batches(tiny_config(folder), epoch=1, first=2)
    assert len(reference) == 3 and len(resumed) == 1
    for ours, theirs in zip([*reference, reference[2]], [*with_workers, *resumed], strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    for other in (batches(tiny_config(folder), epoch=2), batches(tiny_config(folder, "SEED", 4), epoch=1)):
        assert not torch.equal(reference[0][0], other[0][0])


def test_image_and_map_are_moved_together(folder):
    """A pixel's class can still be told from its colour, and padding does not count."""
    config = tiny_config(folder, "AUG.PHOTOMETRIC", False, "DATA.MEAN", 0.0, "DATA.STD", 1.0)
    random = np.random.default_rng(0)
    classes = random.integers(CLASSES, size=(5, 7), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray((classes * 50)[..., None].repeat(3, 2))
    transform = TrainTransform(config)
    seen = set()
    for _ in range(20):
        made, labels = transform(Sample(image, classes, ""))
        assert made.shape == (3, 32, 32) and labels.dtype == torch.int64 and labels.shape == (32, 32)
        padded = labels == 255
        assert (made[:, padded] == 0).all()
        right = (made[0] * 255 - labels * 50).abs() < 3
        assert right[~padded].float().mean() > 0.6  # the others are interpolated between two blocks
        seen.add((padded.any().item(), tuple(labels[0, :8].tolist())))
    assert len(seen) > 10 and {padded for padded, _ in seen} == {True, False}


@pytest.mark.parametrize(("share", "expected"), [(0.75, 2), (1.0, 1)])
def test_a_crop_of_almost_one_class_is_drawn_again(folder, share, expected, monkeypatch):
    """The first place drawn shows one class and the second two."""
    config = tiny_config(
        folder, "AUG.MOST_OF_ONE_CLASS", share, "AUG.RESIZE_RATIO", [1.0, 1.0], "AUG.HFLIP", 0, "AUG.PHOTOMETRIC", False
    )
    classes = np.zeros((32, 64), np.uint8)
    classes[:, 40:] = 1
    places = iter([0, 0, 0, 24])  # top, left; top, left
    monkeypatch.setattr("random.randint", lambda low, high: next(places))
    _, labels = TrainTransform(config)(Sample(Image.fromarray(classes).convert("RGB"), classes, ""))
    assert len(labels.unique()) == expected


def test_held_out_images_are_fitted_into_each_scale_and_keep_their_map(folder):
    config = tiny_config(folder, "DATA.SCALE", [32, 64], "TEST.SCALES", [0.5, 1.0])
    classes = np.zeros((40, 100), np.uint8)
    images, labels, name = EvalTransform(config)(Sample(Image.fromarray(PICTURE).resize((100, 40)), classes, "a/b"))
    assert [tuple(image.shape) for image in images] == [(3, 13, 32), (3, 26, 64)]  # 0.32 and 0.64 of it
    assert labels.shape == (40, 100) and name == "a/b"


def test_every_held_out_image_comes_once(folder):
    names = [name for rank in range(2) for batch in build_eval_loader(tiny_config(folder), rank=rank, world_size=2)
             for _, _, name in batch]  # fmt: skip
    assert sorted(names) == sorted(f"{number % 2}/{number // 2:02}" for number in range(HELD_OUT))
    assert list(build_eval_loader(tiny_config(folder), rank=7, world_size=8)) == []  # fewer images than processes
    with pytest.raises(UserError, match=f"{TRAINING} training images do not fill one batch of 32"):
        build_train_loader(tiny_config(folder), rank=0, world_size=8)


def test_ade20k_counts_from_one_and_ignores_zero(tmp_path):
    for split in ("training", "validation"):
        write(
            tmp_path, split, "a", PICTURE, np.arange(24 * 32, dtype=np.int64).reshape(24, 32).clip(0, 150).astype("u1")
        )
    config = get_config(None, ["TASK", "segmentation", "DATA.DATA_PATH", str(tmp_path)])
    classes = open_dataset(config, training=True).load(0).classes
    assert classes.flatten()[:152].tolist() == [255, *range(150), 149]


def test_zero_is_ignored_where_the_config_says_so(tmp_path):
    write(tmp_path, "validation", "a", PICTURE, np.array(MAP * 3, copy=True))
    config = folders(tmp_path, "DATA.ZERO_IS_IGNORED", True, "DATA.IGNORE_INDEX", 9)
    assert (open_dataset(config, training=False).load(0).classes == 2).all()
    write(tmp_path, "validation", "a", PICTURE, MAP * 0)
    assert (open_dataset(config, training=False).load(0).classes == 9).all()


def test_scenes_are_the_background_and_ten_digits():
    config = get_config("configs/scenes_segmentation.yaml")
    dataset = open_dataset(config, training=True)
    hidden = 0
    for index in range(60):
        sample, data = dataset.load(index), config.DATA
        made = scenes.scene(index, True, 64, data.DIGITS, data.DIGIT_SIZES, data.CONTRAST)
        assert np.array_equal(np.array(sample.image), np.array(made.image)) and sample.name == f"scene{index}"
        for mask, label in zip(made.masks, made.labels, strict=True):
            assert (sample.classes[mask] == label + 1).all()
        hidden += (sample.classes[~made.masks.any(0)] != 0).any()
    assert hidden  # the ink of a digit that is too hidden to be an object has its class all the same
    with pytest.raises(UserError, match="scenes have 11 classes, and MODEL.NUM_CLASSES is 5"):
        open_dataset(get_config("configs/scenes_segmentation.yaml", ["MODEL.NUM_CLASSES", "5"]), training=True)


@pytest.mark.parametrize("gray", [0.2, 0.8])
def test_with_contrast_ink_is_dark_where_it_is_light(monkeypatch, gray):
    monkeypatch.setattr(scenes, "_background", lambda draw, training, side: np.full((side, side, 3), gray, np.float32))

    def ink(contrast):
        made = [scenes.scene(index, True, 64, 1, [0.4, 0.6], contrast) for index in range(20)]
        return {bool(np.array(each.image)[each.masks[0]].mean() > gray * 255) for each in made}

    assert ink(contrast=True) == {gray < 0.5} and ink(contrast=False) == {True, False}


def test_digits_have_six_pixels_at_least():
    assert scenes.scene(0, True, 32, 1, [0.01, 0.02]).masks.any()


def folders(path, *opts):
    """A config of the folders below `path`."""
    fixed = ("TASK", "segmentation", "DATA.DATASET", "folders", "DATA.DATA_PATH", path, "MODEL.NUM_CLASSES", CLASSES)
    return get_config(None, [*map(str, (*fixed, *opts))])


def refusal(path, *opts):
    with pytest.raises(UserError) as error:
        open_dataset(folders(path, *opts), training=False).load(0)
    return str(error.value)


def test_maps_of_any_kind_of_indices(tmp_path):
    """8 and 16 bits, palettes, black and white."""
    config = folders(tmp_path)
    write(tmp_path, "validation", "a", PICTURE)
    place = tmp_path / "annotations/validation"
    place.mkdir(parents=True)
    palette = Image.fromarray(MAP * 4).convert("P")
    palette.putdata(list((MAP * 4).flatten()))
    kinds = [("a.png", Image.fromarray(MAP * 4), 4), ("a.png", Image.fromarray(MAP.astype(np.uint16) * 4), 4),
             ("a.tif", Image.fromarray(MAP.astype(np.int32) * 4), 4), ("a.png", palette, 4),
             ("a.png", Image.fromarray(MAP > 0), 1)]  # fmt: skip
    for name, image, expected in kinds:
        image.save(place / name)
        assert (open_dataset(config, training=False).load(0).classes == expected).all(), image.mode
        (place / name).unlink()


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (
            np.dstack([MAP] * 3),
            r"the map '.*a\.png' is a picture of mode RGB; expected one number a pixel, .*mode L or P",
        ),
        (np.dstack([MAP] * 4), "is a picture of mode RGBA; expected one number a pixel"),
        (np.dstack([MAP] * 2), "is a picture of mode LA; expected one number a pixel"),
        (MAP[:20], r"the map '.*a\.png' is 32 x 20 pixels and its image 32 x 24; make it again"),
        (MAP * 5, r"the map '.*a\.png' holds label 5; MODEL.NUM_CLASSES is 5, and 255 ignored"),
        (MAP * 254, "holds label 254; MODEL.NUM_CLASSES is 5"),
        (MAP.astype(np.uint16) * 256, "holds label 256; MODEL.NUM_CLASSES is 5"),  # which is 0 in a byte
        (MAP.astype(np.uint16) * 65535, "holds label 65535"),
    ],
)
def test_what_a_wrong_map_says(tmp_path, classes, sentence):
    write(tmp_path, "validation", "a", PICTURE, classes)
    assert re.search(sentence, refusal(tmp_path))


def test_a_map_that_is_a_program_is_not_started(tmp_path):
    """An EPS, which Pillow would hand to Ghostscript."""
    write(tmp_path, "validation", "a", PICTURE, MAP)
    (tmp_path / "annotations/validation/a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(UnreadableImage, match="a.png': it is not an image of a format that Pillow knows"):
        open_dataset(folders(tmp_path), training=False).load(0)


def test_a_label_that_counts_from_one_is_named_as_it_stands_in_the_file(tmp_path):
    write(tmp_path, "validation", "a", PICTURE, MAP * 6)
    assert "holds label 6; MODEL.NUM_CLASSES is 5, labels counting from 1" in refusal(
        tmp_path, "DATA.ZERO_IS_IGNORED", True
    )


def test_what_a_wrong_folder_says(tmp_path):
    assert "has no folder images/validation: it holds nothing" in refusal(tmp_path)
    (tmp_path / "images/validation").mkdir(parents=True)
    assert "has no folder annotations/validation: it holds images" in refusal(tmp_path)
    (tmp_path / "annotations/validation").mkdir(parents=True)
    assert "images/validation' has no image: it holds nothing" in refusal(tmp_path)
    write(tmp_path, "validation", "a", PICTURE)
    assert "annotations/validation' has no image: it holds nothing" in refusal(tmp_path)
    write(tmp_path, "validation", "b", None, MAP)
    assert re.search(
        "annotations/validation' has no map of a, images in .*; a map has its image's name", refusal(tmp_path)
    )
    (tmp_path / "images/validation/b.jpg").touch()
    (tmp_path / "images/validation/b.webp").touch()
    assert re.search(r"'.*b\.jpg' and '.*b\.webp' differ in their suffixes alone", refusal(tmp_path))
    assert "data path 'nowhere' does not exist" in refusal("nowhere")
    assert re.search("folders' is read from a folder; name it with --data-path", refusal(""))


def test_what_is_left_out_is_told(tmp_path, caplog):
    write(tmp_path, "validation", "a", PICTURE, MAP)
    write(tmp_path, "validation", "b", None, MAP)
    (tmp_path / "images/validation/c.heic").touch()
    assert len(open_dataset(folders(tmp_path), training=False)) == 1
    assert re.search(
        r"left out of '.*images/validation' and '.*': 1 \.heic \('.*\), 1 map without an image \('.*b\.png'",
        caplog.text,
    )
    caplog.clear()
    open_dataset(folders(tmp_path), training=False, tell=False)
    assert not caplog.text


def test_more_classes_than_a_byte_holds_are_refused():
    with pytest.raises(UserError, match="MODEL.NUM_CLASSES is 300; it must be between 1 and 254"):
        folders("nowhere", "MODEL.NUM_CLASSES", 300)


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_an_unreadable_file_ends_the_run_or_is_left_out(tmp_path, kind):
    config = tiny_config(tmp_path)
    file = tmp_path / "images" / kind / "validation/0/02.png"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(UserError, match=rf"cannot read '.*{kind}/validation/0/02\.png'.*or set DATA.SKIP_BAD_IMAGES"):
        run(config)
    config = tiny_config(tmp_path, "DATA.SKIP_BAD_IMAGES", True, "TRAIN.EPOCHS", 1, "TAG", "skipped")
    run(config)
    assert "1 unreadable image skipped in this pass" in log(config)


def test_images_of_one_row_or_column_and_objects_of_one_pixel(tmp_path):
    """A crop pads them in training; evaluation has them as they are."""
    for split in ("training", "validation"):
        write(tmp_path, split, "row", PICTURE[:1].repeat(125, 1), MAP[:1].repeat(125, 1))  # 1 x 4000
        write(tmp_path, split, "column", PICTURE[:, :1], MAP[:, :1])
        write(tmp_path, split, "dot", PICTURE[:23, :31], np.pad(MAP[:1, :1], ((9, 13), (9, 21))))
        write(tmp_path, split, "plain", PICTURE, MAP)
    results = run(tiny_config(tmp_path, "DATA.DATA_PATH", tmp_path, "DATA.SCALE", [32, 2000], "TEST.SCALES", [0.2, 1]))
    assert results.keys() == {"mIoU", "mAcc", "aAcc"}


@pytest.mark.parametrize("name", ["vmamba_tiny", "vmamba_nano", "timm/swin_tiny_patch4_window7_224", "timm/resnet18"])
def test_segmenters_take_images_of_any_size(name):
    small = {"depths": (1, 1, 1, 1), "dims": 8} if name.startswith("vmamba") else {}
    model = create_segmenter("upernet", name, CLASSES, backbone_options=small, channels=8, aux_channels=4).eval()
    with torch.no_grad():
        for size in ((1, 130), (61, 1), (37, 51)):
            assert model(torch.randn(1, 3, *size)).shape == (1, CLASSES, *size)


def test_distortion_is_mmsegmentations(monkeypatch):
    """Each change by itself against its formula; none makes red blue, and black becomes gray by brightness."""
    import colorsys

    from vmamba.segmentation import transforms

    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 9, 8), dtype=torch.uint8)
    for factor in (0.5, 0.8, 1.5):
        out = transforms._saturated(image, factor)
        for pixel, changed in zip(image.flatten(1).T.tolist(), out.flatten(1).T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(each / 255 for each in pixel))
            wanted = colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value)
            assert max(abs(one - 255 * other) for one, other in zip(changed, wanted, strict=True)) <= 1
    draws = iter([0.9, 0.1, 0.9, 0.9, 0.1])  # brightness, then contrast at the end
    monkeypatch.setattr(transforms.random, "random", lambda: next(draws))
    monkeypatch.setattr(transforms.random, "uniform", lambda low, high: {-32: -20.0, 0.5: 1.5}[low])
    expected = ((image.float() - 20).clamp(0, 255).floor() * 1.5).clamp(0, 255).floor()
    assert torch.equal(transforms.photometric_distortion(image).float(), expected)
    monkeypatch.undo()
    red, black = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8)
    red[0] = 200
    assert all(int(transforms.photometric_distortion(red)[:, 0, 0].argmax()) == 0 for _ in range(200))
    assert 0 < max(int(transforms.photometric_distortion(black).max()) for _ in range(200)) <= 48
