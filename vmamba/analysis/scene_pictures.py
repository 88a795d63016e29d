"""What a detector and a segmenter trained on scenes of digits see in scenes held out, beside what is there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.patches import Patch
from PIL import Image
from torch import nn
from yacs.config import CfgNode

from vmamba.analysis.drawing import BACKGROUND, colour, draw_objects, paint
from vmamba.analysis.plotting import STYLE, new_figure, save_figure
from vmamba.analysis.prediction import open_predictor, readable
from vmamba.analysis.tables import check_json, parameters, write_json
from vmamba.data.scenes import CLASSES, scene
from vmamba.errors import UserError
from vmamba.segmentation.datasets import open_dataset
from vmamba.text import counted, printable

NAMES = (BACKGROUND, *CLASSES)  # of a segmenter's classes


def scene_pictures(
    *,
    detector: str = "output/scenes_detection/default/best.pth",
    segmenter: str = "output/scenes_segmentation/default/best.pth",
    scenes: Sequence[int] = (0, 1, 2, 3),
    score: float = 0.5,
    weights: str = "auto",
    device: str = "auto",
    output: str = "output/scenes",
) -> dict[str, Any]:
    """Draw both models' predictions of held-out scenes, and write scenes.{pdf,png,json} into `output`.

    Args:
        detector, segmenter: checkpoints of runs of configs/scenes_detection.yaml and scenes_segmentation.yaml.
        scenes: their numbers among those held out.  Those of the two differ, in size and in how many digits they show.
        score: least score of a detection that is drawn; the JSON has all.
        weights: as of `vmamba.load_checkpoint`.

    Returns what is written as JSON.  Raises UserError for a checkpoint of another task or of other data.
    """
    check_json(Path(output, "scenes.json"), "detection", "segmentation")
    models = {}
    for task, checkpoint in (("detection", detector), ("segmentation", segmenter)):
        models[task] = open_predictor(checkpoint, score=score, weights=weights, device=device)
        config = models[task].model.config
        trained, data = config.TASK, config.DATA.DATASET
        if trained != task or data != "scenes":
            raise UserError(
                f"'{printable(checkpoint)}' is of a run of {trained} on {data}; give one of configs/scenes_{task}.yaml"
            )
    told: dict[str, Any] = {}
    rows: list[tuple[str, list[Image.Image]]] = []
    for task, opened in models.items():
        truths = [_TRUTHS[task](opened.model.config, number) for number in scenes]
        answers = [opened.answer(image) for image, _ in truths]
        told[task] = {number: answer.told for number, answer in zip(scenes, answers, strict=True)}
        seen = [answer.draw(readable(image)) for answer, (image, _) in zip(answers, truths, strict=True)]
        rows += [(_describe(opened.model), seen), ("what is there", [draw(readable(image)) for image, draw in truths])]
    plot(rows, scenes, Path(output) / "scenes")
    write_json(Path(output) / "scenes.json", told)
    print(f"written to {output}")
    return told


def _objects(config: CfgNode, number: int) -> tuple[Image.Image, Callable[[Image.Image], Image.Image]]:
    """Of a held-out scene the image, and what draws the truth on it."""
    made = scene(number, training=False, side=config.DATA.SCENE_SIDE)
    boxes, masks, labels = made.boxes(), torch.from_numpy(made.masks), [CLASSES[label] for label in made.labels]

    def draw(picture: Image.Image) -> Image.Image:
        scale = [picture.width / made.image.width, picture.height / made.image.height] * 2
        return draw_objects(picture, (boxes * scale).tolist(), masks.__getitem__, labels)

    return made.image, draw


def _classes(config: CfgNode, number: int) -> tuple[Image.Image, Callable[[Image.Image], Image.Image]]:
    sample = open_dataset(config, training=False).load(number)
    return sample.image, lambda picture: paint(picture, torch.from_numpy(sample.classes), NAMES)


_TRUTHS = {"detection": _objects, "segmentation": _classes}


def _describe(model: nn.Module) -> str:
    config = model.config
    head = config.MODEL.DETECTOR if config.TASK == "detection" else config.MODEL.SEGMENTER
    size = parameters(sum(weight.numel() for weight in model.parameters()))
    return f"{head} on {config.MODEL.NAME},\n{size},\ntrained on {counted(config.DATA.SCENES[0], 'scene')}"


def plot(rows: Sequence[tuple[str, Sequence[Image.Image]]], scenes: Sequence[int], path: Path) -> None:
    """A row of pictures with what it shows at its left, a column a scene; below what the colours of maps mean."""
    with rc_context(STYLE | {"font.size": 8, "axes.titlesize": 8}):
        figure = new_figure(1.9 * len(scenes) + 0.3, 1.9 * len(rows) + 0.6)
        grid = figure.subplots(len(rows), len(scenes), squeeze=False)
        for row, (label, pictures) in enumerate(rows):
            grid[row, 0].set_ylabel(label)
            for axes, picture, number in zip(grid[row], pictures, scenes, strict=True):
                axes.imshow(picture)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if row % 2 == 0:  # the truth is below
                    axes.set_title(f"held-out scene {number}")
        handles = [
            Patch(color=[part / 255 for part in colour(label)], label=name)
            for label, name in enumerate(NAMES)
            if name != BACKGROUND
        ]
        title = "digits in the segmenter's maps"
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1, title=title)
        save_figure(figure, path, dpi=150)
