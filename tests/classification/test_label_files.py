"""CSV files of labels give what folders of the same images give; what is wrong in one is named by its line."""

import os
import random
import shutil

import pytest
from PIL import Image

from vmamba.analysis.classes import class_names
from vmamba.classification.datasets import open_dataset
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.runtime.trainer import run

from .tiny import metrics, tiny_config


def listed(config, training):
    return sorted(open_dataset(config, training=training, rank=0, on_machine=(0, 1)).samples)


def write(folder, split, name=lambda label: f"class{label}", header="image,label\n"):
    """A CSV file of the images of tiny.py, in a drawn order, one of them in quotes."""
    images = sorted((folder / "images" / split).rglob("*.png"))
    random.Random(0).shuffle(images)
    lines = [f"{path.relative_to(folder / 'images')},{name(path.parent.name[-1])}\n" for path in images]
    image, label = lines[2].split(",")
    lines[2] = f'"{image}", {label}'
    (folder / "images" / f"{split}.csv").write_text(header + "\n".join(lines))  # with empty lines


@pytest.mark.parametrize("header", ["image,label\n", ""])
@pytest.mark.parametrize("name", [str, lambda label: f"class{label}"])
def test_a_file_of_labels_is_what_the_folders_are(tmp_path, name, header):
    config = tiny_config(tmp_path)
    for split in ("train", "val"):
        write(tmp_path, split, name, header)
    files = tiny_config(tmp_path, "DATA.TRAIN_LABELS", "train.csv", "DATA.VAL_LABELS", "val.csv")
    for training in (True, False):
        assert listed(files, training) == listed(config, training)
    assert class_names(files) == [name(str(number)) for number in range(6)]
    divided = tiny_config(tmp_path, "DATA.TRAIN_LABELS", "train.csv", "DATA.VAL_FRACTION", 0.4)
    train, held_out = listed(divided, True), listed(divided, False)
    assert sorted(train + held_out) == listed(config, True) and len(held_out) == 12
    assert {label for _, label in held_out} == {*range(6)}
    shutil.rmtree(tmp_path / "images" / "train")
    assert class_names(files) == [name(str(number)) for number in range(6)]


def test_a_run_with_balanced_classes(tmp_path):
    tiny_config(tmp_path)
    for split in ("train", "val"):
        write(tmp_path, split)
    config = tiny_config(tmp_path, "DATA.TRAIN_LABELS", "train.csv", "DATA.VAL_LABELS", "val.csv")
    run(tiny_config(tmp_path, "DATA.TRAIN_LABELS", "train.csv", "DATA.VAL_LABELS", "val.csv", "TRAIN.EPOCHS", 1,
                    "TRAIN.CLASS_WEIGHTS", "balanced", "DATA.SAMPLER", "balanced"))  # fmt: skip
    assert len(metrics(config)) == 1


IMAGE = "train/class0/0.png"


@pytest.mark.parametrize(("text", "words"), [
    (f"{IMAGE},a\n{IMAGE};b\n", f"train.csv', line 2: '{IMAGE};b' is not an image and a label with a comma between"),
    (f"{IMAGE},a\n,b\n", "train.csv', line 2: ',b' is not an image and a label"),
    (f"id,class\n{IMAGE},a\n", "train.csv', line 1: there is no file '.*id'; mend .*; a line of names is image,label"),
    (f"\n{IMAGE},a\n\nx.png,b\n", "train.csv', line 4: there is no file '.*x.png'; mend or remove the line$"),
    (f"{IMAGE},a\n{IMAGE},b\n", f"train.csv', line 2: '{IMAGE}' stands in '.*train.csv', line 1 already; remove one"),
    (f'{IMAGE},a\n"{IMAGE},b\n', "train.csv', line 2: unexpected end of data; mend it"),
    ("image,label\n", "train.csv' names no image; give it lines of an image, a comma and a label"),
    (f"{IMAGE},3\n", r"train.csv' has labels up to 3 and no image of 0, 1, 2; number the classes from 0 on"),
    (f"{IMAGE},9999999999\n", r"line 1: label 9999999999 is no class's number"),
    (f"{IMAGE},0\ntrain/class1/1.png,01\n", "line 2: label 01 is no class's number as 0, 1, 2, ... are"),
    (f"{IMAGE},0\ntrain/class1/1.png,-1\n", "line 2: label -1 is no class's number as 0, 1, 2, ... are"),
    (f"{IMAGE},0\ntrain/../{IMAGE},1\n", r"line 2: 'train/../.*' stands in .*line 1 already"),
    (f"{IMAGE},a\ntrain/class1/1.png,b\n", r"train.csv' has 2 classes \(a, b\), but MODEL.NUM_CLASSES is 6"),
])  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, text, words):
    config = tiny_config(tmp_path, "DATA.TRAIN_LABELS", "train.csv", "DATA.VAL_FRACTION", 0.5)
    (tmp_path / "images" / "train.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        run(config)


@pytest.mark.parametrize(("opts", "words"), [
    (("DATA.VAL_LABELS", "val.csv"), "VAL_LABELS is 'val.csv', and classes are told by DATA.TRAIN_LABELS; name both"),
    (("DATA.TRAIN_LABELS", "train.csv"), "say what is held out, and neither given; give one of them"),
    (("DATA.TRAIN_LABELS", "train.csv", "DATA.VAL_LABELS", "v.csv", "DATA.VAL_FRACTION", 0.1), "and both given; give"),
    (("DATA.TRAIN_LABELS", "none.csv", "DATA.VAL_FRACTION", 0.1), "cannot read '.*none.csv'"),
    (("DATA.TRAIN_LABELS", "train.csv", "DATA.DATASET", "digits"), "images in folders, and DATA.DATASET 'digits' has"),
    (("DATA.TRAIN_LABELS", "train.csv", "DATA.ZIP_MODE", True), "images in folders, and an archive has labels; empty"),
])  # fmt: skip
def test_what_does_not_go_together_is_a_sentence(tmp_path, opts, words):
    with pytest.raises(UserError, match=words):
        run(tiny_config(tmp_path, *opts))


def test_a_held_out_label_that_no_training_image_has(tmp_path):
    config = tiny_config(tmp_path, "DATA.TRAIN_LABELS", "train.csv", "DATA.VAL_LABELS", "val.csv")
    write(tmp_path, "train")
    write(tmp_path, "val", lambda label: "rose" if label == "5" else f"class{label}")
    words = r"val.csv', line \d+: 'rose' is none of the training images' classes \(class0, class1, .* and 1 more\)"
    with pytest.raises(UserError, match=words):
        run(config)


def test_an_image_that_is_trained_on_and_held_out_is_told(tmp_path, caplog):
    picture = Image.new("RGB", (4, 4))
    for name in "abcd":
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "train.csv").write_text("a.png,x\nb.png,y\nc.png,x\n")
    (tmp_path / "val.csv").write_text("./c.png,x\nd.png,y\n")
    opts = ["DATA.DATA_PATH", str(tmp_path), "MODEL.NUM_CLASSES", 2]
    opts += ["DATA.TRAIN_LABELS", "train.csv", "DATA.VAL_LABELS", "val.csv"]
    for training, rank, told in ((True, 0, 0), (False, 1, 0), (False, 0, 1)):
        caplog.clear()
        open_dataset(get_config(None, opts), training=training, rank=rank, on_machine=(0, 1))
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == told
    assert "1 image stands of" in lines[0] and "in 'train.csv' too" in lines[0] and "c.png" in lines[0]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_link_is_the_image_it_leads_to(tmp_path, caplog, link):
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    link(tmp_path / "a.png", tmp_path / "again.png")
    (tmp_path / "val.csv").write_text("again.png,x\nc.png,y\n")
    opts = ["DATA.DATA_PATH", str(tmp_path), "MODEL.NUM_CLASSES", 2]
    config = get_config(None, [*opts, "DATA.TRAIN_LABELS", "train.csv", "DATA.VAL_LABELS", "val.csv"])

    def opened(training):
        return len(open_dataset(config, training=training, rank=0, on_machine=(0, 1)))

    (tmp_path / "train.csv").write_text("a.png,x\nb.png,y\nagain.png,x\n")  # to be drawn more often
    assert opened(training=True) == 3 and opened(training=False) == 2
    assert "1 image stands of" in caplog.text and "again.png" in caplog.text
    (tmp_path / "train.csv").write_text("a.png,x\nb.png,y\nagain.png,y\n")
    words = "line 3: 'again.png' is the file of '.*train.csv', line 1 by a link, and its label there is 'x', not 'y'"
    with pytest.raises(UserError, match=words):
        opened(training=True)


def test_a_class_in_two_unicode_forms_is_one(tmp_path):
    for name in "abcd":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (tmp_path / "train.csv").write_text(f"a.png,{composed}\nb.png,{decomposed}\nc.png,tea\n")
    (tmp_path / "val.csv").write_text(f"d.png,{decomposed}\n")
    opts = ["DATA.DATA_PATH", str(tmp_path), "MODEL.NUM_CLASSES", 2]
    config = get_config(None, [*opts, "DATA.TRAIN_LABELS", "train.csv", "DATA.VAL_LABELS", "val.csv"])
    labels = [[*open_dataset(config, training=side, rank=0, on_machine=(0, 1)).labels()] for side in (True, False)]
    assert labels == [[0, 0, 1], [0]]
