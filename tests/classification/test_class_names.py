"""A checkpoint tells what its classes are called: what lies at its data's path later changes nothing."""

import logging
import shutil

import torch
from PIL import Image

import vmamba
from vmamba import extensions
from vmamba.analysis.averaging import average
from vmamba.analysis.classes import class_names
from vmamba.classification.class_maps import IMAGENET
from vmamba.classification.datasets import open_dataset
from vmamba.config import get_config, output_folder
from vmamba.runtime.trainer import run

from .test_datasets import make_archives
from .test_tars import folders
from .tiny import log, tiny_config

ANIMALS, INSECTS = ("cat", "dog", "émeu"), ("ant", "bee", "cow")
PICTURE = Image.new("RGB", (20, 24), "red")


def fill(folder, names):
    for name in names:
        for number in range(10):
            path = folder / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 24), (25 * number, 0, 0)).save(path)


def config(tmp_path, *opts):
    data = ("DATA.DATA_PATH", tmp_path / "data", "DATA.VAL_FRACTION", 0.2, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0)
    return tiny_config(tmp_path, "MODEL.NUM_CLASSES", 3, "AUG.MIXUP", 0, "AUG.CUTMIX", 0, *data, *opts)


def told(place):
    (answer,) = vmamba.predict(vmamba.load_model(place), PICTURE)
    return {each["class"]: each["name"] for each in answer["top"]}


def test_what_a_run_was_trained_on_names_its_classes(tmp_path, caplog, monkeypatch):
    fill(tmp_path / "data", ANIMALS)
    trained = config(tmp_path)
    run(trained)
    folder = output_folder(trained)
    shutil.rmtree(tmp_path / "data")
    assert told(folder) == told(folder / "last.pth") == dict(enumerate(ANIMALS))
    fill(tmp_path / "data", INSECTS)
    assert told(folder) == dict(enumerate(ANIMALS))

    average([folder / "best.pth", folder / "last.pth"], output=str(tmp_path / "mean.pth"))
    assert told(tmp_path / "mean.pth") == dict(enumerate(ANIMALS))
    warm = config(tmp_path, "TAG", "warm", "MODEL.PRETRAINED", folder / "best.pth")
    run(warm)  # the head is kept, and its classes are others here
    assert log(warm).count("best.pth' calls class 0 'cat', and here it is 'ant': is it of the same classes in") == 1
    assert told(output_folder(warm)) == dict(enumerate(INSECTS))
    new = config(tmp_path, "TAG", "new", "MODEL.PRETRAINED", folder / "best.pth", "MODEL.DROP_HEAD", True)
    run(new)
    assert "calls class" not in log(new) and told(output_folder(new)) == dict(enumerate(INSECTS))
    monkeypatch.setattr(logging.getLogger("vmamba"), "propagate", True)
    average([folder / "best.pth", output_folder(new) / "best.pth"], output=str(tmp_path / "both.pth"))
    assert "calls class 0 'ant', and here it is 'cat'" in caplog.text

    older = torch.load(folder / "best.pth", weights_only=True)
    del older["classes"]
    torch.save(older, tmp_path / "older.pth")
    caplog.clear()
    assert told(tmp_path / "older.pth") == dict(enumerate(INSECTS))  # nothing better is known of it
    assert "older.pth' does not tell what its classes are called, and they are taken as ant, bee, cow;" in caplog.text


def test_a_warm_start_and_a_resumed_run_keep_names_that_their_data_does_not_tell(tmp_path, monkeypatch):

    class Reds(list):
        classes = ("scarlet", "crimson", "ruby")

    samples = [(PICTURE, number % 3) for number in range(30)]
    monkeypatch.setitem(extensions.DATASETS, "reds", lambda config, training: Reds(samples))
    monkeypatch.setitem(extensions.DATASETS, "mute", lambda config, training: samples)
    named, mute = (
        config(tmp_path, "DATA.VAL_FRACTION", 0, "DATA.DATASET", name, "TAG", name) for name in ("reds", "mute")
    )
    run(named)
    monkeypatch.delitem(extensions.DATASETS, "reds")
    assert told(output_folder(named)) == dict(enumerate(Reds.classes))
    mute = config(
        tmp_path, "DATA.VAL_FRACTION", 0, "DATA.DATASET", "mute", "MODEL.PRETRAINED", output_folder(named) / "last.pth"
    )
    run(mute)
    run(config(tmp_path, "DATA.VAL_FRACTION", 0, "DATA.DATASET", "mute", "TRAIN.EPOCHS", 2))
    assert told(output_folder(mute)) == dict(enumerate(Reds.classes))

    monkeypatch.setitem(extensions.DATASETS, "reds", lambda config, training: Reds(samples))
    monkeypatch.setattr(Reds, "classes", ("navy", "azure", "teal"))
    again = config(tmp_path, "DATA.VAL_FRACTION", 0, "DATA.DATASET", "reds", "TAG", "reds", "TRAIN.EPOCHS", 2)
    run(again)
    assert log(again).count("last.pth' calls class 0 'scarlet', and here it is 'navy': is it of the same") == 1


def test_archives_and_files_of_labels_tell_names_too(tmp_path):
    def classes(*opts, count=2):
        options = get_config(None, ["DATA.DATA_PATH", str(tmp_path), "MODEL.NUM_CLASSES", count, *opts])
        return open_dataset(options, training=True, rank=0, on_machine=(0, 1)).classes

    make_archives(tmp_path)
    assert classes("DATA.ZIP_MODE", True) == ["n0", "n1"]
    lines = (tmp_path / "train_map.txt").read_text().replace("\t1", "\t0", 1)  # folders are no classes there
    (tmp_path / "train_map.txt").write_text(lines)
    assert classes("DATA.ZIP_MODE", True) == []
    folders(tmp_path)
    assert classes() == ["ant", "dog"]
    PICTURE.save(tmp_path / "1.png"), PICTURE.save(tmp_path / "2.png")
    (tmp_path / "train.csv").write_text("1.png,rose\n2.png,daisy\n")
    (tmp_path / "val.csv").write_text("1.png,rose\n")
    assert classes("DATA.TRAIN_LABELS", "train.csv", "DATA.VAL_LABELS", "val.csv") == ["daisy", "rose"]
    assert classes("DATA.DATASET", "digits", count=10) == [*"0123456789"]


def test_a_thousand_classes_are_imagenets_where_the_data_says_so(tmp_path):
    def named(*opts):
        return class_names(get_config(None, ["MODEL.NUM_CLASSES", 1000, *opts]))[0]

    assert named() == "tench"  # of released weights
    path = ["DATA.DATA_PATH", str(tmp_path)]
    assert named(*path) == "class 0"
    for number in range(1000):
        (tmp_path / "train" / f"herb {number:03}").mkdir(parents=True)
    assert named(*path) == "herb 000"
    shutil.rmtree(tmp_path / "train")
    for name in IMAGENET:
        (tmp_path / "train" / name).mkdir(parents=True)
    assert named(*path) == "tench"
    own = ["TASK", "segmentation", "MODEL.NUM_CLASSES", 150]
    assert class_names(get_config(None, own))[0] == "wall"  # ADE20K's
    assert class_names(get_config(None, [*own, "DATA.DATASET", "folders"]))[0] == "class 0"
