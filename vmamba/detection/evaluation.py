"""How good detections are: COCO's average precision of boxes and masks, by faster-coco-eval."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as run_lengths
from torch import Tensor, nn

from vmamba.detection.datasets import Dataset
from vmamba.errors import UserError
from vmamba.runtime.distributed import gather, on_main
from vmamba.runtime.task import Results

# COCO's twelve numbers in its order: average precision, over all thresholds, at two, by size; recall likewise.
NUMBERS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l", "AR_1", "AR_10", "AR_100", "AR_s", "AR_m", "AR_l")


class Detections:
    """COCO's numbers over the predictions of all processes, in percent; -100 where there is nothing to find."""

    def __init__(self, dataset: Dataset, keep: bool):
        self.dataset, self.keep = dataset, keep
        self.found: list[dict[str, Any]] = []  # in COCO's form of results
        self.seen: list[int] = []
        self.all: list[dict[str, Any]] | None = None  # of all processes, once they are gathered
        self.by_class: dict[str, Any] = {}

    def add(self, model: nn.Module, batch: Sequence[Mapping[str, Any]]) -> None:
        numbers = [number for number, _ in self.dataset.categories]
        for alone in batch:
            (found,) = model.detect(alone["images"], alone["image_sizes"], alone["original_sizes"])
            (image_id,), (size,) = alone["image_ids"], alone["original_sizes"]
            self.seen.append(image_id)
            self.found += as_results(image_id, found, model.masks(found, size), numbers)

    def results(self) -> Results:
        found = [each for part in gather(self.found) for each in part]
        self.all = sorted(found, key=lambda each: each["image_id"])  # on any number of processes
        seen = [image for part in gather(self.seen) for image in part]
        results, self.by_class = on_main(lambda: evaluate(self.dataset.truth(), self.all, seen))
        return results

    def details(self) -> dict[str, Any]:
        """Average precision by class, in percent, null where there is none of it."""
        return self.by_class

    def files(self) -> dict[str, bytes]:
        return {"results.json": json.dumps(self.all).encode()} if self.keep and self.all is not None else {}


def as_results(
    image_id: int, prediction: Mapping[str, Tensor], masks: Iterable[Tensor], numbers: Sequence[int]
) -> list[dict[str, Any]]:
    """A prediction of `MaskRCNN` in COCO's form of results; of `masks` some (n, H, W) come at a time, and `numbers` are
    the categories' of label 0, 1, ..."""
    boxes = prediction["boxes"].double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    lengths = [  # turned one by one, which copies them
        run_lengths.encode(np.asfortranarray(mask, np.uint8)) for part in masks for mask in part.cpu().numpy()
    ]
    scores, labels = prediction["scores"].tolist(), prediction["labels"].tolist()
    return [
        {
            "image_id": image_id,
            "category_id": numbers[label],
            "bbox": box,
            "score": score,
            "segmentation": {"size": list(length["size"]), "counts": _text(length["counts"])},
        }
        for box, score, label, length in zip(boxes.tolist(), scores, labels, lengths, strict=True)
    ]


def evaluate(
    truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]], images: Sequence[int]
) -> tuple[Results, dict[str, Any]]:
    """COCO's twelve numbers for boxes and for masks over `images`, and average precision by class; in percent."""
    if not images:
        raise UserError("none of the validation images could be read; check DATA.DATA_PATH")
    results: Results = {}
    by_class: dict[str, Any] = {}
    truth, found, images = _renumbered(truth, found, images)
    reference = COCO(truth)
    for kind, other in (("bbox", "segmentation"), ("segm", "bbox")):
        # Without the other's, since it takes areas from boxes where there are any.
        results_of_kind = [{name: value for name, value in each.items() if name != other} for each in found]
        evaluation = COCOeval_faster(reference, _as_coco(results_of_kind, reference), kind)
        evaluation.params.imgIds = sorted(images)
        evaluation.run()
        numbers = zip(NUMBERS, evaluation.stats[: len(NUMBERS)], strict=True)
        results |= {f"{kind}_{name}": 100 * float(number) for name, number in numbers}
        by_class[f"{kind}_mAP"] = _by_class(evaluation, truth["categories"])
    return results, by_class


def _renumbered(
    truth: Mapping[str, Any], found: Iterable[Mapping[str, Any]], images: Iterable[int]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[int]]:
    """With images and categories numbered from 0 in the order of their numbers, since COCOeval does not take all of
    those that a file may have (negative ones, and from 2^53 on); a category keeps its own as `number`."""
    image, category = (
        {own: place for place, own in enumerate(sorted(each["id"] for each in truth[kind]))}
        for kind in ("images", "categories")
    )

    def placed(each: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {"image_id": image[each["image_id"]], "category_id": category[each["category_id"]]}
        return {**each, **numbers}

    content = {
        **truth,
        "images": [{**each, "id": image[each["id"]]} for each in truth["images"]],
        "annotations": [placed(each) for each in truth["annotations"]],
        "categories": [{**each, "id": category[each["id"]], "number": each["id"]} for each in truth["categories"]],
    }
    return content, [placed(each) for each in found], [image[each] for each in images]


def _as_coco(found: list[dict[str, Any]], reference: COCO) -> COCO:
    return reference.loadRes(found) if found else COCO({**reference.dataset, "annotations": []})


def _by_class(evaluation: COCOeval_faster, categories: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    names = {each["id"]: f"{each['number']} {each.get('name', '')}" for each in categories}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes): all sizes, most boxes
    found = {}
    for number, values in zip(evaluation.params.catIds, np.moveaxis(precision, 2, 0), strict=True):
        valid = values[values > -1]
        found[names[number]] = float(100 * valid.mean()) if valid.size else None
    return found


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts
