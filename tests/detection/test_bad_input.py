"""What is wrong in files of annotations, targets and weights is one sentence; what is odd but whole trains on."""

import copy
import json
import math
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths

from vmamba.detection.annotations import parse
from vmamba.detection.datasets import Sample, open_dataset
from vmamba.detection.models import create_detector
from vmamba.detection.transforms import Transform
from vmamba.errors import UserError
from vmamba.runtime.trainer import run
from vmamba.segmentation.models import create_segmenter

from .tiny import SPLITS, read, tiny_config, tiny_file, train_loader

LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    tiny_config(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    options = {"depths": (1, 1, 1, 1), "dims": 8}
    return create_detector("mask_rcnn", "vmamba_nano", 3, backbone_options=options, channels=8, hidden=16)


def changed(folder, split="train", **entries):
    """The content of a file of annotations, the first entries of its lists changed; to `...`: left out."""
    content = read(folder, split)
    for name, changes in entries.items():
        entry = content[name][0] | changes
        content[name][0] = {key: value for key, value in entry.items() if value is not ...}
    return content


POLYGONS = "expected polygons of three points or more, x and y in turn, or run lengths"
LISTED = "annotation 0 has no mask .segmentation is {}., and Mask R-CNN learns and is judged by boxes and masks; add"


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"categories": {"id": "3"}}, "category has id '3'; expected a whole number"),
        ({"categories": {"id": 7}}, "category 7 is listed twice; give each a number of its own"),
        ({"images": {"id": 100.0}}, "image has id 100.0; expected a whole number"),
        ({"images": {"id": 101}}, "image 101 is listed twice"),
        ({"images": {"id": None}}, "image has id None"),
        ({"images": {"height": 0}}, "image 100 has height 0; expected 1 to 1000000"),
        ({"images": {"width": "40"}}, "image 100 has width '40'; expected a whole number"),
        ({"images": {"width": ...}}, "image 100 has width None"),
        ({"images": {"file_name": 7}}, "image 100 has file_name 7; expected text"),
        ({"annotations": {"id": True}}, "annotation has id True"),
        ({"annotations": {"id": 1}}, "annotation 1 is listed twice"),
        ({"annotations": {"image_id": "100"}}, "annotation 0 has image_id '100'; expected a whole number"),
        ({"annotations": {"image_id": 5}}, "annotation 0 is of image 5, which is not listed"),
        ({"annotations": {"category_id": 4}}, "annotation 0 has category 4, which is not listed; there are 3, 7, 20"),
        ({"annotations": {"category_id": 3.0}}, "annotation 0 has category_id 3.0"),
        ({"annotations": {"bbox": [1, 2, 3, math.nan]}}, r"annotation 0 has bbox \[1, 2, 3, nan\]; expected four fini"),
        ({"annotations": {"bbox": [1, 2, 3, math.inf]}}, r"annotation 0 has bbox \[1, 2, 3, inf\]"),
        ({"annotations": {"bbox": [1, 2, 3, 10**400]}}, "annotation 0 has bbox"),
        ({"annotations": {"bbox": [1, 2, 3, 4, 5]}}, r"annotation 0 has bbox \[1, 2, 3, 4, 5\]; expected four"),
        ({"annotations": {"bbox": ...}}, "annotation 0 has bbox None"),
        ({"annotations": {"area": "12"}}, "annotation 0 has area '12'; expected a finite number, or leave it out"),
        ({"annotations": {"iscrowd": "yes"}}, "annotation 0 has iscrowd 'yes'; expected 0 or 1"),
        ({"annotations": {"segmentation": ...}}, LISTED.format("None")),
        ({"annotations": {"segmentation": []}}, LISTED.format(r"\[\]")),
        ({"annotations": {"segmentation": [[1, 2, 3, 4]]}}, rf"annotation 0 has segmentation \[\[1.*{POLYGONS}"),
        ({"annotations": {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}}, POLYGONS),
        ({"annotations": {"segmentation": [[1, 2, 3, 4, 5, math.nan]]}}, POLYGONS),
        ({"annotations": {"segmentation": [[1, 2, 3, 4, 5, 1e9]]}}, POLYGONS),
        ({"annotations": {"segmentation": [1, 2, 3, 4, 5, 6]}}, POLYGONS),
        ({"annotations": {"segmentation": "abc"}}, POLYGONS),
        (
            {"annotations": {"segmentation": {"size": [40, 64], "counts": [2560]}}},
            r"has a mask of size \[40, 64\] .height, width., and its image is \[64, 40\]",
        ),
        ({"annotations": {"segmentation": {"counts": [2560]}}}, "has a mask of size None"),
        ({"annotations": {"segmentation": {"size": [64, 40], "counts": [60, 40]}}}, "run lengths of 100 pixels in an"),
        ({"annotations": {"segmentation": {"size": [64, 40], "counts": [2600, -40]}}}, "run lengths that are damaged"),
        ({"annotations": {"segmentation": {"size": [64, 40], "counts": [2559.5, 0.5]}}}, "that are damaged; write its"),
        ({"annotations": {"segmentation": {"size": [64, 40], "counts": "hello world"}}}, "that are damaged"),
        ({"annotations": {"segmentation": {"size": [64, 40], "counts": "5cb0"}}}, "run lengths of 600 pixels in an"),
        ({"annotations": {"segmentation": {"size": [64, 40], "counts": None}}}, "run lengths that are damaged"),
    ],
)
def test_what_is_wrong_in_an_entry_names_file_entry_and_value(folder, entries, sentence):
    with pytest.raises(UserError, match=f"'some.json': .*{sentence}"):
        parse(changed(folder, **entries), "some.json")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is truncated or no JSON"),
        ('{"images": [{"id": 1, "file_n', "is truncated or no JSON .*fetch it again"),
        ("0 0.5 0.5 0.2 0.3\n1 0.1 0.1 0.2 0.2\n", "is truncated or no JSON"),  # YOLO
        ("[" * 100_000, "is truncated or no JSON"),
        (
            '[{"image_id": 1, "bbox": [1, 2, 3, 4]}]',
            "has no list 'images', so it is not of COCO's form; that has image",
        ),
        ('{"images": [], "annotations": []}', "has no list 'categories', so it is not of COCO's form"),
        ('{"images": [], "annotations": {}, "categories": []}', "has no list 'annotations'"),
        ('{"images": [3], "annotations": [], "categories": [{"id": 1}]}', "image has id None; expected a whole number"),
        ('{"images": [], "annotations": [], "categories": []}', "it has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "has 1 category, but MODEL.NUM_CLASSES is 3;"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1}, {"id": 2}, {"id": 3}]}',
            "has no image.* with an object; there is nothing to learn from it, nor to find",
        ),
    ],
)
def test_a_file_of_another_kind_is_one_sentence(folder, split, text, sentence):
    (folder / "data" / "wrong.json").write_text(text)
    config = tiny_config(folder, f"DATA.{split.upper()}_ANNOTATIONS", "wrong.json")
    with pytest.raises(UserError, match=f"wrong.json'.*{sentence}") as error:
        open_dataset(config, split == "train")
    assert "\n" not in str(error.value)


def test_what_is_not_there_names_its_key(folder):
    for key, what in (("DATA.TRAIN_ANNOTATIONS", "file"), ("DATA.TRAIN_IMAGES", "folder")):
        with pytest.raises(UserError, match=f"has no {what} 'nowhere', as {key} says: it holds annotations, train2017"):
            open_dataset(tiny_config(folder, key, "nowhere"), True)
        with pytest.raises(UserError, match=f"has no {what} '/nowhere'"):
            open_dataset(tiny_config(folder, key, "/nowhere"), True)


def test_other_categories_than_those_held_out_are_refused(tmp_path):
    tiny_config(tmp_path)
    content = read(tmp_path, "val")
    content["categories"][1]["name"] = "stick"
    (tmp_path / "data" / SPLITS["val"][1]).write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="the training images have category 7 'bar' where those held out have 7 'stick'"
    ):
        run(tiny_config(tmp_path))


def test_boxes_without_area_or_outside_are_left_out_and_told(tmp_path, caplog):
    caplog.set_level("INFO", logger="vmamba")
    tiny_config(tmp_path)
    content = read(tmp_path)
    odd = [[5, 5, 0.5, 9], [5, 5, 9, 0], [5, 5, -9, 9], [45, 5, 9, 9], [-20, 5, 9, 9]]
    template = next(each for each in content["annotations"] if isinstance(each["segmentation"], list))
    before = len(content["annotations"])
    for number, box in enumerate(odd):
        content["annotations"].append(template | {"id": before + number, "bbox": box})
    (tmp_path / "data" / "odd.json").write_text(json.dumps(content))
    config = tiny_config(tmp_path, "DATA.TRAIN_ANNOTATIONS", "odd.json")
    plain, odd = open_dataset(tiny_config(tmp_path), True), open_dataset(config, True, tell=True)
    assert [plain.load(n).boxes.tolist() for n in range(7)] == [odd.load(n).boxes.tolist() for n in range(7)]
    assert "boxes without area (3), boxes outside of their image (2)" in caplog.text


def test_masks_without_a_pixel_are_left_out_and_told(tmp_path, caplog):
    caplog.set_level("INFO", logger="vmamba")
    tiny_config(tmp_path)
    content = read(tmp_path)
    template = next(each for each in content["annotations"] if isinstance(each["segmentation"], list))
    (image,) = [each for each in content["images"] if each["id"] == template["image_id"]]
    size = [image["height"], image["width"]]
    beside = [[[-500, -500, -400, -500, -400, -400]], [[5, size[0], 9, size[0], 9, size[0] + 4]]]
    nothing = {"size": size, "counts": [size[0] * size[1]]}
    masks = [*beside, nothing, {"size": size, "counts": compressed(nothing)}]
    for number, mask in enumerate(masks):
        content["annotations"].append(template | {"id": 9000 + number, "segmentation": mask})
    (tmp_path / "data" / "odd.json").write_text(json.dumps(content))
    odd = open_dataset(tiny_config(tmp_path, "DATA.TRAIN_ANNOTATIONS", "odd.json"), True, tell=True)
    plain = open_dataset(tiny_config(tmp_path), True)
    assert [plain.load(n).boxes.tolist() for n in range(7)] == [odd.load(n).boxes.tolist() for n in range(7)]
    assert "masks without a pixel of their image (4)" in caplog.text


def compressed(mask):
    return run_lengths.frPyObjects(mask, *mask["size"])["counts"].decode()


def test_an_image_that_is_listed_and_not_there(tmp_path):
    (tiny_file(tmp_path).parent / "data" / "train2017" / "003.png").unlink()
    loaders = [train_loader(tiny_config(tmp_path, "DATA.SKIP_BAD_IMAGES", skip)) for skip in (True, False)]
    for epoch in range(3):  # of which each leaves one of the seven images out
        loaders[0].set_epoch(epoch)
        images = [image for batch in loaders[0] for image in batch["image_ids"]]
        assert len(images) == 6 and 103 not in images
    assert loaders[0].skipped == 1
    with pytest.raises(UserError, match=r"cannot read '.*003.png': No such file or directory; mend or remove it"):
        for epoch in range(3):
            loaders[1].set_epoch(epoch)
            list(loaders[1])


def test_an_image_of_another_size_than_the_file_says(folder):
    content = changed(folder, images={"width": 39})
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 100]
    content["annotations"].append({"id": 99, "image_id": 100, "category_id": 3, "bbox": [1, 1, 9, 9]})
    content["annotations"][-1]["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    (folder / "data" / "sizes.json").write_text(json.dumps(content))
    dataset = open_dataset(tiny_config(folder, "DATA.TRAIN_ANNOTATIONS", "sizes.json"), True)
    with pytest.raises(UserError, match="000.png' is 40 x 64 pixels, and '.*sizes.json' says 39 x 64; mend"):
        dataset.load(0)


def test_objects_of_one_pixel_thousands_of_them_and_a_line_of_an_image_train(tmp_path):
    tiny_config(tmp_path)
    content = read(tmp_path)
    content["annotations"] = []
    for image in content["images"]:
        for number in range(2000 if image["id"] == 101 else 1):
            x, y = number % image["width"], number // image["width"] % image["height"]
            polygon = [x, y, x + 1, y, x + 1, y + 1, x, y + 1]
            entry = {"id": len(content["annotations"]), "image_id": image["id"], "category_id": 3}
            content["annotations"].append(entry | {"bbox": [x, y, 1, 1], "segmentation": [polygon]})
    line = {"id": 500, "file_name": "line.png", "height": 1, "width": 4000}
    content["images"].append(line)
    content["annotations"].append(
        {
            "id": 99999,
            "image_id": 500,
            "category_id": 7,
            "bbox": [5, 0, 900, 1],
            "segmentation": [[5, 0, 905, 0, 905, 1]],
        }
    )
    for images, file, _ in SPLITS.values():
        Image.fromarray(np.zeros((1, 4000, 3), np.uint8)).save(tmp_path / "data" / images / "line.png")
        here = copy.deepcopy(content)
        if images == "val2017":
            here["images"] = [each for each in here["images"] if each["id"] < 105 or each["id"] == 500]
            kept = {each["id"] for each in here["images"]}
            here["annotations"] = [each for each in here["annotations"] if each["image_id"] in kept]
        (tmp_path / "data" / file).write_text(json.dumps(here))
    results = run(tiny_config(tmp_path, "TRAIN.EPOCHS", 1, "TRAIN.EMA.ENABLE", False, "DATA.LEAST_SIDE", 0))
    assert results["bbox_mAP"] >= 0


def boxes(*first):
    return torch.tensor([first, (5, 5, 40, 30)], dtype=torch.float32)


def batch_without_objects(size=64, count=2):
    return [
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "masks": torch.zeros(0, size, size).byte()}
        for _ in range(count)
    ]


def test_a_batch_without_any_object_trains_every_weight(model):
    model.train()
    model.zero_grad()
    losses = model(torch.randn(2, 3, 64, 64), targets=batch_without_objects())
    assert all(math.isfinite(losses[name].item()) for name in LOSSES)
    assert losses["loss_mask"] == losses["loss_bbox"] == losses["loss_rpn_bbox"] == 0 < losses["loss_cls"]
    assert all(losses[name].requires_grad for name in LOSSES)
    sum(losses[name] for name in LOSSES).backward()
    lacking = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert lacking == []  # or DistributedDataParallel would wait for them
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": torch.tensor([0, 3])}, "a label is 3, and the model has 3 classes, counted from 0"),
        ({"labels": torch.tensor([0, -1])}, "a label is -1, and the model has 3 classes"),
        ({"labels": torch.tensor([0])}, r"targets\[1\]\['labels'\] has the shape \(1,\); expected \(2,\), for 2 boxes"),
        ({"labels": torch.tensor([0.0, 1.0])}, r"targets\[1\]\['labels'\] is of torch.float32; expected int64"),
        ({"boxes": torch.zeros(2, 5)}, r"targets\[1\]\['boxes'\] has the shape \(2, 5\); expected \(2, 4\)"),
        ({"masks": torch.zeros(2, 60, 64)}, r"\['masks'\] has the shape \(2, 60, 64\); expected \(2, 64, 64\), for 2"),
        ({"masks": torch.zeros(1, 64, 64)}, r"\['masks'\] has the shape \(1, 64, 64\); expected \(2, 64, 64\)"),
        ({"masks": None}, r"targets\[1\] lacks masks; give boxes, labels and masks"),
        ({"masks": [torch.ones(64, 64)] * 2}, r"targets\[1\]\['masks'\] is a list; expected a tensor"),
        ({"labels": np.zeros(2, int)}, r"targets\[1\]\['labels'\] is a ndarray; expected a tensor"),
        ({"boxes": boxes(math.nan, 1, 9, 9)}, r"targets\[1\]\['boxes'\] holds \[nan, 1.0, 9.0, 9.0\]; expected finite"),
        ({"boxes": boxes(1, 1, math.inf, 9)}, r"holds \[1.0, 1.0, inf, 9.0\]; expected finite x1, y1, x2, y2"),
        ({"boxes": boxes(9, 1, 9, 9)}, r"holds \[9.0, 1.0, 9.0, 9.0\]; .* with x1 < x2 and y1 < y2"),
        ({"boxes": boxes(9, 9, 1, 1)}, r"holds \[9.0, 9.0, 1.0, 1.0\]; .* with x1 < x2"),
        ({"boxes": boxes(1, 60, 9, 63)}, r"holds \[1.0, 60.0, 9.0, 63.0\]; .* in an image of 50 x 64 .height, width."),
        ({"boxes": boxes(64, 1, 90, 9)}, r"holds \[64.0, 1.0, 90.0, 9.0\]"),
        ({"boxes": boxes(-9, 1, 0, 9)}, r"holds \[-9.0, 1.0, 0.0, 9.0\]"),
    ],
)
def test_targets_that_do_not_fit(model, change, sentence):
    target = {"boxes": boxes(1, 1, 20, 20), "labels": torch.tensor([0, 2]), "masks": torch.ones(2, 64, 64)} | change
    target = {name: value for name, value in target.items() if value is not None}
    with pytest.raises(UserError, match=sentence):
        model.train()(torch.randn(2, 3, 64, 64), [(64, 64), (50, 64)], [*batch_without_objects(count=1), target])


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (batch_without_objects(count=1), "there are 1 targets for 2 images"),
        (torch.zeros(2, 3), "targets are a Tensor; give a list of one for each image"),
        (batch_without_objects()[0], "targets are a dict; give a list"),
        ([torch.zeros(0, 4)] * 2, r"targets\[0\] is a Tensor; expected boxes, labels and masks by name"),
    ],
)
def test_what_is_no_list_of_targets(model, targets, sentence):
    with pytest.raises(UserError, match=sentence):
        model(torch.randn(2, 3, 64, 64), targets=targets)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "images are of torch.uint8, and the weights of torch.float32"),
        (
            torch.zeros(1, 3, 64, 64, dtype=torch.float64),
            "images are of torch.float64, and the weights of torch.float32",
        ),
        ([torch.zeros(3, 64, 64)], r"images are a list; a {} takes a tensor \(batch, channels, H, W\)"),
        (torch.zeros(0, 3, 64, 64), r"images have shape \(0, 3, 64, 64\); a {} takes one image or more"),
        (torch.zeros(1, 3, 0, 64), r"images have shape \(1, 3, 0, 64\); a {} takes one image or more"),
        (
            torch.zeros(1, 4, 64, 64),
            r"images have shape \(1, 4, 64, 64\); this model takes \(batch, 3, height, width\)",
        ),
    ],
)
def test_images_that_are_no_batch(model, images, sentence):
    for kind, each in (
        ("detector", model),
        ("segmenter", create_segmenter("upernet", "test_convnext", 3, channels=8).eval()),
    ):
        with pytest.raises(UserError, match=sentence.format(kind)):
            each(images)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert len(model.eval()(torch.randn(1, 3, 64, 64))) == 1


def test_a_box_that_float32_makes_empty_is_not_trained_on(folder):
    """At the edge of its image, or scaled down far."""
    transform = Transform(tiny_config(folder, "AUG.HFLIP", 0.0), training=True)
    corners = np.array([[39.999999, 3, 80, 9], [3, 3, 9, 9]], np.float32)
    masks = np.ones((2, 40, 40), np.uint8)
    found = transform(Sample(Image.new("RGB", (40, 40)), corners, np.array([0, 2]), masks, 5)).target
    assert found["labels"].tolist() == [2] and len(found["boxes"]) == len(found["masks"]) == 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"image_sizes": [(64, 64)]}, "there are 1 image_sizes for 2 images; give .height, width. for each"),
        ({"image_sizes": []}, "there are 0 image_sizes for 2 images"),
        ({"padded_sizes": [(64, 64)] * 3}, "there are 3 padded_sizes for 2 images"),
        ({"output_sizes": [(90, 80)]}, "there are 1 output_sizes for 2 images"),
        ({"image_sizes": (64, 64)}, r"image_sizes\[0\] is 64; expected two whole numbers, .height, width."),
        ({"image_sizes": [(64, 64), (64, 64, 3)]}, r"image_sizes\[1\] is \(64, 64, 3\); expected two whole numbers"),
        ({"output_sizes": [(90.5, 80), (9, 8)]}, r"output_sizes\[0\] is \(90.5, 80\); expected two whole numbers"),
        ({"image_sizes": [(64, 64), (64, 65)]}, r"image_sizes\[1\] is \(64, 65\); .* in images of 64 x 64"),
        ({"output_sizes": [(9, 8), (0, 8)]}, r"output_sizes\[1\] is \(0, 8\); expected sides of a pixel or more"),
    ],
)
def test_sizes_that_do_not_fit(model, training, sizes, sentence):
    targets = batch_without_objects() if training else None
    with pytest.raises(UserError, match=sentence):
        model(torch.randn(2, 3, 64, 64), targets=targets, **sizes)


def test_sizes_may_be_a_tensor_and_images_are_a_batch(model):
    sizes = torch.tensor([[60, 40], [64, 64]])
    with torch.no_grad():
        for each, size in zip(model.eval()(torch.randn(2, 3, 64, 64), sizes), sizes.tolist(), strict=True):
            assert list(each["masks"].shape[1:]) == size
    with pytest.raises(UserError, match=r"images have shape \(3, 64, 64\); a detector takes \(batch, channels, H, W\)"):
        model(torch.randn(3, 64, 64))


def test_memory_does_not_grow_over_sizes(model):
    """Fifty sizes, forwards and backwards, take what the first few of them took."""
    sizes = np.random.default_rng(0).integers(33, 96, (50, 2)).tolist()
    peaks = []
    for height, width in [[96, 96], [96, 96], *sizes]:
        target = {"boxes": torch.tensor([[2.0, 3.0, 30.0, 31.0]]), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, height, width, dtype=torch.uint8)
        losses = model.train()(torch.randn(1, 3, height, width), targets=[target])
        sum(losses[name] for name in LOSSES).backward()
        model.zero_grad()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert peaks[-1] - peaks[1] < 40  # MB; 50 images' activations would be some 800
