"""A run that takes a second: a VMamba of a few thousand parameters on images of noise, three steps an epoch."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from vmamba.config import get_config, output_folder
from vmamba.runtime.checkpoint import read_checkpoint
from vmamba.runtime.records import read_metrics

ROOT = Path(__file__).parents[2]
CLASSES, TRAINING, HELD_OUT = 6, 30, 12
TINY = {
    "SEED": 3,
    "DEVICE": "cpu",
    "PRINT_FREQ": 1,
    "AMP": {"ENABLE": False},
    "DATA": {"DATASET": "imagenet", "BATCH_SIZE": 10, "IMG_SIZE": 16, "NUM_WORKERS": 0},
    "MODEL": {
        "NAME": "vmamba_digits",
        "NUM_CLASSES": CLASSES,
        "DROP_PATH_RATE": 0.2,
        "OPTIONS": {"depths": [1, 1], "dims": 8},
    },
    "TRAIN": {"EPOCHS": 2, "WARMUP_EPOCHS": 1, "BASE_LR": 0.1, "EMA": {"ENABLE": True, "DECAY": 0.9}},
    "AUG": {"AUTO_AUGMENT": None, "COLOR_JITTER": 0.0, "REPROB": 0.25, "MIXUP": 0.2, "CUTMIX": 0.5},
}
ALONE = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}  # for subprocess


def tiny_config(folder, *opts):
    return get_config(tiny_file(folder), ["OUTPUT", str(folder), *map(str, opts)])


def tiny_file(folder):
    """The config file in `folder`, made with its images when first asked for."""
    path = Path(folder, "tiny.yaml")
    if not path.exists():
        images = Path(folder, "images")
        _make_images(images)
        path.write_text(yaml.safe_dump(TINY | {"DATA": TINY["DATA"] | {"DATA_PATH": str(images)}}))
    return path


def _make_images(folder):
    """The same images of noise wherever they are made."""
    random = np.random.default_rng(0)
    for split, images in (("train", TRAINING), ("val", HELD_OUT)):
        for number in range(images):
            path = folder / split / f"class{number % CLASSES}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)).save(path)


def command(folder, *arguments, door="main.py"):
    """The command line of a run in `folder`, without a launcher."""
    return [sys.executable, str(ROOT / door), "--cfg", str(tiny_file(folder)), "--output", str(folder), *arguments]


def saved(config, name="last.pth"):
    return read_checkpoint(output_folder(config) / name)


def metrics(config):
    """The epochs' lines without what differs from run to run."""
    lines = read_metrics(output_folder(config) / "metrics.jsonl")
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "images_per_second", "memory_mb")}
        for line in lines
    ]


def log(config):
    return (output_folder(config) / "log.txt").read_text()


def differences(one, other, path=""):
    """Where two nested states differ, bit for bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path} keys"]
        return [place for key in one for place in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path} length"]
        pairs = enumerate(zip(one, other, strict=True))
        return [place for i, pair in pairs for place in differences(*pair, f"{path}[{i}]")]
    return [] if one == other else [path]
