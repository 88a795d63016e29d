"""A run that takes a second: a UperNet of few parameters on blocks of colour in noise, three steps an epoch."""

import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from vmamba.config import get_config

from ..classification.tiny import ALONE, ROOT, differences, log, metrics, saved

__all__ = ["ALONE", "ROOT", "differences", "log", "metrics", "saved"]

CLASSES, TRAINING, HELD_OUT = 5, 12, 6
TINY = {
    "TASK": "segmentation",
    "SEED": 3,
    "DEVICE": "cpu",
    "PRINT_FREQ": 1,
    "AMP": {"ENABLE": False},
    "DATA": {"DATASET": "folders", "BATCH_SIZE": 4, "CROP_SIZE": 32, "SCALE": [32, 64], "NUM_WORKERS": 0},
    "MODEL": {
        "NAME": "vmamba_nano",
        "NUM_CLASSES": CLASSES,
        "CHANNELS": 8,
        "AUX_CHANNELS": 4,
        "DROP_PATH_RATE": 0.1,
        "OPTIONS": {"depths": [1, 1, 1, 1], "dims": 4},
    },
    "TRAIN": {"EPOCHS": 2, "WARMUP_EPOCHS": 1, "BASE_LR": 0.01, "LR_REFERENCE_BATCH": 4},
}


def tiny_config(folder, *opts):
    return get_config(tiny_file(folder), ["OUTPUT", str(folder), *map(str, opts)])


def tiny_file(folder):
    """The config file in `folder`, made with its images when first asked for."""
    path = Path(folder, "tiny.yaml")
    if not path.exists():
        make_images(Path(folder, "images"))
        data = TINY["DATA"] | {"DATA_PATH": str(Path(folder, "images"))}
        path.write_text(yaml.safe_dump(TINY | {"DATA": data}))
    return path


def make_images(folder):
    """The same images wherever they are made: gray noise, with blocks of the classes 1 to 4 and of what does not count.

    Each name is in two folders.
    """
    random = np.random.default_rng(0)
    for split, images in (("training", TRAINING), ("validation", HELD_OUT)):
        for number in range(images):
            height, width = (40, 36) if number % 2 else (36, 44)
            image = random.integers(0, 128, (height, width, 3), np.uint8)
            classes = np.zeros((height, width), np.uint8)
            for label in (*(random.permutation(CLASSES - 1)[:2] + 1), 255):
                y, x = random.integers(0, height - 16), random.integers(0, width - 16)
                classes[y : y + 14, x : x + 14] = label
                image[y : y + 14, x : x + 14] += np.uint8(label % 5 * 30)
            write(folder, split, f"{number % 2}/{number // 2:02}", image, classes)


def write(folder, split, name, image=None, classes=None):
    """Of a pair of image and map, given as arrays, what is given."""
    for kind, array in (("images", image), ("annotations", classes)):
        if array is not None:
            path = Path(folder, kind, split, f"{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


def command(folder, *arguments, door="main.py"):
    """The command line of a run in `folder`, without a launcher."""
    return [sys.executable, str(ROOT / door), "--cfg", str(tiny_file(folder)), "--output", str(folder), *arguments]
