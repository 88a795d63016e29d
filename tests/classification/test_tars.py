"""Images in tar archives: of folders of classes, and WebDataset's."""

import io
import logging
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from vmamba.classification.datasets import open_dataset
from vmamba.config import get_config
from vmamba.data.archives import Tars
from vmamba.data.images import UnreadableImage
from vmamba.data.names import Labelled, Names
from vmamba.errors import UserError


def png(value):
    file = io.BytesIO()
    Image.new("L", (5, 4), value).save(file, "PNG")
    return file.getvalue()


def pack(path, files, kind=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            if data is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data or b""))


def opened(root, *opts, training=True, classes=2, on_machine=(0, 1)):
    opts = ["DATA.DATA_PATH", str(root), "MODEL.NUM_CLASSES", classes, *opts]
    return open_dataset(get_config(None, opts), training=training, rank=0, on_machine=on_machine)


def values(source):
    return [
        (int(np.asarray(image)[0, 0, 0]), label) for image, label in (source.load(i, 3) for i in range(len(source)))
    ]


def folders(root, prefix="", split="train", parts=2):
    long = "x" * 120  # more than a header holds
    for part in range(parts):
        pack(root / f"{split}-{part:06d}.tar", {
            f"{prefix}dog": None, f"{prefix}dog/{part}.png": png(10 + part), f"{prefix}dog/notes.txt": b"no image",
            f"{prefix}ant/{long}{part}.PNG": png(20 + part), f"{prefix}ant/deep/{part}.png": png(30 + part),
        })  # fmt: skip


def shards(root, split="train", parts=2):
    for part in range(parts):
        pack(root / f"imagenet1k-{split}-{part:04d}.tar", {
            f"{part}7.cls": b"1\n", f"{part}7.png": png(40 + part), f"{part}7.json": b"{}",
            f"a.b/{part}8.seg.png": png(50 + part), f"a.b/{part}8.cls": b"0",
        })  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "./", "train/", "./train/"])
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_folders_of_classes_are_read_in_the_order_of_their_classes(tmp_path, prefix, kind):
    folders(tmp_path, prefix)
    source = opened(tmp_path)
    expected = [(20, 0), (30, 0), (21, 0), (31, 0), (10, 1), (11, 1)]
    assert values(source) == values(pickle.loads(pickle.dumps(source))) == expected
    assert source.labels().tolist() == [label for _, label in expected]
    assert source.name(5) == os.path.join(tmp_path, "train-000001.tar", prefix.removeprefix("./") + "dog/1.png")


def tar(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def test_an_archive_in_an_archive_is_a_class_as_in_imagenets_own(tmp_path):
    dog = tar({"dog_1.png": png(10), "dog_2.png": png(11)}).rstrip(b"\0")
    dog += bytes(-len(dog) % tarfile.BLOCKSIZE)
    end = bytes(tarfile.BLOCKSIZE)  # the least that an archive ends by
    pack(tmp_path / "ILSVRC2012_img_train.tar", {
        "ant.tar": tar({"ant_1.png": png(20)}), "._ant.tar": b"of another system", "dog.tar": dog + end,
        "cat.tar": tar({"./cat_1.png": png(30), "notes.txt": b"no image"}),
    })  # fmt: skip
    source = opened(tmp_path, classes=3)
    assert values(source) == [(20, 0), (30, 1), (10, 2), (11, 2)]
    assert source.name(3) == str(tmp_path / "ILSVRC2012_img_train.tar" / "dog" / "dog_2.png")
    pack(tmp_path / "ILSVRC2012_img_train.tar", {"dog.tar": dog, "ant.tar": tar({"ant_1.png": png(20)})})
    with pytest.raises(UserError, match=r"img_train.tar' stops at byte [0-9,]+ without the zeros of an archive's end"):
        opened(tmp_path)
    pack(tmp_path / "ILSVRC2012_img_train.tar", {"dog.tar": dog[:-600], "ant.tar": tar({"ant_1.png": png(20)})})
    with pytest.raises(UserError, match=r"img_train.tar' is not a tar archive, .*'dog/dog_2.png' is cut off"):
        opened(tmp_path)


def test_a_key_with_a_cls_file_is_webdatasets_form(tmp_path):
    shards(tmp_path)
    shards(tmp_path, "validation", 1)
    assert values(opened(tmp_path)) == [(40, 1), (50, 0), (41, 1), (51, 0)]
    assert values(opened(tmp_path, training=False)) == [(40, 1), (50, 0)]


def test_archives_are_gone_through_once_as_long_as_they_stay(tmp_path, monkeypatch):
    folders(tmp_path)
    expected = values(opened(tmp_path))
    tar, opened_tar = tmp_path / "train-000000.tar", tarfile.open

    def again(*_, **__):
        raise AssertionError("the archives are gone through again")

    monkeypatch.setattr(tarfile, "open", again)
    assert values(opened(tmp_path)) == expected
    monkeypatch.setattr(tarfile, "open", opened_tar)
    pack(tar, {"ant/0.png": png(77), "dog/0.png": png(78)})
    os.utime(tar, ns=(1, 1))
    changed = [(77, 0), (21, 0), (31, 0), (78, 1), (11, 1)]
    assert values(opened(tmp_path)) == changed
    for broken in (b"", b"no index", (tmp_path / "train.index.npz").read_bytes()[:300]):
        (tmp_path / "train.index.npz").write_bytes(broken)
        assert values(opened(tmp_path)) == changed


def test_where_the_index_cannot_be_kept_it_is_said(tmp_path, monkeypatch, caplog):
    folders(tmp_path)
    (tmp_path / "train.index.npz").mkdir()
    with caplog.at_level(logging.INFO, "vmamba"):
        assert len(opened(tmp_path)) == 6
    assert "where each file begins is not kept, and found anew at each start: cannot write" in caplog.text


def test_links_are_what_they_lead_to(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, data in {"ant/a.png": png(10), "dog/b.png": png(20)}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, kind, target in (
            ("./ant/hard.png", tarfile.LNKTYPE, "./dog/b.png"),
            ("ant/soft.png", tarfile.SYMTYPE, "../dog/./soft.png"),  # to a link that comes later
            ("dog/soft.png", tarfile.SYMTYPE, "b.png"),
            ("dog/b.png", tarfile.LNKTYPE, "dog/b.png"),  # as GNU tar stores what it is given twice
            ("dog/nowhere.png", tarfile.SYMTYPE, "/data/c.png"),
            ("dog/round.png", tarfile.SYMTYPE, "round.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    source = opened(tmp_path)
    assert [name for name, _ in source.samples] == [
        "ant/a.png", "ant/hard.png", "ant/soft.png", "dog/b.png", "dog/soft.png", "dog/nowhere.png"
    ]  # fmt: skip
    read = [source.load(index, 3) for index in range(5)]
    assert [(np.asarray(image)[0, 0, 0], label) for image, label in read] == [
        (10, 0), (20, 0), (20, 0), (20, 1), (20, 1)
    ]  # fmt: skip
    with pytest.raises(UnreadableImage, match="dog/nowhere.png': it is a link, and its archive does not hold the file"):
        source.load(5, 3)


def test_an_older_index_is_made_anew(tmp_path, monkeypatch):
    folders(tmp_path)
    monkeypatch.setattr("vmamba.data.archives._FORM", 1)
    monkeypatch.setattr("vmamba.data.archives._followed", lambda *_: None)
    opened(tmp_path)
    monkeypatch.undo()
    assert [value for value, _ in values(opened(tmp_path))] == [20, 30, 21, 31, 10, 11]


@pytest.mark.parametrize("name, train, val", [
    ("retrieval-train.tar", True, False), ("constrained-val.tar", False, True), ("train2017.tar", True, False),
    ("ILSVRC2012_img_val.tar", False, True), ("imagenet1k-validation-00.tar", False, True),
    ("Training_1.tar", True, False), ("valid.tar", False, True), ("strain.tar", False, False),
    (".train.tar", False, False),
])  # fmt: skip
def test_an_archive_is_of_the_split_that_a_word_of_its_name_says(tmp_path, name, train, val):
    pack(tmp_path / name, {"ant/a.png": png(1), "dog/a.png": png(2)})
    for training, expected in ((True, train), (False, val)):
        if expected:
            assert values(opened(tmp_path, training=training)) == [(1, 0), (2, 1)]
        else:
            with pytest.raises(UserError, match="folder: it holds .*a tar archive is told by a word of its name"):
                opened(tmp_path, training=training)


@pytest.mark.parametrize("name", ["trainval.tar", "train-val.tar", "VOC_train_validation.tar"])
def test_an_archive_of_both_splits_is_refused(tmp_path, name):
    folders(tmp_path)
    pack(tmp_path / name, {"ant/a.png": png(1), "dog/a.png": png(2)})
    for training in (True, False):
        with pytest.raises(UserError, match=f"{name}' is by its name of images to train on and of those held out"):
            opened(tmp_path, training=training)


def test_of_a_key_the_plain_image_counts_and_what_lies_beside_it_is_told(tmp_path, caplog):
    pack(tmp_path / "train.tar", {
        "1.cls": b"1", "1.mask.png": png(9), "1.png": png(10), "2.png": png(20), "2.mask.png": png(9), "2.cls": b"0",
    })  # fmt: skip
    assert values(opened(tmp_path)) == [(10, 1), (20, 0)]
    assert "2 beside the image of their key" in caplog.text and "train.tar/1.mask.png', ...)" in caplog.text


@pytest.mark.parametrize("mode", ["no", "part", "full"])
@pytest.mark.parametrize("kept", [0, 1, 256])
def test_every_cache_mode_and_number_of_open_files_reads_the_same(tmp_path, monkeypatch, mode, kept):
    monkeypatch.setattr("vmamba.data.archives._KEPT_OPEN", kept)
    folders(tmp_path)
    source = opened(tmp_path, "DATA.CACHE_MODE", mode, on_machine=(1, 2))
    assert [value for value, _ in values(source)] == [20, 30, 21, 31, 10, 11]
    (tmp_path / "train-000000.tar").unlink()
    (tmp_path / "train-000001.tar").unlink()
    if mode == "full":
        assert len(values(pickle.loads(pickle.dumps(source)))) == 6
    elif kept == 0:
        with pytest.raises(UnreadableImage, match="cannot read '.*train-000000.tar/ant/x*0.PNG': No such file"):
            source.load(0, 3)


def test_what_lies_in_folders_is_taken_first(tmp_path):
    folders(tmp_path)
    for label, name in enumerate(("ant", "dog")):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "a.png").write_bytes(png(label))
    assert values(opened(tmp_path)) == [(0, 0), (1, 1)]


def broken(path, data):
    def change(root):
        whole = (root / path).read_bytes()
        (root / path).write_bytes(data(whole))

    return change


TRAIN, DAMAGED = "train-000001.tar", "000001.tar' is not a tar archive, or is compressed, truncated or damaged: "


def also(**files):
    return lambda root: pack(root / "train-2.tar", {name.replace("_", "."): data for name, data in files.items()})


def twice(root):
    pack(root / "train-2.tar", {"ant/a.png": png(1)})
    with tarfile.open(root / "train-2.tar", "a") as archive:
        member = tarfile.TarInfo("ant/a.png")
        archive.addfile(member)


@pytest.mark.parametrize("form, change, sentence", [
    (folders, broken(TRAIN, lambda data: data[:2000]), DAMAGED),
    (folders, broken(TRAIN, lambda data: data[:700]), DAMAGED),
    (folders, broken(TRAIN, lambda data: b"\x1f\x8b" + data[2:]), DAMAGED),
    (folders, broken(TRAIN, lambda data: data[:1536] + b"?" * 512 + data[2048:]), "what lies at byte 1,536 is no file"),
    (folders, broken(TRAIN, lambda data: b""), DAMAGED),
    (folders, also(a_png=png(1)), "train-2.tar/a.png' lies in no folder of a class, and its archives have no .cls"),
    (folders, lambda root: pack(root / "train-2.tar", {"eel/a.png": png(1)}), "has 3 classes .ant, dog, eel., but"),
    (shards, also(a_png=png(1)), "holds 'a.png' and no .cls file of the same key; add one"),
    (shards, also(a_png=png(1), a_cls=b"2"), "'a.png', whose label 2 is out of range; MODEL.NUM_CLASSES is 2"),
    (shards, also(a_png=png(1), a_bmp=png(2), a_cls=b"1"), "holds 'a.png' and 'a.bmp', two images of one key; leave"),
    (shards, also(a_x_png=png(1), a_y_png=png(2), a_cls=b"1"), "'a.x.png' and 'a.y.png', two images of one key"),
    (shards, also(a_png=png(1), a_cls=b"1", a_b_cls=b"0"), "'a.cls' and 'a.b.cls', two labels of one key; leave one"),
    (folders, broken(TRAIN, lambda data: data.rstrip(b"\0").ljust(-len(data.rstrip(b"\0")) // -512 * 512, b"\0")),
     "000001.tar' stops at byte [0-9,]+ without the zeros of an archive's end"),
    (folders, broken(TRAIN, lambda data: data + data), "000001.tar' goes on behind its end, from byte .* one archive"),
    (folders, broken(TRAIN, lambda data: data + b"!"), "000001.tar' goes on behind its end, from byte"),
    (folders, twice, "train-2.tar' holds 'ant/a.png' twice; make it again with one of each name"),
    (shards, also(a_cls=b"one"), "'a.cls' holds 'one', not a label from 0 on"),
])  # fmt: skip
def test_what_broken_archives_say(tmp_path, form, change, sentence):
    form(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=sentence):
        opened(tmp_path)


def test_classes_must_be_those_of_training(tmp_path):
    folders(tmp_path)
    pack(tmp_path / "val.tar", {"val/ant/a.png": png(1), "val/eel/a.png": png(2)})
    with pytest.raises(UserError, match="classes in val/ than in train/; only in val/: eel; only in train/: dog"):
        opened(tmp_path, training=False)
    pack(tmp_path / "val.tar", {"val/dog/a.png": png(1), "val/ant/a.png": png(2)})
    assert values(opened(tmp_path, training=False)) == [(2, 0), (1, 1)]


def test_a_class_without_an_image_is_said(tmp_path):
    shards(tmp_path)
    with pytest.raises(UserError, match="holds no image of class 2; MODEL.NUM_CLASSES is 3"):
        opened(tmp_path, classes=3)


def test_names_are_kept_as_they_are(tmp_path):
    names = ["a", "", "é/\udcff.png", "x" * 300, "日本"]
    kept = Names(names)
    assert [*kept] == names and kept[-1] == "日本" and [*Names.of(kept.text, kept.ends)] == names
    with pytest.raises(IndexError):
        kept[5]
    assert [*Labelled([("b", 2), ("a", 0)])] == [("b", 2), ("a", 0)] and [*Labelled([])] == []
    pack(tmp_path / "a.tar", {name or "empty": b"." for name in names if name.isprintable()})
    assert len(Tars([tmp_path / "a.tar"], tmp_path / "a.npz")) == 4
