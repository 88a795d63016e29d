"""Batches: the same images whatever the workers, processes and stops; timm's transforms; errors as sentences."""

import random
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from torchvision import transforms

from vmamba.classification.data import build_eval_loader, build_train_loader
from vmamba.classification.transforms import (
    Normalise,
    Pixels,
    RandomCrop,
    build_mixup,
    build_pixels,
    build_transform,
    collate,
)
from vmamba.config import get_config
from vmamba.data.draws import preserved_generators, seed_generators
from vmamba.errors import UserError

DIGITS = {"DATASET": "digits", "IMG_SIZE": 16, "NUM_WORKERS": 0, "BATCH_SIZE": 64}


@contextmanager
def seeded(*key: int):
    with preserved_generators():
        seed_generators(*key)
        yield


def config_of(*opts):
    digits = [word for name, value in DIGITS.items() for word in (f"DATA.{name}", value)]
    return get_config(None, [*digits, "MODEL.NUM_CLASSES", 10, *opts])


def batches(*opts, epoch=1, start=0, rank=0, world_size=1):
    loader = build_train_loader(config_of(*opts), rank=rank, world_size=world_size)
    loader.set_epoch(epoch, start)
    return finished(loader)


def finished(loader):
    """Its batches as (images, labels)."""
    return list(map(loader.finish, loader))


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


@pytest.fixture
def folders(tmp_path) -> Path:
    """Twelve training and seven validation images of two classes; training image s has the colour s."""
    for split, counts in (("train", (6, 6)), ("val", (3, 4))):
        for label, count in enumerate(counts):
            (tmp_path / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (10 * (6 * label + i),) * 3).save(
                    tmp_path / split / f"class{label}" / f"{i}.png"
                )
    return tmp_path


def of_folders(root: Path, *opts):
    opts = (
        "DATA.DATASET",
        "imagenet",
        "DATA.DATA_PATH",
        str(root),
        "MODEL.NUM_CLASSES",
        2,
        "DATA.BATCH_SIZE",
        4,
        *opts,
    )
    return config_of(*opts)


PLAIN = ["AUG.AUTO_AUGMENT", None, "AUG.COLOR_JITTER", 0, "AUG.REPROB", 0, "AUG.HFLIP", 0]


# ------------------------------------------------------------------------------------------------ determinism


def test_batches_do_not_depend_on_the_workers():
    alone = batches()
    assert len(alone) == 1437 // 64
    images, labels = alone[0]
    assert images.shape == (64, 3, 16, 16) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert same(alone, batches("DATA.NUM_WORKERS", 2))
    assert not same(alone, batches(epoch=2)) and not same(alone, batches("SEED", 1))


def test_resuming_in_the_middle_gives_the_rest_of_the_epoch():
    whole = batches("TRAIN.ACCUMULATION_STEPS", 2)
    assert same(whole[2 * 4 :], batches("TRAIN.ACCUMULATION_STEPS", 2, start=4))
    loader = build_train_loader(config_of("DATA.NUM_WORKERS", 1, "DATA.BATCH_SIZE", 256), rank=0, world_size=1)
    loader.set_epoch(0)
    first = loader.finish(next(iter(loader)))  # left with batches under way
    loader.set_epoch(3, 2)
    assert same(finished(loader), batches("DATA.BATCH_SIZE", 256, epoch=3, start=2))
    loader.set_epoch(0)
    assert same([first], [loader.finish(next(iter(loader)))])


def test_processes_and_accumulation_share_out_the_same_global_batches():
    alone = batches("DATA.BATCH_SIZE", 96)
    ranks = [batches("DATA.BATCH_SIZE", 24, "TRAIN.ACCUMULATION_STEPS", 2, rank=r, world_size=2) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 2 * len(alone)
    for step, whole in enumerate(alone):
        parts = [ranks[r][2 * step + micro] for micro in (0, 1) for r in (0, 1)]
        assert same([whole], [[torch.cat(tensors) for tensors in zip(*parts, strict=True)]])


def test_an_epoch_shows_each_image_once_at_most():
    loader = build_train_loader(config_of(*PLAIN, "DATA.BATCH_SIZE", 479), rank=0, world_size=1)
    assert loader.steps_per_epoch == 3 == len(loader)
    keys = [key for batch in loader._batches for key in batch]
    assert sorted(index for _, index in keys) == list(range(1437))


def test_loading_leaves_the_generators_alone():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    batches("DATA.BATCH_SIZE", 700)
    list(build_eval_loader(config_of("DATA.BATCH_SIZE", 300), rank=0, world_size=1))
    assert states() == before


def test_the_generators_are_put_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(1, 2):
        torch.rand(1)
        raise KeyError
    assert torch.equal(before, torch.get_rng_state())


def test_evaluation_takes_each_image_once_over_all_processes(folders):
    config = of_folders(folders, "DATA.BATCH_SIZE", 2)
    whole = [images for images, _ in finished(build_eval_loader(config, rank=0, world_size=1))]
    assert sum(map(len, whole)) == 7
    for world_size in (2, 3, 8):  # 8: one process has none
        shares = [
            images
            for rank in range(world_size)
            for images, _ in finished(build_eval_loader(config, rank=rank, world_size=world_size))
        ]
        assert sorted(torch.cat(shares).flatten(1).sum(1).tolist()) == sorted(
            torch.cat(whole).flatten(1).sum(1).tolist()
        )


# ------------------------------------------------------------------------------------------------ mixing


def test_mixup_is_timms_and_depends_on_step_and_part_only():
    config = config_of("MODEL.LABEL_SMOOTHING", 0.1)
    mix = build_mixup(config)
    images, labels = torch.rand(8, 3, 6, 6), torch.arange(8)
    before = np.random.get_state()[1].tolist()
    results = {step: mix(images.clone(), labels, step=step, part=0) for step in range(6)}
    assert np.random.get_state()[1].tolist() == before
    again = build_mixup(config)
    for step in (3, 0):  # in any order
        assert same([results[step]], [again(images.clone(), labels, step=step, part=0)])
    assert len({targets[0].tolist()[0] for _, targets in results.values()}) > 3
    parts = [mix(images.clone(), labels, step=0, part=part)[1] for part in range(6)]
    assert len({targets[0].tolist()[0] for targets in parts}) > 3  # each micro-batch of each process draws its own
    peer = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
    with seeded(config.SEED, 2, 5):
        assert same([results[5]], [peer(images.clone(), labels)])


def test_mixup_off_and_mistaken():
    assert build_mixup(config_of("AUG.MIXUP", 0, "AUG.CUTMIX", 0)) is None
    with pytest.raises(UserError, match="DATA.BATCH_SIZE is 5; make it even"):
        build_mixup(config_of("DATA.BATCH_SIZE", 5))
    with pytest.raises(UserError, match=r"AUG.CUTMIX_MINMAX is \[0.8, 0.2\]"):
        build_mixup(config_of("AUG.CUTMIX_MINMAX", "[0.8, 0.2]"))


# ------------------------------------------------------------------------------------------------ transforms


def photo(size=(300, 200), mode="RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size).convert(mode)


def test_the_training_transform_is_timms():
    ours = build_transform(get_config("configs/vmamba_tiny_s1l8.yaml"), training=True)
    theirs = create_transform(
        224,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
    )
    for key in range(12):
        with seeded(key):
            expected = theirs(photo())
        with seeded(key):
            assert torch.equal(ours(photo()), expected)


@pytest.mark.parametrize("mode, count", [("pixel", 1), ("rand", 3), ("const", 2)])
def test_a_batch_of_bytes_becomes_timms_images_bit_for_bit(mode, count):
    """Normalised by batches and erased then, which timm does image by image."""
    opts = ["AUG.REPROB", 0.8, "AUG.REMODE", mode, "AUG.RECOUNT", count, "DATA.IMG_SIZE", 48, "MODEL.IN_CHANS", 3]
    config = get_config(None, [*opts, "DATA.INTERPOLATION", "bilinear"])
    to_pixels, normalise = build_pixels(config, training=True), Normalise(config)
    theirs = create_transform(
        48,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bilinear",
        re_prob=0.8,
        re_mode=mode,
        re_count=count,
    )
    samples, expected = [], []
    for key in range(16):
        with seeded(key):
            samples.append((to_pixels(photo()), key))
        with seeded(key):
            expected.append(theirs(photo()))
    batch = collate(samples)
    assert batch["images"].dtype == torch.uint8 and len(batch["places"]) > 8
    images, labels = normalise(batch)
    assert images.is_contiguous() and torch.equal(images, torch.stack(expected)) and labels.tolist() == [*range(16)]


def test_every_value_of_8_bits_is_normalised_as_torchvision_does():
    config = get_config(None, [])
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    image = Image.fromarray(values.permute(1, 2, 0).numpy())
    theirs = transforms.Normalize(config.DATA.MEAN, config.DATA.STD)(transforms.ToTensor()(image))
    assert torch.equal(Normalise(config)(collate([(Pixels(values), 0)]))[0][0], theirs)


@pytest.mark.parametrize(
    "opts, peer",
    [
        ("DATA.IMG_SIZE 64", {"input_size": 64}),
        ("DATA.IMG_SIZE [48,80]", {"input_size": (3, 48, 80)}),
        ("DATA.IMG_SIZE 64 TEST.CROP false", {"input_size": 64, "crop_pct": 1.0, "crop_mode": "squash"}),
        ("DATA.IMG_SIZE 32", {"input_size": 32, "crop_pct": 1.0}),
        ("DATA.IMG_SIZE 64 DATA.INTERPOLATION nearest", {"input_size": 64, "interpolation": "nearest"}),
    ],
)
def test_the_evaluation_transform_is_timms(opts, peer):
    ours = build_transform(get_config(None, opts.split()), training=False)(photo())
    theirs = create_transform(**{"interpolation": "bicubic", "crop_pct": 224 / 256, **peer})(photo())
    assert torch.equal(ours, theirs)


def test_small_training_images_are_padded_and_cropped():
    config = config_of(*PLAIN, "DATA.MEAN", "[0]", "DATA.STD", "[1]", "DATA.IMG_SIZE", "[16,32]", "MODEL.IN_CHANS", 1)
    transform = build_transform(config, training=True)
    image = Image.new("L", (8, 8), 255)
    seen = set()
    for key in range(200):
        with seeded(key):
            result = transform(image)  # (1, 16, 32)
        assert result.shape == (1, 16, 32)
        rows, columns = result[0].amax(1), result[0].amax(0)
        seen.add((int((rows == 0).sum()), int((columns == 0).sum())))  # the padding that came into sight
    assert {rows for rows, _ in seen} == {0, 1, 2} and {columns for _, columns in seen} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_crop_of_a_padded_image_is_torchvisions(mode):
    pixels = np.random.default_rng(0).integers(1, 256, (20, 12, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    for size, padding in (((20, 12), (1, 2)), ((7, 9), (0, 3)), ((20, 12), (0, 0)), ((24, 14), (1, 2))):
        ours, theirs = (kind(size, padding=padding) for kind in (RandomCrop, transforms.RandomCrop))
        for key in range(20):
            found = []
            for crop in (ours, theirs):
                with seeded(key):
                    found.append((np.asarray(crop(image)), torch.rand(1)))  # as many draws, too
            assert np.array_equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_horizontal_flips_can_be_turned_off():
    image = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1)))
    for rate, expected in (("0", {True}), ("0.5", {True, False})):
        config = config_of(
            *PLAIN, "AUG.HFLIP", rate, "DATA.IMG_SIZE", 32, "MODEL.IN_CHANS", 1, "DATA.MEAN", [0], "DATA.STD", [1]
        )
        transform = build_transform(config, training=True)
        kept = set()
        for key in range(20):
            with seeded(key):
                middle = transform(image)[0, 16]
            kept.add(bool(middle[20] > middle[12]))
        assert kept == expected


@pytest.mark.parametrize(
    "policy, channels",
    [
        ("rand-m10-n4-inc1-p1.0", 1),
        ("rand-m10-n4-inc1-p1.0", 3),
        ("rand-m9-mstd0.5-inc1-tweights", 3),
        ("v0r", 3),
        ("augmix-m10-w2-d2", 3),
    ],
)
def test_policies_at_full_magnitude_take_every_image(policy, channels):
    opts = ["AUG.AUTO_AUGMENT", policy, "MODEL.IN_CHANS", channels, "DATA.MEAN", "[0.5]", "DATA.STD", "[0.5]"]
    transform = build_transform(get_config(None, ["DATA.IMG_SIZE", 40, *opts]), training=True)
    image = photo((40, 40), "RGB" if channels == 3 else "L")
    for key in range(60):
        with seeded(key):
            assert transform(image).shape == (channels, 40, 40)


@pytest.mark.parametrize(
    "opts, message",
    [
        ("AUG.AUTO_AUGMENT randm9", "AUG.AUTO_AUGMENT 'randm9'"),
        ("AUG.AUTO_AUGMENT rand-m9-mst0.5", "AUG.AUTO_AUGMENT 'rand-m9-mst0.5'"),
        ("AUG.AUTO_AUGMENT rand-m9-inc", "expected a policy with its numbers"),
        (
            "MODEL.IN_CHANS 4 DATA.MEAN 0 AUG.AUTO_AUGMENT rand-m9",
            "AUTO_AUGMENT is rand-m9 and MODEL.IN_CHANS 4; colours are of 1 and 3 channels, so set .*AUTO_AUGMENT null",
        ),
        (
            "MODEL.IN_CHANS 4 DATA.MEAN 0 AUG.AUTO_AUGMENT null AUG.COLOR_JITTER 0.4",
            "AUG.COLOR_JITTER is 0.4 and MODEL.IN_CHANS 4; .*so set AUG.COLOR_JITTER 0",
        ),
        (
            "MODEL.IN_CHANS 4 AUG.AUTO_AUGMENT null AUG.COLOR_JITTER 0 DATA.INTERPOLATION lanczos",
            "DATA.INTERPOLATION is lanczos, and with MODEL.IN_CHANS 4 it can be nearest, bilinear, bicubic",
        ),
        (
            "MODEL.IN_CHANS 4 AUG.AUTO_AUGMENT null AUG.COLOR_JITTER 0 DATA.DECODE torchvision",
            "DATA.DECODE is torchvision, and MODEL.IN_CHANS 4; set DATA.DECODE pillow, which reads .npy",
        ),
        ("MODEL.IN_CHANS 1", r"DATA.MEAN is \[0.485, 0.456, 0.406\]; expected one number"),
    ],
)
def test_what_a_transform_that_cannot_be_built_says(opts, message):
    with pytest.raises(UserError, match=message):
        build_train_loader(config_of(*opts.split()), rank=0, world_size=1)


# ------------------------------------------------------------------------------------------------ bad data


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_the_run_with_its_name(folders, workers):
    bad = folders / "train" / "class1" / "2.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    (folders / "val" / "class0" / "1.png").write_text("text")
    config = of_folders(folders, "DATA.NUM_WORKERS", workers)
    with pytest.raises(UserError) as error:
        list(build_train_loader(config, rank=0, world_size=1))
    assert str(error.value).startswith(f"cannot read '{bad}': ") and "\n" not in str(error.value)
    with pytest.raises(UserError, match="class0/1.png': it is not an image.*set DATA.SKIP_BAD_IMAGES true"):
        list(build_eval_loader(config, rank=0, world_size=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_in_training_and_counted(folders, workers, caplog):
    for i in range(3):
        (folders / "train" / "class1" / f"{i}.png").write_text("text")
    config = of_folders(folders, *PLAIN, "DATA.SKIP_BAD_IMAGES", True, "DATA.NUM_WORKERS", workers)
    loader = build_train_loader(config, rank=0, world_size=1)
    results = [finished(loader), finished(loader)]
    assert same(*results) and [len(labels) for _, labels in results[0]] == [4, 4, 4]
    assert loader.skipped == 3
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 3 and all("skipped an image: cannot read" in message for message in named)


def test_the_place_of_a_readable_image_does_not_change_with_its_neighbours(folders):
    config = of_folders(folders, "DATA.SKIP_BAD_IMAGES", True)
    before = finished(build_train_loader(config, rank=0, world_size=1))
    (folders / "train" / "class0" / "0.png").write_text("text")
    after = finished(build_train_loader(config, rank=0, world_size=1))
    pairs = zip(torch.cat([i for i, _ in before]), torch.cat([i for i, _ in after]), strict=True)
    assert sum(not torch.equal(one, other) for one, other in pairs) == 1


def test_unreadable_images_are_left_out_of_evaluation_and_counted(folders):
    for i in range(3):
        (folders / "val" / "class0" / f"{i}.png").write_text("text")
    loader = build_eval_loader(
        of_folders(folders, "DATA.SKIP_BAD_IMAGES", True, "DATA.BATCH_SIZE", 3), rank=0, world_size=1
    )
    labels = torch.cat([batch["labels"] for batch in loader])
    assert labels.tolist() == [1, 1, 1, 1] and loader.skipped == 3


def test_a_folder_without_readable_images_ends_the_run(folders):
    for path in (folders / "train").rglob("*.png"):
        path.write_text("text")
    loader = build_train_loader(of_folders(folders, "DATA.SKIP_BAD_IMAGES", True), rank=0, world_size=1)
    with pytest.raises(UserError, match="images in a row are unreadable"):
        list(loader)


def test_a_label_out_of_range_is_named(folders):
    loader = build_train_loader(of_folders(folders), rank=0, world_size=1)
    loader._loader.dataset.source.source.samples.targets[7] = 2
    with pytest.raises(UserError, match=r"label 2 of '.*class1/1.png' is out of range; MODEL.NUM_CLASSES is 2"):
        list(loader)


def test_too_few_images_for_one_batch(folders):
    with pytest.raises(UserError, match="12 training images do not fill one batch of 16 = DATA.BATCH_SIZE 4 x 2 proc"):
        build_train_loader(of_folders(folders, "TRAIN.ACCUMULATION_STEPS", 2), rank=0, world_size=2)
