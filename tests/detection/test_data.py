"""What is drawn and loaded: image, boxes and masks stay together, draws are functions of seed, epoch and index."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from vmamba.config import get_config
from vmamba.data.draws import seed_generators
from vmamba.data.transforms import fitted
from vmamba.detection.annotations import parse
from vmamba.detection.datasets import Sample, open_dataset
from vmamba.detection.transforms import Collate, Transform
from vmamba.errors import UserError

from .tiny import HELD_OUT, TRAINING, eval_loader, read, tiny_config, train_loader

FLIP = ("AUG.HFLIP", 1.0)
NO_FLIP = ("AUG.HFLIP", 0.0)
CROP = (*NO_FLIP, "AUG.CROP", 1.0, "AUG.CROP_SHORT_SIDES", "[60, 90]", "AUG.CROP_SIDES", "[30, 50]")
RECIPE = ("AUG.CROP", 0.5, "AUG.CROP_SHORT_SIDES", "[50, 70]", "AUG.CROP_SIDES", "[30, 50]", "AUG.SHORT_SIDES")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def rectangles(size=(80, 120)):
    """Filled rectangles, each of a gray of its own in image and mask, so that all three can be compared."""
    boxes = np.array([[10, 20, 50, 60], [60, 8, 118, 72], [0, 0, 8, 8]], np.float32)
    pixels, masks = np.zeros((*size, 3), np.uint8), np.zeros((3, *size), np.uint8)
    for mask, (x1, y1, x2, y2), gray in zip(masks, boxes.astype(int), (100, 170, 240), strict=True):
        mask[y1:y2, x1:x2] = 1
        pixels[y1:y2, x1:x2] = gray
    return Sample(Image.fromarray(pixels), boxes, np.array([0, 1, 2]), masks, 5)


@pytest.mark.parametrize(
    "opts",
    [NO_FLIP, FLIP, CROP, (*FLIP, *CROP[2:]), (*NO_FLIP, "AUG.SHORT_SIDES", "[37, 64, 91]")],
    ids=["resize", "flip", "crop", "crop and flip", "scales"],
)
def test_a_box_stays_the_extent_of_its_mask_and_the_image_under_it(folder, opts):
    config = tiny_config(folder, "DATA.SCALE", "[64, 200]", "DATA.MEAN", 0, "DATA.STD", 1, *opts)
    transform = Transform(config, training=True)
    seed_generators(0)
    for _ in range(20):
        example = transform(rectangles())
        boxes, labels, masks = (example.target[name] for name in ("boxes", "labels", "masks"))
        assert masks.shape == (len(boxes), *example.image.shape[1:]) and len(labels) == len(boxes)
        for box, label, mask in zip(boxes, labels, masks, strict=True):
            if not mask.any():  # of a sliver at the border no pixel may be left
                assert (box[2:] - box[:2]).min() < 64 / 30
                continue
            extent = masks_to_boxes(mask[None])[0]
            extent[2:] += 1
            # The nearest pixel, as OpenCV counts, may be one off; before a crop another one, which then grows.
            assert (extent - box).abs().max() <= (1 + 64 / 30 if "AUG.CROP" in opts else 1) + 1e-4
            if (box[2:] - box[:2]).min() > 8:
                inside = example.image[:, mask.bool()] * 255
                assert (inside - (100, 170, 240)[label]).abs().median() < 2


def test_recipes_scales(folder):
    seed_generators(0)
    sizes = {"1x": [], "3x": []}
    for name, opts in (("1x", ()), ("3x", ("AUG.SHORT_SIDES", str([*range(480, 801, 32)])))):
        transform = Transform(tiny_config(folder, "DATA.SCALE", "[800, 1333]", *opts), training=True)
        for _ in range(25 if name == "3x" else 2):
            sizes[name].append(min(transform(rectangles((40, 60))).image.shape[1:]))
    assert set(sizes["1x"]) == {800}
    assert set(sizes["3x"]) <= {*range(480, 801, 32)} and len(set(sizes["3x"])) >= 7
    # As mmcv's rescale_size: the long side decides where the short one would let it grow too far.
    assert fitted((480, 640), 800, 1333) == (800, 1067)
    assert fitted((427, 640), 800, 1333) == (800, 1199)
    assert fitted((300, 640), 800, 1333) == (625, 1333)
    assert fitted((1, 4000), 800, 1333) == (1, 1333)


def test_a_crop_may_lose_all_objects(folder):
    transform = Transform(tiny_config(folder, *CROP, "AUG.CROP_SIDES", "[8, 8]"), training=True)
    seed_generators(0)
    counts = {len(transform(rectangles()).target["boxes"]) for _ in range(60)}
    assert 0 in counts and max(counts) > 0


def test_evaluation_fits_and_pads_and_draws_nothing(folder):
    config = tiny_config(folder, *FLIP, *CROP[2:])
    for batch in (alone for several in eval_loader(config) for alone in several):
        assert len(batch["images"]) == 1
        assert batch["images"].shape[2] % 32 == batch["images"].shape[3] % 32 == 0
        for number, (height, width) in enumerate(batch["image_sizes"]):
            assert (height, width) == fitted(batch["original_sizes"][number], 48, 64)
            assert batch["padded_sizes"][number] == (-(-height // 32) * 32, -(-width // 32) * 32)
            assert not batch["images"][number, :, height:].any() and not batch["images"][number, :, :, width:].any()
        assert all(len(target["masks"]) == 0 for target in batch["targets"])  # nobody reads them


def flat(batches):
    return [
        (batch["image_ids"], batch["image_sizes"], batch["images"], [[*target.values()] for target in batch["targets"]])
        for batch in batches
    ]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_draw_is_a_function_of_seed_epoch_and_index(folder):
    opts = (*RECIPE, "[40, 48, 56]", "DATA.MOST_OBJECTS", 1)

    def epoch(number, *more, start=0):
        loader = train_loader(tiny_config(folder, *opts, *more))
        loader.set_epoch(number, start)
        return flat(loader)

    first = epoch(0)
    assert same(epoch(0, "DATA.NUM_WORKERS", 2), first)
    assert same(epoch(0, start=1), first[1:])  # as a run goes on in the middle of an epoch
    assert not same(epoch(1), first) and not same(epoch(0, "SEED", 4), first)
    assert all(len(target[1]) <= 1 for *_, targets in first for target in targets)


def test_processes_share_an_epoch(folder):
    one = train_loader(tiny_config(folder, "DATA.GROUP_BY_ASPECT", False))
    config = tiny_config(folder, "DATA.GROUP_BY_ASPECT", False, "DATA.BATCH_SIZE", 1)
    two = [train_loader(config, rank, 2) for rank in range(2)]
    seen = [[batch["image_ids"] for batch in loader] for loader in (one, *two)]
    assert seen[0] == [[*left, *right] for left, right in zip(seen[1], seen[2], strict=True)]


def test_micro_batches_are_of_upright_or_of_wide_images(folder):
    mixed = {True: 0, False: 0}
    for grouped in mixed:
        loader = train_loader(tiny_config(folder, "DATA.GROUP_BY_ASPECT", grouped, *NO_FLIP))
        for epoch in range(10):
            loader.set_epoch(epoch)
            batches = list(loader)
            assert len({image for batch in batches for image in batch["image_ids"]}) == 6  # each once, of seven
            mixed[grouped] += sum(len({h > w for h, w in batch["image_sizes"]}) > 1 for batch in batches)
    assert mixed[False] > 10  # of thirty
    assert mixed[True] <= 10  # of each epoch at most the last, in which what is left over meets


def test_what_is_trained_on(folder):
    dataset = open_dataset(tiny_config(folder), training=True)
    content = read(folder)
    assert len(dataset) == TRAINING - 1  # one has no object
    assert dataset.categories == [(3, "disc"), (7, "bar"), (20, "ring")]
    for index in range(len(dataset)):
        sample = dataset.load(index)
        truth = [each for each in content["annotations"] if each["image_id"] == sample.image_id and not each["iscrowd"]]
        assert [{3: 0, 7: 1, 20: 2}[each["category_id"]] for each in truth] == sample.labels.tolist()
        for box, mask, each in zip(sample.boxes, sample.masks, truth, strict=True):
            x, y, width, height = each["bbox"]
            assert box.tolist() == [x, y, x + width, y + height]
            assert mask.shape == (sample.image.height, sample.image.width)
            if isinstance(each["segmentation"], dict):
                assert mask.sum() == each["area"]
            extent = masks_to_boxes(torch.from_numpy(mask)[None])[0] + torch.tensor([0, 0, 1, 1])
            assert (extent - torch.from_numpy(box)).abs().max() <= 1
    held_out = open_dataset(tiny_config(folder), training=False)
    assert len(held_out) == HELD_OUT and not any(len(held_out.load(index).labels) for index in range(HELD_OUT))


def test_labels_are_in_the_order_of_the_numbers_not_of_the_file(folder):
    tiny_config(folder)
    content = read(folder)
    before = parse(content, "some.json")
    content["categories"].reverse()
    assert parse(content, "some.json") == before
    assert before.categories == ((3, "disc"), (7, "bar"), (20, "ring"))


def test_thousands_of_objects_are_bounded(folder):
    """The masks of 5000 objects at 800 x 1333 would be 5 GB."""
    content = read(folder)
    crowded = [each for each in content["annotations"] if each["image_id"] == 101]
    content["annotations"] = [crowded[number % len(crowded)] | {"id": number} for number in range(5000)]
    (folder / "data" / "crowded.json").write_text(json.dumps(content))
    config = tiny_config(folder, "DATA.TRAIN_ANNOTATIONS", "crowded.json")
    sample = open_dataset(config, training=True).load(0)
    assert len(sample.boxes) == len(sample.masks) == 300


def test_small_images_are_not_trained_on(folder):
    with pytest.raises(UserError, match="has no image to train on with an object, left out: crowds .1., images.*.8.;"):
        open_dataset(tiny_config(folder, "DATA.LEAST_SIDE", 65), training=True)


def test_scenes_are_a_data_set_of_the_same_form():
    config = get_config("configs/scenes_detection.yaml", ["DATA.SCENES", "[3, 2]"])
    dataset = open_dataset(config, training=True)
    batch = Collate(32)([Transform(config, training=True)(dataset.load(index)) for index in range(3)])
    assert batch["images"].shape == (3, 3, 128, 128)
    for target in batch["targets"]:
        extents = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])
        assert torch.equal(extents, target["boxes"])
    truth = open_dataset(config, training=False).truth()
    assert len(truth["images"]) == 2 and {each["image_id"] for each in truth["annotations"]} == {0, 1}
