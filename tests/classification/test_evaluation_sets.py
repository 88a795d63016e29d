"""Evaluating on data sets of ImageNet's kind: folders by a map of classes, ReaL labels, and which class is taken for
which."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from timm.data import RealLabelsImagenet

from vmamba.classification.class_maps import numbers_of, real_accuracy, real_labels
from vmamba.classification.task import Accuracy
from vmamba.classification.teachers import open_teacher
from vmamba.config import output_folder
from vmamba.errors import UserError
from vmamba.runtime.distributed import World
from vmamba.runtime.evaluation import as_json
from vmamba.runtime.trainer import run

from .tiny import CLASSES, log, tiny_config

CPU = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def trained(tmp_path):
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 1)
    run(config)
    return config


def evaluated(folder, config, *opts):
    run(tiny_config(folder, "EVAL_MODE", True, "MODEL.WEIGHTS", "model", *opts))
    return json.loads((output_folder(config) / "evaluation.json").read_text())


def test_folders_of_other_data_sets_by_a_map(tmp_path, trained):
    """The held-out images under other names say the same; of some of them no other class can be the answer."""
    usual = evaluated(tmp_path, trained)
    assert [sum(row) for row in usual["details"]["confusion"]] == usual["details"]["class_images"]
    right = sum(usual["details"]["confusion"][label][label] for label in range(CLASSES))
    assert usual["results"]["acc1"] == pytest.approx(100 * right / 12)
    calibration = usual["details"]["calibration"]
    assert sum(one["images"] for one in calibration) == 12
    assert sum(one["images"] * one["accuracy"] for one in calibration) == pytest.approx(12 * usual["results"]["acc1"])
    error = sum(one["images"] * abs(one["accuracy"] - one["confidence"]) for one in calibration) / 12
    assert usual["details"]["expected_calibration_error"] == pytest.approx(error)
    names = {0: "5", 1: "10 b", 2: "a", 3: "b", 4: "c", 5: "d"}
    other = tmp_path / "other"
    for number, name in names.items():
        shutil.copytree(tmp_path / "images" / "val" / f"class{number}", other / name)
    (other / "map.txt").write_text("".join(f"{name}, {number}\n" for number, name in names.items()))
    mapped = evaluated(tmp_path, trained, "DATA.DATA_PATH", other, "DATA.CLASS_MAP", "map.txt")
    assert mapped["results"] == pytest.approx(usual["results"])
    assert mapped["details"]["confusion"] == usual["details"]["confusion"]
    for name in ("a", "b", "c"):
        shutil.rmtree(other / name)
    few = evaluated(tmp_path, trained, "DATA.DATA_PATH", other, "DATA.CLASS_MAP", "map.txt")
    assert [number for number in range(6) if any(row[number] for row in few["details"]["confusion"])] != [
        0,
        1,
        2,
        3,
        4,
        5,
    ]
    assert all(row[number] == 0 for row in few["details"]["confusion"] for number in (2, 3, 4))
    assert few["results"]["val_loss"] < usual["results"]["val_loss"] + 1  # of three chances


def test_a_checkpoint_of_other_class_names_is_a_warning(tmp_path, trained, caplog, monkeypatch):
    """As evaluated, by the data of its run or names of its own, and as a teacher."""
    last, other = output_folder(trained) / "last.pth", tmp_path / "other"
    shutil.copytree(trained.DATA.DATA_PATH, other)
    for split in ("train", "val"):
        (other / split / "class3").rename(other / split / "zebra")
    run(tiny_config(tmp_path, "EVAL_MODE", True))
    assert "calls class" not in log(trained)
    run(tiny_config(tmp_path, "EVAL_MODE", True, "DATA.DATA_PATH", other))
    said = "last.pth' calls class 3 'class3', and here it is 'class4': is it of the same classes in the same order?"
    assert log(trained).count(said) == 1
    monkeypatch.setattr(logging.getLogger("vmamba"), "propagate", True)
    open_teacher(tiny_config(tmp_path, "DATA.DATA_PATH", other, "DISTILL.TEACHER", last))
    assert caplog.text.count(said) == 1
    torch.save(dict(torch.load(last)) | {"classes": [*"abcdef"]}, tmp_path / "named.pth")
    open_teacher(tiny_config(tmp_path, "DISTILL.TEACHER", tmp_path / "named.pth"))
    assert "named.pth' calls class 0 'a', and here it is 'class0'" in caplog.text


def test_names_of_imagenets_kind(tmp_path):
    assert numbers_of(["n01440764", "n15075141"], "imagenet", tmp_path, 1000) == {"n01440764": 0, "n15075141": 999}
    assert numbers_of(["0", "10", "2"], "numbers", tmp_path, 1000) == {"0": 0, "10": 10, "2": 2}
    (tmp_path / "map").write_text("a b\t3\n\nc,4\nnone\n")
    (tmp_path / "twice").write_text("a,1\nb,2\na 3\n")
    for folders, named, sentence in (
        (["n0", "n01440764"], "imagenet", "CLASS_MAP is imagenet, which does not tell of which class n0 is; rename"),
        (["7", "x"], "numbers", "CLASS_MAP is numbers, which does not tell of which class x is"),
        (["7", "11"], "numbers", "CLASS_MAP is numbers: '11' is of class 11, and MODEL.NUM_CLASSES is 10"),
        (["a b"], "map", "map', line 4: 'none' is no folder and class's number"),
        (["a"], "twice", "twice', line 3: 'a' is named a second time; keep one of its lines"),
        (["a"], "nothing", "cannot read .*nothing"),
    ):
        with pytest.raises(UserError, match=sentence):
            numbers_of(folders, named, tmp_path, 10)
    (tmp_path / "map").write_text("a b\t3\n\nc,4\n")
    assert numbers_of(["a b", "c"], "map", tmp_path, 10) == {"a b": 3, "c": 4}


@pytest.mark.parametrize(("opts", "words"), [
    (("DATA.CLASS_MAP", "numbers"), "DATA.CLASS_MAP is of images to evaluate on; give --eval too"),
    (("DATA.CLASS_MAP", "numbers", "DATA.DATASET", "digits"), "DATA.CLASS_MAP is of folders of images"),
])  # fmt: skip
def test_a_map_where_none_can_be_is_a_sentence(tmp_path, opts, words):
    with pytest.raises(UserError, match=words):
        run(tiny_config(tmp_path, *opts))


def test_real_labels_are_timms():
    torch.manual_seed(0)
    files = [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(50_000)]
    logits = torch.randn(50_000, 1000)
    logits[torch.arange(50_000), [labels[0] if labels else 0 for labels in real_labels()]] += 3
    theirs = RealLabelsImagenet(files)
    theirs.add_result(logits)
    answers = list(zip([f"a/{file}" for file in files], logits.argmax(1).tolist(), strict=True))
    assert real_accuracy(answers) == pytest.approx(theirs.get_accuracy(1))
    assert 20 < real_accuracy(answers) < 90
    assert real_accuracy([*answers, ("a/other.jpg", 0)]) is None
    assert real_accuracy([("ILSVRC2012_val_00050001.JPEG", 0)]) is None


def test_an_evaluation_of_imagenets_validation_images_tells_it(tmp_path):
    config = tiny_config(tmp_path, "MODEL.NUM_CLASSES", 1000)
    seen = [number for number, labels in enumerate(real_labels()) if labels][:2]
    names = [f"/val/n0/ILSVRC2012_val_{number + 1:08d}.JPEG" for number in seen]
    source = SimpleNamespace(source=SimpleNamespace(name=lambda index: names[index]))
    loader = SimpleNamespace(given=[0, 1], examples=SimpleNamespace(source=source))
    meter = Accuracy(CPU, config, loader)
    first = real_labels()[seen[0]][0]
    answer = torch.zeros(2, 1000)
    answer[:, first] = 9.0
    meter.add(lambda images: answer, (answer, torch.tensor([first, first])))
    meter.results()
    assert meter.details()["real_acc1"] == pytest.approx(100.0 if first in real_labels()[seen[1]] else 50.0)
    assert Accuracy(CPU, tiny_config(tmp_path, "MODEL.NUM_CLASSES", 1001), loader).confusion is None


def test_json_has_a_row_of_a_matrix_on_a_line():
    told = {"a": [[1, 2], [3, 4]], "b": [], "c": [1.5, float("nan")], "d": {"e": ["x [1,\n 2]", "y"]}}
    text = as_json(told)
    assert json.loads(text) == told | {"c": [1.5, None]}
    assert '"a": [\n  [1, 2],\n  [3, 4]\n ]' in text and '"c": [1.5, null]' in text
