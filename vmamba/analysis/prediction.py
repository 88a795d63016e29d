"""What a checkpoint of any task says of images: classes, boxes and masks, or a map, as JSON and as pictures."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from yacs.config import CfgNode

from vmamba.analysis.classes import category_numbers, class_names
from vmamba.analysis.drawing import beside, draw_objects, legend, paint
from vmamba.analysis.tables import read_json, write_json
from vmamba.analysis.zoo import choose_device
from vmamba.classification.transforms import build_transform
from vmamba.config import get_config, restored
from vmamba.data.folders import LeftOut, image_files, what_is
from vmamba.data.images import COLOURS, UnreadableImage, decode, open_image
from vmamba.detection import models as detection_models
from vmamba.detection.datasets import without_objects
from vmamba.detection.evaluation import as_results
from vmamba.detection.transforms import Collate, Transform
from vmamba.errors import UserError
from vmamba.files import check_keeps, check_replaces, make_folder, read_text, write_atomically
from vmamba.models.download import is_url
from vmamba.models.formats import PLAIN, as_one_file
from vmamba.models.pretrained import Checkpoint, channels_of, open_checkpoint
from vmamba.models.vssm import VSSM
from vmamba.models.whole import shape_of, variant_of
from vmamba.runtime.checkpoint import BEST, LAST, SHARDED
from vmamba.runtime.task import open_task
from vmamba.segmentation import models as segmentation_models
from vmamba.segmentation.datasets import Sample
from vmamba.segmentation.evaluation import Inference, OfOneSize
from vmamba.segmentation.transforms import EvalTransform
from vmamba.text import counted, printable, some

logger = logging.getLogger("vmamba")
Given = str | Path | Image.Image | np.ndarray
_OF_FILES = (str, os.PathLike, bytes)
_LEAST, _MOST = 256, 2048  # long sides that a picture is scaled to where its image is smaller or larger
_MARK = ("Software", "vmamba predict")  # in a picture's text, by which another command knows it for one of its own
_SHORT = 128  # the least short side, which has place for some labels


@dataclass(frozen=True)
class Answer:
    """Of one image."""

    told: dict[str, Any]  # for JSON
    draw: Callable[[Image.Image], Image.Image]  # on the image, scaled to be readable
    legend: Sequence[str] = ()  # lines to be set beside it
    colours: Sequence[tuple[int, int, int] | None] = ()  # a line's, where they have any


Predictor = Callable[[Image.Image], Answer]
AsWeights = Callable[[Tensor], Tensor]  # images -> on the device and in the dtype of the model's weights


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
    from 0.  Raises UserError without any image, for a checkpoint that cannot be read, and where a picture or
    `predictions.json` would be written over what is read, or over what is not of this function; an image that cannot be
    read is named in the log and left out.
    """
    files = find_images(images)
    pictures = _picture_names(files)
    read = [*files, *filter(None, [checkpoint, cfg, names])]
    places, table = [Path(output) / picture for picture in pictures], Path(output) / "predictions.json"
    check_keeps(read, *places, table)
    for place in places:
        check_replaces(place, _is_picture, "picture of a prediction")
    check_replaces(table, lambda path: {"checkpoint", "images"} == read_json(path).keys(), "table of predictions")
    opened = open_predictor(checkpoint, cfg=cfg, names=names, score=score, weights=weights, device=device)
    channels, predictor = _channels(opened.model.config), opened.answer
    if channels != 3:
        raise UserError(
            f"'{checkpoint}' is of images of {channels} channels, which no picture shows; use vmamba.predict"
        )
    marked = PngInfo()
    marked.add_text(*_MARK)
    told: dict[str, Any] = {}
    for path, place in zip(files, places, strict=True):
        try:
            image = decode(path, 3, path)
        except UnreadableImage as error:
            logger.warning("left out: %s", error)
            continue
        answer = predictor(image)
        drawn = answer.draw(readable(image))
        if answer.legend:
            drawn = beside(drawn, answer.legend, answer.colours)
        make_folder(place.parent)
        write_atomically(place, lambda file, drawn=drawn: drawn.save(file, "png", pnginfo=marked))
        told[str(path)] = {"picture": place.name, **answer.told}
    if not told:
        raise UserError(f"none of {counted(len(files), 'image')} could be read; {files[0]} is the first")
    write_json(table, {"checkpoint": str(checkpoint), "images": told})
    print(f"{counted(len(told), 'image')} in {output}")
    return told


def _is_picture(path: Path) -> bool:
    name, text = _MARK
    with open_image(path) as picture:
        return picture.info.get(name) == text


@dataclass(frozen=True)
class Opened:
    """A checkpoint's model, as `load_model` gives it, ready for images."""

    model: nn.Module
    answer: Predictor


def open_predictor(
    checkpoint: str,
    *,
    cfg: str | None = None,
    names: str | None = None,
    score: float = 0.5,
    weights: str = "auto",
    device: str = "auto",
) -> Opened:
    """The arguments are those of `predict`.  Raises UserError for a checkpoint that cannot be read."""
    model = load_model(checkpoint, cfg=cfg, names=names, weights=weights).to(choose_device(device))
    return Opened(model, _predictor(model, score))


def load_model(
    checkpoint: str | Path,
    *,
    cfg: str | None = None,
    names: str | Path | Sequence[str] | None = None,
    weights: str = "auto",
) -> nn.Module:
    """The model of a checkpoint of any task, in eval mode, with its `config` and the `class_names` of its data.

    Args:
        checkpoint: of a run, or its folder (then its best), a released file, or one of `vmamba.export` with bare
            weights; an address is downloaded.
        cfg, weights: as of `predict`.
        names: a list with the name of each class, or a file as of `predict`.

    Raises UserError for a checkpoint that cannot be read, a folder without one, and names that are not one a class.
    """
    found = open_checkpoint(file_of(checkpoint), weights)
    config = config_of(found, cfg)
    task = open_task(config)
    model = task.build_model()
    task.load(model, found)
    told = list(found.classes) if len(found.classes) == config.MODEL.NUM_CLASSES else class_names(config)
    if config.DATA.DATA_PATH and names is None and not found.classes:  # of an earlier version, or of another program
        logger.warning(
            f"'{printable(found.path)}' does not tell what its classes are called, and they are taken as {some(told)}; "
            f"a file with a name in each line says others (--names FILE, names=)"
        )
    model.config, model.class_names = config, told if names is None else _names_of(names, config)
    if config.TASK == "detection":
        model.category_numbers = category_numbers(config, told)  # which other names by --names change nothing of
    return model.eval()


def file_of(checkpoint: str | Path) -> str | Path:
    """`checkpoint`, or in a run's folder its best.  Raises UserError for a folder without one, or in shares."""
    named = isinstance(checkpoint, (str, os.PathLike))
    if not named or is_url(str(checkpoint)) or what_is(checkpoint) != "folder":
        return checkpoint
    kept = [Path(checkpoint, name) for name in (BEST, LAST) if what_is(Path(checkpoint, name)) == "file"]
    if not kept:
        for shares in (Path(checkpoint), *(Path(checkpoint, name).with_suffix(SHARDED) for name in (BEST, LAST))):
            if what_is(shares / PLAIN) == "file":
                raise UserError(as_one_file(shares))
        raise UserError(f"'{printable(checkpoint)}' has neither {BEST} nor {LAST}; name the folder of a run, or a file")
    return kept[0]


def predict_images(
    model: nn.Module | str | Path,
    images: Sequence[Given] | Given,
    score: float = 0.0,
) -> list[dict[str, Any]]:
    """What a model says of each image, as `predict` writes it.

    Args:
        model: as `load_model` gives it, on any device, or `load_program`; or what the first takes.
        images: of Pillow, files (paths or open ones), or NumPy's arrays (H, W, channels) of uint8, of RGB, RGBA or gray
            ones, or as many channels as the model takes; one or several.
        score: least score of a detection.

    A model that trains is asked in eval mode, and trains on.

    Raises UserError for a model that does not tell what its images are like, or whose `class_names` are not one for
    each class, and an image that cannot be read.
    """
    model = model if isinstance(model, nn.Module) else load_model(model)
    if not isinstance(getattr(model, "config", None), CfgNode):
        unknown = f"this {type(model).__name__} does not tell what its images and classes are"
        raise UserError(getattr(model, "tells_nothing", f"{unknown}; take it from vmamba.load_model"))
    given = [images] if _is_one(images) else list(images)
    channels, answer = _channels(model.config), _predictor(model, score)
    with _in_eval_mode(model):
        told = [
            answer(_read(image, channels, f"image {number} of {len(given)}")).told
            for number, image in enumerate(given, 1)
        ]
    for each in told:
        if "objects" in each:
            each["objects"] = [found for found in each["objects"] if found["score"] >= score]
    return told


def _is_one(images: Any) -> bool:
    """Whether it is to be read as an image, though Python may go through it: an open file gives its lines."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return (
        isinstance(images, (*_OF_FILES, Image.Image, Tensor, Mapping))
        or hasattr(images, "read")
        or not isinstance(images, Iterable)
    )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Each part has its own mode again afterwards, since frozen ones stay in eval mode while others train."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _read(image: Given, channels: int, name: str) -> Image.Image | Tensor:
    """See `decode`; what is no file stands in sentences by its `name`.  Raises UserError."""
    if not isinstance(image, (*_OF_FILES, Image.Image, np.ndarray)) and not hasattr(image, "read"):
        kind = type(image).__name__
        told = f"a {kind}" if isinstance(image, Tensor) else f"{printable(repr(image)):.40} ({kind})"
        raise UserError(
            f"{name} is {told}; give an image of Pillow, a file's path, or an array of NumPy (H, W, channels) of uint8"
        )
    path = isinstance(image, (str, os.PathLike))
    try:
        return decode(Path(image) if path else image, channels, image if path else name)
    except UnreadableImage as error:
        raise UserError(str(error)) from error


def image_transform(model: nn.Module) -> Callable[[Given], Tensor]:
    """What makes of an image, as `vmamba.predict` takes it, what a classifier takes: (C, H, W) float32.

    Args:
        model: of `load_model`, whose config says it; of timm, whose settings say it; or another of ours, which is taken
            for one of ImageNet's, of images of 224 pixels.

    Raises UserError for a model that is no classifier or does not tell, and for one of timm whose settings are of
    another number of channels; what is returned, for an image that cannot be read.
    """
    config = getattr(model, "config", None)
    if isinstance(config, CfgNode) and config.TASK != "classification":
        raise UserError(f"this model is of {config.TASK}, whose images come in many sizes; vmamba.predict takes them")
    if isinstance(config, CfgNode):
        channels, transform = _channels(config), build_transform(config, training=False)
        gray = config.MODEL.IN_CHANS == 1
    elif getattr(model, "pretrained_cfg", None):
        channels, gray = 3, channels_of(model) == 1
        transform = _timms_transform(model)
    elif isinstance(model, VSSM) and model.in_chans == 3:
        channels, gray, transform = 3, False, build_transform(get_config(), training=False)
    else:
        unknown = f"this {type(model).__name__} does not tell how its images are normalised"
        raise UserError(getattr(model, "tells_nothing", f"{unknown}; take it from vmamba.load_model"))

    def apply(image: Given) -> Tensor:
        pixels = _read(image, channels, "the image")
        return transform(pixels.convert("L") if gray else pixels)

    return apply


def _timms_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """Raises UserError where the settings are of another number of channels: timm keeps them whatever it builds."""
    told, channels = resolve_data_config({}, model=model), channels_of(model)
    takes = f"this {type(model).__name__} takes images of {counted(channels, 'channel')}, and"
    if not channels == told["input_size"][0] == len(told["mean"]) == len(told["std"]):
        raise UserError(
            f"{takes} its settings of timm tell how those of {len(told['mean'])} are normalised; give "
            f"timm.create_model pretrained_cfg_overlay=dict(input_size=({channels}, height, width), mean=..., std=...)"
        )
    if channels not in COLOURS:
        raise UserError(f"{takes} timm's transforms are of 1 and 3; normalise such images by a function of your own")
    return create_transform(**told)


def _channels(config: CfgNode) -> int:
    """What an image is decoded to; of a model of gray ones it is for showing in colour as well."""
    return 3 if config.MODEL.IN_CHANS in COLOURS else config.MODEL.IN_CHANS


def _predictor(model: nn.Module, score: float) -> Predictor:
    of_a_program = torch.empty(0)  # which has none
    weight = next((weight for weight in model.parameters() if weight.is_floating_point()), of_a_program)

    def as_weights(images: Tensor) -> Tensor:
        return images.to(weight.device, weight.dtype)

    task, names = model.config.TASK, getattr(model, "class_names", None)
    _check_names(model, names, getattr(model, "num_classes", model.config.MODEL.NUM_CLASSES))
    return _PREDICTORS[task](model.config, model, as_weights, names, score)


def _check_names(model: nn.Module, names: Any, classes: int) -> None:
    """Raises UserError for what is not a list with a name for each class that the model says."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        found = f"is {names!r:.60}"
    elif len(names) == classes or not classes:
        return
    else:
        found = f"of this {type(model).__name__} has {len(names)}"
    raise UserError(f"class_names {found}; set it to a list of {counted(classes, 'name')}, one a class")


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
        return restored(checkpoint.config, f"the config in '{checkpoint.path}'")
    for models in (detection_models, segmentation_models):
        if models.HEAD in checkpoint.whole:
            return models.config_of(checkpoint)
    head = "classifier.head.weight"
    if head not in checkpoint.state_dict:
        raise UserError(f"'{checkpoint.path}' holds neither a config nor a head that is known; give --cfg")
    classes, _ = shape_of(checkpoint.state_dict, head, 2, checkpoint.path)
    name = variant_of(checkpoint.whole, checkpoint.path)
    return get_config(None, ["MODEL.NAME", name, "MODEL.NUM_CLASSES", classes])


def _names_of(given: str | Path | Sequence[str], config: CfgNode) -> list[str]:
    """Of each line of a file, or as they are given.  Raises UserError for names that are not one a class."""
    if isinstance(given, (str, os.PathLike)):
        where, names = f"'{given}'", [line.strip() for line in read_text(given).splitlines() if line.strip()]
    elif isinstance(given, (list, tuple)) and all(isinstance(name, str) for name in given):
        where, names = "names", list(given)
    else:
        raise UserError(f"names is {given!r:.60}; give a list with the name of each class, or a file with one a line")
    if len(names) != config.MODEL.NUM_CLASSES:
        raise UserError(
            f"{where} names {counted(len(names), 'class', 'classes')}, and the model has {config.MODEL.NUM_CLASSES}"
        )
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


def readable(image: Image.Image) -> Image.Image:
    """`image` with its long side between `_LEAST` and `_MOST` pixels, and its short one at least `_SHORT`: what is
    thinner than the two allow is widened."""
    short, long = sorted(image.size)
    scale = min(max(1.0, _LEAST / long, _SHORT / short), _MOST / long)
    size = tuple(max(_SHORT, round(side * scale)) for side in image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------------------------ the tasks


def classifier(
    config: CfgNode, model: nn.Module, as_weights: AsWeights, names: Sequence[str], score: float
) -> Predictor:
    transform = build_transform(config, training=False)
    if getattr(model, "num_classes", len(names)) == 0:
        raise UserError(
            "this classifier has no classes (num_classes=0), so it says none; model(images) gives its features, and "
            "vmamba.build_transform(model) makes its images"
        )

    @torch.no_grad()
    def answer(image: Image.Image) -> Answer:
        if config.MODEL.IN_CHANS == 1:
            image = image.convert("L")
        chances = model(as_weights(transform(image)[None])).float().softmax(1)[0]
        _check_names(model, names, len(chances))  # the head may be another since
        best = chances.topk(min(5, len(chances)))
        top = [
            {"class": label, "name": names[label], "probability": chance}
            for chance, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        lines = [f"{each['name']}  {each['probability']:.1%}" for each in top]
        return Answer({"top": top}, lambda picture: picture, lines)

    return answer


def detector(config: CfgNode, model: nn.Module, as_weights: AsWeights, names: Sequence[str], score: float) -> Predictor:
    transform, collate = Transform(config, training=False), Collate(config.DATA.DIVISOR)
    numbers = getattr(model, "category_numbers", None) or category_numbers(config, names)

    @torch.no_grad()
    def answer(image: Image.Image) -> Answer:
        batch = collate([transform(without_objects(image, 0))])
        sizes = batch["original_sizes"]
        (found,) = model.detect(as_weights(batch["images"]), batch["image_sizes"], sizes)
        objects = as_results(0, found, model.masks(found, sizes[0]), numbers)
        for each, label in zip(objects, found["labels"].tolist(), strict=True):
            del each["image_id"]
            each |= {"class": label, "name": names[label]}
        seen = {name: values[found["scores"] >= score].cpu() for name, values in found.items()}
        shown = zip(seen["labels"].tolist(), seen["scores"].tolist(), strict=True)
        labels = [f"{names[label]} {chance:.0%}" for label, chance in shown]

        def draw(picture: Image.Image) -> Image.Image:
            scale = torch.tensor([picture.width / image.width, picture.height / image.height] * 2)
            boxes, logits = seen["boxes"] * scale, seen["mask_logits"]

            def mask(number: int) -> Tensor:
                only = {"boxes": boxes[number : number + 1], "mask_logits": logits[number : number + 1]}
                return next(model.masks(only, (picture.height, picture.width)))[0]

            return draw_objects(picture, boxes.tolist(), mask, labels)

        return Answer({"objects": objects}, draw, () if labels else ("nothing found",))

    return answer


def segmenter(
    config: CfgNode, model: nn.Module, as_weights: AsWeights, names: Sequence[str], score: float
) -> Predictor:
    transform, inference = EvalTransform(config), Inference(config)
    size = getattr(model, "size", None)  # of a program, which takes images of one alone
    run = OfOneSize(model, size) if size else model

    @torch.no_grad()
    def answer(image: Image.Image) -> Answer:
        empty = np.zeros((image.height, image.width), np.uint8)
        images, *_ = transform(Sample(image, empty, ""))
        classes = inference(run, [as_weights(each) for each in images], empty.shape).cpu()
        counts = torch.bincount(classes.flatten().long(), minlength=len(names))
        order = [label for label in counts.argsort(descending=True).tolist() if counts[label]]
        shares = [
            {"class": label, "name": names[label], "share": counts[label].item() / classes.numel()} for label in order
        ]
        return Answer({"classes": shares}, lambda picture: paint(picture, classes, names), *legend(order, names))

    return answer


_PREDICTORS = {"classification": classifier, "detection": detector, "segmentation": segmenter}
