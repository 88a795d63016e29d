"""COCO's numbers are pycocotools', and what is written is what pycocotools reads."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vmamba.config import output_folder
from vmamba.detection import datasets
from vmamba.detection.evaluation import NUMBERS, as_results, evaluate
from vmamba.detection.task import Task
from vmamba.errors import UserError
from vmamba.runtime.distributed import World
from vmamba.runtime.evaluation import evaluate_alone
from vmamba.runtime.trainer import run

from .tiny import CATEGORIES, HELD_OUT, annotation, read, shape, tiny_config

IMAGES, SIZE = 25, (120, 160)


@pytest.fixture(scope="module")
def truth():
    """Objects of three sizes in 25 images, crowds, an image without any, categories 3, 7, 20, and 21 of which there is
    nothing."""
    random = np.random.default_rng(0)
    images = [{"id": 10 * number, "height": SIZE[0], "width": SIZE[1]} for number in range(IMAGES)]
    annotations = []
    for image in images[:-1]:
        for _ in range(random.integers(0, 12)):
            mask = ellipse(random)
            entry = annotation(mask, len(annotations), crowd=random.random() < 0.15)
            category = CATEGORIES[random.integers(3)][0]
            annotations.append(entry | {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category})
    categories = [{"id": number, "name": name} for number, name in (*CATEGORIES, (21, "absent"))]
    return {"images": images, "annotations": annotations, "categories": categories}


def ellipse(random):
    """(H, W) bool, of any of COCO's three sizes."""
    radii = random.uniform(3, 12) * np.array([1, 1.3]) * random.choice([1, 3, 6])
    centre = [random.uniform(0, side) for side in SIZE]
    grid = np.ogrid[: SIZE[0], : SIZE[1]]
    mask = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) <= 1
    return mask if mask.sum() > 4 else ellipse(random)


@pytest.fixture(scope="module")
def found(truth):
    """Objects nearly there, of wrong classes, twice, not there; parts of crowds; scores that are equal."""
    random = np.random.default_rng(1)
    results = []
    for entry in truth["annotations"]:
        size = (entry["segmentation"]["size"]) if isinstance(entry["segmentation"], dict) else SIZE
        mask = bitmap(entry["segmentation"], size)
        for _ in range(random.integers(0, 4)):
            moved = np.roll(mask, random.integers(-4, 5, 2), (0, 1))
            category = random.choice([entry["category_id"]] * 4 + [3, 7, 20, 21])
            results.append(result(random, moved, entry["image_id"], category))
    for image in truth["images"]:
        results += [result(random, ellipse(random), image["id"], random.choice([3, 7])) for _ in range(3)]
    return results


def bitmap(segmentation, size):
    return datasets.run_lengths.decode(datasets.as_run_lengths(segmentation, *size)).astype(bool)


def result(random, mask, image, category):
    text = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
    box = (run_lengths.toBbox(text) + random.uniform(-2, 2, 4)).clip(0.5).tolist()
    counts = {"size": [*mask.shape], "counts": text["counts"].decode()}
    score = round(float(random.random()), 2)
    return {"image_id": image, "category_id": int(category), "bbox": box, "score": score, "segmentation": counts}


def by_pycocotools(truth, found, kind, images):
    """The twelve numbers, and average precision by class, as mmdetection has them: masks without the boxes, from which
    pycocotools would take their areas."""
    other = {"bbox": "segmentation", "segm": "bbox"}[kind]
    found = [{name: value for name, value in copy.deepcopy(each).items() if name != other} for each in found]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = copy.deepcopy(truth)
        reference.createIndex()
        if found:
            results = reference.loadRes(found)
        else:  # which its loadRes does not take
            results = COCO()
            results.dataset = reference.dataset | {"annotations": []}
            results.createIndex()
        evaluation = COCOeval(reference, results, kind)
        evaluation.params.imgIds = sorted(images)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    by_class = [values[values > -1] for values in np.moveaxis(precision, 2, 0)]
    return evaluation.stats, [values.mean() if values.size else None for values in by_class]


def assert_the_same(truth, found, images):
    results, details = evaluate(copy.deepcopy(truth), found, images)
    for kind in ("bbox", "segm"):
        stats, by_class = by_pycocotools(truth, found, kind, images)
        ours = np.array([results[f"{kind}_{name}"] for name in NUMBERS]) / 100
        np.testing.assert_allclose(ours, stats, rtol=0, atol=1e-9)
        for value, expected in zip(details[f"{kind}_mAP"].values(), by_class, strict=True):
            assert value == (None if expected is None else pytest.approx(100 * expected, abs=1e-7))
    assert list(details["bbox_mAP"]) == ["3 disc", "7 bar", "20 ring", "21 absent"]
    return results


def test_the_numbers_are_pycocotools(truth, found):
    images = [each["id"] for each in truth["images"]]
    results = assert_the_same(truth, found, images)
    assert 5 < results["bbox_mAP"] < 95 and 5 < results["segm_mAP"] < 95
    assert all(results[f"{kind}_mAP_{size}"] > 0 for kind in ("bbox", "segm") for size in "sml")
    assert any(each["iscrowd"] for each in truth["annotations"])
    assert results["segm_mAP_m"] != results["bbox_mAP_m"]


def test_the_numbers_of_some_of_the_images(truth, found):
    some = [each["id"] for each in truth["images"]][::3]
    of_these = [each for each in found if each["image_id"] in some]
    assert_the_same(truth, of_these, some)


def test_numbers_of_images_and_categories_may_be_any(truth, found):
    """Negative, and beyond what a double tells apart; in the same order, since equal scores count in it."""
    renamed = copy.deepcopy(truth)
    results = copy.deepcopy(found)
    image = {each["id"]: each["id"] + (-120 if each["id"] < 120 else 2**70) for each in truth["images"]}
    category = {3: -4, 7: 0, 20: 2**60, 21: 2**70}
    for entry in renamed["images"]:
        entry["id"] = image[entry["id"]]
    for entry in renamed["categories"]:
        entry["id"] = category[entry["id"]]
    for entry in (*renamed["annotations"], *results):
        entry["image_id"], entry["category_id"] = image[entry["image_id"]], category[entry["category_id"]]
    before = copy.deepcopy(results)
    numbers, details = evaluate(renamed, results, list(image.values()))
    expected, known = evaluate(truth, found, list(image))
    assert numbers == expected and results == before
    assert list(details["bbox_mAP"]) == ["-4 disc", "0 bar", f"{2**60} ring", f"{2**70} absent"]
    assert list(details["segm_mAP"].values()) == list(known["segm_mAP"].values())


def test_nothing_found(truth):
    results = assert_the_same(truth, [], [each["id"] for each in truth["images"]])
    assert results["bbox_mAP"] == results["segm_mAP"] == 0


def test_nothing_to_find(truth, found):
    empty = truth["images"][-1]["id"]
    results = assert_the_same(truth, [each for each in found if each["image_id"] == empty], [empty])
    assert set(results.values()) == {-100}


def test_a_prediction_in_cocos_form():
    random = np.random.default_rng(0)
    masks = torch.from_numpy(np.array([shape(random, (40, 50)), shape(random, (40, 50))]))
    boxes = torch.tensor([[1.5, 2.0, 10.0, 12.0], [0.0, 0.0, 50.0, 40.0]])
    prediction = {"boxes": boxes, "scores": torch.tensor([0.75, 0.5]), "labels": torch.tensor([2, 0])}
    first, second = as_results(7, prediction, masks.split(1), [3, 7, 20])
    assert (first["image_id"], first["category_id"], first["score"]) == (7, 20, 0.75)
    assert (first["bbox"], second["bbox"]) == ([1.5, 2.0, 8.5, 10.0], [0.0, 0.0, 50.0, 40.0])
    for mask, each in zip(masks, (first, second), strict=True):
        assert np.array_equal(datasets.run_lengths.decode(each["segmentation"]), mask.numpy())
    assert json.loads(json.dumps([first, second])) == [first, second]
    assert as_results(7, {name: value[:0] for name, value in prediction.items()}, [], [3, 7, 20]) == []


def test_the_truth_lacks_nothing_that_is_needed(tmp_path, truth, found):
    """Areas and crowd flags that other tools leave out, and numbers from 0, give the numbers of the whole file."""
    tiny_config(tmp_path)
    less = [
        {name: value for name, value in each.items() if name != "area" and (name != "iscrowd" or value)}
        | {"id": number}
        for number, each in enumerate(truth["annotations"])
    ]
    named = [each | {"file_name": f"{each['id']}.png"} for each in truth["images"]]
    path = tmp_path / "data" / "annotations" / "less.json"
    path.write_text(json.dumps(truth | {"images": named, "annotations": less}))
    config = tiny_config(tmp_path, "DATA.VAL_ANNOTATIONS", "annotations/less.json", "MODEL.NUM_CLASSES", 4)
    mended = datasets.open_dataset(config, training=False).truth()
    images = [each["id"] for each in truth["images"]]
    # A polygon's area is that of its pixels, which the file's is not quite.
    exact = [each["area"] for each in truth["annotations"] if isinstance(each["segmentation"], dict)]
    assert exact == [each["area"] for each in mended["annotations"] if isinstance(each["segmentation"], dict)]
    one, other = (evaluate(copy.deepcopy(each), found, images)[0] for each in (truth, mended))
    assert other["bbox_mAP"] == pytest.approx(one["bbox_mAP"]) and other["segm_mAP"] == pytest.approx(one["segm_mAP"])


def test_saved_predictions_are_what_was_evaluated(tmp_path):
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 1, "TRAIN.EMA.ENABLE", False)
    results = run(config)
    again = run(tiny_config(tmp_path, "EVAL_MODE", True, "TEST.SAVE_PREDICTIONS", True))
    assert again == results
    saved = json.loads((output_folder(config) / "predictions" / "results.json").read_text())
    truth = read(tmp_path, "val")
    images = [each["id"] for each in truth["images"]]
    assert len(saved) == 10 * len(images)  # TEST.MOST of each, since every score counts
    for number, each in enumerate(truth["annotations"], 1):
        each["id"] = number
    for kind in ("bbox", "segm"):
        stats, _ = by_pycocotools(truth, saved, kind, images)
        assert [results[f"{kind}_{name}"] / 100 for name in NUMBERS] == pytest.approx(list(stats), abs=1e-9)
    told = json.loads((output_folder(config) / "evaluation.json").read_text())
    assert list(told["details"]["bbox_mAP"]) == ["3 disc", "7 bar", "20 ring"]
    run(tiny_config(tmp_path, "EVAL_MODE", True, "TEST.SAVE_PREDICTIONS", True, "TEST.SCORE", 1.0))
    assert json.loads((output_folder(config) / "predictions" / "results.json").read_text()) == []


def test_neither_batches_nor_processes_change_what_is_found(tmp_path, monkeypatch):
    """Of upright and wide images, which in one batch would be padded to each other's size."""
    torch.manual_seed(0)
    model, seen = Task(tiny_config(tmp_path)).build_model().eval(), []
    for size, processes in ((1, 1), (2, 1), (4, 1), (2, 2)):
        config = tiny_config(tmp_path, "DATA.BATCH_SIZE", size, "DATA.DIVISOR", 8, "TEST.SAVE_PREDICTIONS", True)
        task, worlds = Task(config), [World(rank, processes, rank, torch.device("cpu")) for rank in range(processes)]
        meters = [task.meter(world) for world in worlds]
        for world, meter in zip(worlds, meters, strict=True):
            for batch in task.eval_loader(world):
                meter.add(model, batch)
        gathered = iter([[meter.found for meter in meters], [meter.seen for meter in meters]])
        monkeypatch.setattr("vmamba.detection.evaluation.gather", lambda value, gathered=gathered: next(gathered))
        seen.append((meters[0].results(), meters[0].files()))
    assert len(json.loads(seen[0][1]["results.json"])) == 10 * HELD_OUT
    assert seen[1:] == seen[:1] * 3


def test_an_unreadable_image_is_left_out_of_the_truth(tmp_path, monkeypatch):
    config, seen = tiny_config(tmp_path), []
    monkeypatch.setattr("vmamba.detection.evaluation.evaluate", lambda truth, found, images: (seen.append(images), {}))
    (tmp_path / "data" / "val2017" / "001.png").unlink()
    device, model = torch.device("cpu"), Task(config).build_model()
    evaluate_alone(tiny_config(tmp_path, "DATA.SKIP_BAD_IMAGES", True), model, device)
    assert seen == [[100, 102, 103, 104]]
    with pytest.raises(UserError, match=r"cannot read '.*001.png': No such file.*set DATA.SKIP_BAD_IMAGES true"):
        evaluate_alone(config, model, device)
