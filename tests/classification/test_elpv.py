"""The solar cells: which are held out, and what is said where the package is not there."""

import hashlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmamba.analysis.classes import class_names
from vmamba.classification.datasets import open_dataset
from vmamba.classification.elpv import read_cells
from vmamba.config import get_config
from vmamba.errors import UserError

GROUPS = {("mono", 0.0): 8, ("mono", 1.0): 4, ("poly", 1 / 3): 4, ("poly", 2 / 3): 12}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """One of the same form with 28 cells, in front of any that is installed."""
    folder = tmp_path / "elpv_dataset" / "data"
    (folder / "images").mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('it is found and not imported')")
    lines = []
    for (kind, chance), count in GROUPS.items():
        for _ in range(count):
            name = f"images/cell{len(lines):04d}.png"
            Image.fromarray(np.full((6, 6), len(lines), np.uint8)).save(folder / name)
            lines.append(f"{name}  {chance:<18} {kind}\n")
    (folder / "labels.csv").write_text("".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("elpv_dataset", None)
    return folder


def test_a_quarter_of_each_grade_of_each_kind_is_held_out(package):
    train, held_out = read_cells(True), read_cells(False)
    assert Counter(grade for _, grade in held_out) == {0: 2, 1: 1, 2: 3, 3: 1}
    assert Counter(grade for _, grade in train) == {0: 6, 1: 3, 2: 9, 3: 3}
    assert len({path for path, _ in train + held_out}) == 28
    grades = {0: 0, 1: 3, 2: 1, 3: 2}  # of the groups in their order
    for path, grade in train + held_out:
        number = int(Path(path).stem.removeprefix("cell"))
        group = next(i for i in range(4) if number < sum(list(GROUPS.values())[: i + 1]))
        assert grade == grades[group]


def test_images_are_read_from_the_package(package):
    source = open_dataset(config(), training=False, rank=0, on_machine=(0, 1))
    image, label = source.load(0, 1)
    assert len(source) == 7 and image.mode == "L"
    number = int(Path(source.name(0)).stem.removeprefix("cell"))
    assert np.asarray(image).max() == number and label == 0
    assert class_names(config()) == ["intact", "perhaps damaged", "probably damaged", "damaged"]


def test_what_cannot_be_is_a_sentence(package, monkeypatch):
    with pytest.raises(UserError, match="elpv has 4 classes, but MODEL.NUM_CLASSES is 3"):
        open_dataset(config("MODEL.NUM_CLASSES", 3), training=True, rank=0, on_machine=(0, 1))
    monkeypatch.setattr("vmamba.classification.elpv.find_spec", lambda name: None)
    with pytest.raises(UserError, match="install it: pip install elpv-dataset"):
        open_dataset(config(), training=True, rank=0, on_machine=(0, 1))


def test_the_published_cells_are_split_so_for_ever():
    pytest.importorskip("elpv_dataset", reason="the images are a package of 90 MB")
    names = {side: [Path(path).name for path, _ in read_cells(side)] for side in (True, False)}
    assert {side: len(each) for side, each in names.items()} == {True: 1970, False: 654}
    held_out = hashlib.sha256("".join(names[False]).encode()).hexdigest()
    assert held_out == "013e5e545dc0bf65f235b4dbf213c8f3eecc92ca866acbb9e207f34b650e1391"


def config(*opts):
    return get_config(None, ["DATA.DATASET", "elpv", "MODEL.NUM_CLASSES", 4, "MODEL.IN_CHANS", 1, *opts])
