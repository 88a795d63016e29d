"""What a checkpoint of any task says of images: classes, boxes and masks, or a map, as JSON and as pictures."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from yacs.config import CfgNode

from vmamba.analysis.classes import class_names
from vmamba.analysis.tables import write_json
from vmamba.analysis.zoo import choose_device
from vmamba.classification.transforms import build_transform
from vmamba.config import get_config, restored
from vmamba.data.folders import LeftOut, image_files, what_is
from vmamba.data.images import UnreadableImage, decode
from vmamba.detection import models as detection_models
from vmamba.detection.datasets import without_objects
from vmamba.detection.evaluation import as_results
from vmamba.detection.transforms import Collate, Transform
from vmamba.errors import UserError
from vmamba.files import check_keeps, make_folder, read_text, write_atomically
from vmamba.models.pretrained import Checkpoint, open_checkpoint
from vmamba.models.whole import variant_of
from vmamba.runtime.task import open_task
from vmamba.segmentation import models as segmentation_models
from vmamba.segmentation.datasets import Sample
from vmamba.segmentation.evaluation import Inference
from vmamba.segmentation.transforms import EvalTransform
from vmamba.text import counted, printable, some

logger = logging.getLogger("vmamba")
_LEAST, _MOST = 256, 2048  # sides that a picture is scaled to where its image is smaller or larger
_LEGEND = 12  # classes in it


@dataclass(frozen=True)
class Answer:
    """Of one image."""

    told: dict[str, Any]  # for JSON
    draw: Callable[[Image.Image], Image.Image]  # on the image, scaled to be readable


Predictor = Callable[[Image.Image], Answer]


def predict(
    checkpoint: str,
    images: Sequence[str],
    *,
    cfg: str | None = None,
    names: str | None = None,
    score: float = 0.5,
    weights: str = "auto",
    device: str = "auto",
    output: str = "output/predict",
) -> dict[str, Any]:
    """Write a picture of each image's prediction, and all of them as `predictions.json`.

    Args:
        checkpoint: of a run of any task, which says what it is, or a released file; an address is downloaded.
        images: files, folders (with those below), or patterns.
        cfg: the config of a checkpoint that does not hold its own.
        names: a file with the name of a class in each line, where the checkpoint's data does not tell them.
        score: least score of a detection in the pictures; the JSON has all.
        weights: as of `vmamba.load_checkpoint`.

    Returns what is written as JSON: for each image `top` (class, name and probability of the best five), `objects` (in
    COCO's form of results, with class and name) or `classes` (class, name and share of the pixels); classes are counted
    from 0.  Raises UserError without any image, for a checkpoint that cannot be read, and where a picture would be
    written over what is read; an image that cannot be read is named in the log and left out.
    """
    files = find_images(images)
    pictures = _picture_names(files)
    read = [*files, *filter(None, [checkpoint, cfg, names])]
    check_keeps(read, *(Path(output) / name for name in (*pictures, "predictions.json")))
    found = open_checkpoint(checkpoint, weights)
    config = config_of(found, cfg)
    place = choose_device(device)
    task = open_task(config)
    model = task.build_model()
    task.load(model, found)
    called = _read_names(names, config) if names else class_names(config)
    predictor = _PREDICTORS[config.TASK](config, model.to(place).eval(), place, called, score)
    told: dict[str, Any] = {}
    for path, picture in zip(files, pictures, strict=True):
        try:
            image = decode(path, 3, path)
        except UnreadableImage as error:
            logger.warning("left out: %s", error)
            continue
        answer = predictor(image)
        drawn = answer.draw(_readable(image))
        make_folder((Path(output) / picture).parent)
        write_atomically(Path(output) / picture, lambda file, drawn=drawn: drawn.save(file, "png"))
        told[str(path)] = {"picture": str(picture), **answer.told}
    if not told:
        raise UserError(f"none of {counted(len(files), 'image')} could be read; {files[0]} is the first")
    write_json(Path(output) / "predictions.json", {"checkpoint": str(checkpoint), "images": told})
    print(f"{counted(len(told), 'image')} in {output}")
    return told


def find_images(places: Sequence[str]) -> list[Path]:
    """Files, those in folders, and those that match a pattern, each once under whatever path it is given.

    Raises UserError for a place where there are none.
    """
    found: list[Path] = []
    for place in places:
        kind, left_out = what_is(place), LeftOut()
        if kind == "folder":
            here = [Path(path) for path in image_files(place, left_out)]
        else:
            here = [Path(place)] if kind else sorted(map(Path, glob(place, recursive=True)))
        if not here:
            beside = f" (left out: {left_out})" if left_out else ""
            raise UserError(f"there is no image at '{printable(place)}'{beside}; give files, folders or patterns")
        found += here
    first: dict[Path, Path] = {}
    for path in found:
        first.setdefault(path.parent.resolve() / path.name, path)
    return list(first.values())


def config_of(checkpoint: Checkpoint, cfg: str | None) -> CfgNode:
    """The config of a run's checkpoint, of `cfg`, or what a released file's weights tell.

    Raises UserError where none of them does.
    """
    if cfg is not None:
        return get_config(cfg)
    if checkpoint.config.get("MODEL"):
        return restored(checkpoint.config)
    for models in (detection_models, segmentation_models):
        if models.HEAD in checkpoint.whole:
            return models.config_of(checkpoint)
    head = checkpoint.state_dict.get("classifier.head.weight")
    if head is None:
        raise UserError(f"'{checkpoint.path}' holds neither a config nor a head that is known; give --cfg")
    name = variant_of(checkpoint.whole, checkpoint.path)
    return get_config(None, ["MODEL.NAME", name, "MODEL.NUM_CLASSES", len(head)])


def _read_names(path: str, config: CfgNode) -> list[str]:
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if len(names) != config.MODEL.NUM_CLASSES:
        raise UserError(f"'{path}' names {len(names)} classes, and the model has {config.MODEL.NUM_CLASSES}")
    return names


def _picture_names(files: Sequence[Path]) -> list[Path]:
    """A name for each picture: the image's, with what tells it from others of that name: its folders, its suffix, and
    where those do not, since x_b.png may lie beside x/b.png, a number."""
    whole = [path.parent.resolve() / path.name for path in files]
    folder = os.path.commonpath([path.parent for path in whole])
    places = ["_".join(path.relative_to(folder).parts) for path in whole]
    for names in ([path.stem for path in files], [os.path.splitext(place)[0] for place in places], places):
        if len({name.casefold() for name in names}) == len(names):
            return [Path(f"{name}.png") for name in names]
    return [Path(f"{number}_{name}.png") for number, name in enumerate(places)]


def _readable(image: Image.Image) -> Image.Image:
    """`image` with its long side between `_LEAST` and `_MOST` pixels."""
    long = max(image.size)
    scale = max(1.0, _LEAST / long) * min(1.0, _MOST / long)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------------------------ the tasks


def classifier(
    config: CfgNode, model: nn.Module, device: torch.device, names: Sequence[str], score: float
) -> Predictor:
    transform = build_transform(config, training=False)

    @torch.no_grad()
    def answer(image: Image.Image) -> Answer:
        if config.MODEL.IN_CHANS == 1:
            image = image.convert("L")
        chances = model(transform(image)[None].to(device)).float().softmax(1)[0]
        best = chances.topk(min(5, len(chances)))
        top = [
            {"class": label, "name": names[label], "probability": chance}
            for chance, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        lines = [f"{each['name']}  {each['probability']:.1%}" for each in top]
        return Answer({"top": top}, lambda picture: beside(picture, lines))

    return answer


def detector(config: CfgNode, model: nn.Module, device: torch.device, names: Sequence[str], score: float) -> Predictor:
    transform, collate = Transform(config, training=False), Collate(config.DATA.DIVISOR)
    numbers = range(len(names))

    @torch.no_grad()
    def answer(image: Image.Image) -> Answer:
        batch = collate([transform(without_objects(image, 0))])
        (found,) = model(batch["images"].to(device), batch["image_sizes"], output_sizes=batch["original_sizes"])
        objects = as_results(0, found, numbers)
        for each in objects:
            del each["image_id"]
            each["name"] = names[each["category_id"]]
        seen = {name: values[found["scores"] >= score].cpu() for name, values in found.items()}
        shown = zip(seen["labels"].tolist(), seen["scores"].tolist(), strict=True)
        labels = [f"{names[label]} {chance:.0%}" for label, chance in shown]
        return Answer({"objects": objects}, lambda picture: _objects(picture, image.size, seen, labels))

    return answer


def segmenter(config: CfgNode, model: nn.Module, device: torch.device, names: Sequence[str], score: float) -> Predictor:
    transform, inference = EvalTransform(config), Inference(config)

    @torch.no_grad()
    def answer(image: Image.Image) -> Answer:
        empty = np.zeros((image.height, image.width), np.uint8)
        images, *_ = transform(Sample(image, empty, ""))
        classes = inference(model, [each.to(device) for each in images], empty.shape).cpu()
        counts = torch.bincount(classes.flatten().long(), minlength=len(names))
        order = [label for label in counts.argsort(descending=True).tolist() if counts[label]]
        shares = {names[label]: counts[label].item() / classes.numel() for label in order}
        return Answer({"classes": shares}, lambda picture: _map(picture, classes, order, names))

    return answer


_PREDICTORS = {"classification": classifier, "detection": detector, "segmentation": segmenter}


# ------------------------------------------------------------------------------------------------ the pictures


def colour(number: int) -> tuple[int, int, int]:
    """Of a class or an object; neighbours in number are far apart in hue."""
    red, green, blue, _ = matplotlib.colormaps["hsv"](number * 0.381966 % 1, bytes=True)
    return int(red), int(green), int(blue)


def _font(picture: Image.Image) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), max(12, round(max(picture.size) / 45)))


def beside(
    picture: Image.Image, lines: Sequence[str], colours: Sequence[tuple[int, int, int]] | None = None
) -> Image.Image:
    """`picture` with lines of text at its right, each behind a square of its colour where there are such."""
    font = _font(picture)
    step = round(1.5 * font.size)
    indent = step if colours else 0
    width = round(max((font.getlength(line) for line in lines), default=0)) + indent + step
    height = max(picture.height, step * len(lines) + step // 2)
    whole = Image.new("RGB", (picture.width + width, height), "white")
    whole.paste(picture, (0, 0))
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        x, y = picture.width + step // 2, step // 4 + number * step
        if colours:
            draw.rectangle((x, y + step // 8, x + font.size, y + step // 8 + font.size), fill=colours[number])
        draw.text((x + indent, y), line, fill="black", font=font)
    return whole


def _objects(
    picture: Image.Image, size: tuple[int, int], seen: dict[str, Tensor], labels: Sequence[str]
) -> Image.Image:
    """Boxes, masks and labels, the best on top; `size` is what they are in."""
    if not labels:
        return beside(picture, ["nothing found"])
    picture, font = picture.copy(), _font(picture)
    draw, pad = ImageDraw.Draw(picture), font.size // 4
    scale = [picture.width / size[0], picture.height / size[1]] * 2
    for number in reversed(range(len(labels))):
        of_it, mask = colour(number), seen["masks"][number].numpy()
        shade = Image.fromarray(mask.astype(np.uint8) * 140).resize(picture.size, Image.Resampling.NEAREST)
        picture.paste(of_it, (0, 0, *picture.size), shade)
    for number in reversed(range(len(labels))):
        left, top, right, bottom = (side * by for side, by in zip(seen["boxes"][number].tolist(), scale, strict=True))
        draw.rectangle((left, top, right, bottom), outline=colour(number), width=max(1, font.size // 8))
        width, height = font.getlength(labels[number]) + 2 * pad, font.size + 2 * pad
        left = max(0, min(left, picture.width - width))
        top = top - height if top >= height else min(bottom, picture.height - height)
        draw.rectangle((left, top, left + width, top + height), fill=colour(number))
        light = sum(colour(number)) > 380
        draw.text((left + pad, top + pad), labels[number], fill="black" if light else "white", font=font)
    return picture


def _map(picture: Image.Image, classes: Tensor, order: Sequence[int], names: Sequence[str]) -> Image.Image:
    colours = np.array([colour(label) for label in range(len(names))], np.uint8)
    painted = Image.fromarray(colours[classes.numpy()]).resize(picture.size, Image.Resampling.NEAREST)
    both = Image.blend(picture, painted, 0.55)
    shown = list(order[:_LEGEND])
    lines = [names[label] for label in shown]
    if len(order) > _LEGEND:
        lines.append(f"and {some([names[label] for label in order[_LEGEND:]])}")
        shown.append(order[_LEGEND])
    return beside(both, lines, [tuple(colours[label].tolist()) for label in shown])
