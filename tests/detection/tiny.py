"""A run that takes a second: a detector of a few thousand parameters on drawn shapes in COCO's form."""

import json
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as run_lengths

from vmamba.config import get_config
from vmamba.detection.data import build_eval_loader, build_train_loader
from vmamba.detection.datasets import open_dataset

from ..classification.tiny import ROOT

TRAINING, HELD_OUT = 8, 5
CATEGORIES = ((3, "disc"), (7, "bar"), (20, "ring"))  # with gaps, as COCO's
TINY = {
    "TASK": "detection",
    "SEED": 3,
    "DEVICE": "cpu",
    "PRINT_FREQ": 1,
    "AMP": {"ENABLE": False},
    "DATA": {"BATCH_SIZE": 2, "SCALE": [48, 64], "LEAST_SIDE": 8, "NUM_WORKERS": 0},
    "MODEL": {
        "NAME": "vmamba_nano",
        "NUM_CLASSES": len(CATEGORIES),
        "DROP_PATH_RATE": 0.2,
        "OPTIONS": {"depths": [1, 1, 1, 1], "dims": 8},
        **{"CHANNELS": 8, "HIDDEN": 16, "RPN_SAMPLES": 16, "SAMPLES": 16, "PROPOSALS": [20, 20]},
    },
    "TRAIN": {"EPOCHS": 2, "WARMUP_EPOCHS": 1, "BASE_LR": 0.1, "EMA": {"ENABLE": True, "DECAY": 0.9}},
    "TEST": {"SCORE": 0.0, "MOST": 10},
}
SPLITS = {"train": ("train2017", "annotations/instances_train2017.json", TRAINING)}
SPLITS["val"] = ("val2017", "annotations/instances_val2017.json", HELD_OUT)


def tiny_config(folder, *opts):
    return get_config(tiny_file(folder), ["OUTPUT", str(folder), *map(str, opts)])


def tiny_file(folder):
    """The config file in `folder`, made with its images when first asked for."""
    path = Path(folder, "tiny.yaml")
    if not path.exists():
        make_images(Path(folder, "data"))
        path.write_text(yaml.safe_dump(TINY | {"DATA": TINY["DATA"] | {"DATA_PATH": str(Path(folder, "data"))}}))
    return path


def make_images(folder):
    """The same images wherever they are made: upright and wide, the last of each split without an object, and in the
    first a crowd; masks of all three forms."""
    random = np.random.default_rng(0)
    for images, file, count in SPLITS.values():
        (folder / images).mkdir(parents=True)
        (folder / file).parent.mkdir(exist_ok=True)
        content = {"images": [], "annotations": [], "categories": [{"id": n, "name": name} for n, name in CATEGORIES]}
        for number in range(count):
            size = (40, 60) if number % 2 else (64, 40)  # height, width
            pixels = random.integers(0, 90, (*size, 3), np.uint8)
            name = f"{number:03}.png"
            content["images"].append({"id": 100 + number, "file_name": name, "height": size[0], "width": size[1]})
            for which in range(0 if number == count - 1 else random.integers(1, 4)):
                mask = shape(random, size)
                pixels[mask] = random.integers(120, 256, 3)
                crowd = number == 0 and which == 0
                entry = annotation(mask, len(content["annotations"]), crowd=crowd) | {"image_id": 100 + number}
                content["annotations"].append(entry | {"category_id": CATEGORIES[random.integers(3)][0]})
            if number == 0:  # that is not only a crowd
                entry = annotation(shape(random, size), len(content["annotations"]))
                content["annotations"].append(entry | {"image_id": 100, "category_id": 7})
            Image.fromarray(pixels).save(folder / images / name)
        (folder / file).write_text(json.dumps(content))


def shape(random, size):
    """(H, W) bool: an ellipse."""
    radii = random.uniform(6, 12, 2)
    centre = [random.uniform(8, side - 8) for side in size]
    grid = np.ogrid[: size[0], : size[1]]
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) <= 1


def annotation(mask, number, crowd=False):
    """Its mask as polygons, run lengths or text, in turn; the box is the mask's."""
    text = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
    if number % 3 == 0 and not crowd:
        rows = np.flatnonzero(mask.any(1))
        ends = [(row, *np.flatnonzero(mask[row])[[0, -1]]) for row in rows]
        outline = [(left, row + 0.5) for row, left, _ in ends] + [
            (right + 1, row + 0.5) for row, _, right in ends[::-1]
        ]
        segmentation = [[float(value) for point in outline for value in point]]
    elif number % 3 == 1 or crowd:
        flat = mask.T.reshape(-1)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(int)])))
        segmentation = {"size": [*mask.shape], "counts": np.diff([0, *edges, flat.size]).tolist()}
    else:
        segmentation = {"size": [*mask.shape], "counts": text["counts"].decode()}
    box = run_lengths.toBbox(text).tolist()
    return {"id": number, "bbox": box, "area": int(mask.sum()), "iscrowd": int(crowd), "segmentation": segmentation}


def read(folder, split="train"):
    return json.loads(Path(folder, "data", SPLITS[split][1]).read_text())


def train_loader(config, rank=0, world_size=1):
    return build_train_loader(config, open_dataset(config, False), rank=rank, world_size=world_size)


def eval_loader(config, rank=0, world_size=1):
    return build_eval_loader(config, open_dataset(config, False), rank=rank, world_size=world_size)


def command(folder, *arguments):
    """The command line of a run in `folder`, without a launcher."""
    return [sys.executable, str(ROOT / "main.py"), "--cfg", str(tiny_file(folder)), "--output", str(folder), *arguments]
