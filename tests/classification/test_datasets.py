"""Where labelled images come from, and what each mistake in the data says."""

import errno
import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from vmamba.classification.datasets import open_dataset
from vmamba.config import get_config
from vmamba.data.archives import Archive
from vmamba.data.images import UnreadableImage
from vmamba.errors import UserError


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def make_folders(root: Path, train=("cat", "dog"), val=("cat", "dog"), images: int = 2) -> Path:
    """`images` PNG files a class and split; picture s is `picture(s)`, s counting up."""
    seed = 0
    for split, classes in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                (root / split / name / f"{i}.png").write_bytes(encoded(seed))
                seed += 1
    return root


def make_archives(root: Path, labels=(0, 1, 0, 1, 1), compression=zipfile.ZIP_STORED) -> Path:
    for split in ("train", "val"):
        with zipfile.ZipFile(root / f"{split}.zip", "w", compression) as archive:
            for i, label in enumerate(labels):
                archive.writestr(f"n{label}/a {i}.png", encoded(i))
        lines = [f"n{label}/a {i}.png\t{label}\n" for i, label in enumerate(labels)]
        (root / f"{split}_map.txt").write_text("".join(lines))
    return root


def opened(root: Path | str, *opts, training=True, rank=0, on_machine=(0, 1), classes=2, dataset="imagenet"):
    opts = ["DATA.DATASET", dataset, "DATA.DATA_PATH", str(root), "MODEL.NUM_CLASSES", classes, *opts]
    return open_dataset(get_config(None, opts), training=training, rank=rank, on_machine=on_machine)


def pixels(source, index: int) -> list:
    return np.asarray(source.load(index, 3)[0]).tolist()


def test_digits_split():
    train, val = (opened("", training=training, classes=10, dataset="digits") for training in (True, False))
    assert (len(train), len(val)) == (1437, 360)
    together = {image.tobytes() for source in (train, val) for image, _ in source.samples}
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert len(together) == len(np.unique(digits.data, axis=0))  # nothing lost
    counts = np.bincount([label for _, label in val.samples])
    assert abs(counts - np.bincount(digits.target) / 5).max() < 1  # stratified
    assert val.samples[0][0].getextrema() == (0, 255)
    assert hashlib.md5(np.array([label for _, label in val.samples]).tobytes()).hexdigest() == SPLIT


SPLIT = "3b21550defdf84a9ea6bc81264b4f16d"  # of the held-out labels in order: the split never moves


def test_folders_read_images_and_number_classes_by_name(tmp_path):
    make_folders(tmp_path, train=("dog", "ant", "cat"), val=("cat", "ant", "dog"))
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image, not taken for one")
    train, val = opened(tmp_path, classes=3), opened(tmp_path, classes=3, training=False)
    assert [label for _, label in train.samples] == [label for _, label in val.samples] == [0, 0, 1, 1, 2, 2]
    assert pixels(train, 0) == np.asarray(picture(2)).tolist()  # ant came second
    assert train.name(0) == str(tmp_path / "train" / "ant" / "0.png")


def test_evaluation_needs_val_only(tmp_path):
    make_folders(tmp_path, train=())
    assert len(opened(tmp_path, "EVAL_MODE", True, training=False)) == 4
    with pytest.raises(UserError, match=r"has no train/ folder: it holds val"):
        opened(tmp_path, training=False)


def test_archives_read_the_same_in_every_cache_mode(tmp_path):
    make_archives(tmp_path)
    for mode in ("no", "part", "full"):
        source = opened(tmp_path, "DATA.ZIP_MODE", True, "DATA.CACHE_MODE", mode, rank=5, on_machine=(1, 2))
        assert [label for _, label in source.samples] == [0, 1, 0, 1, 1]
        copy = pickle.loads(pickle.dumps(source))  # as a worker process gets it
        for i in range(5):
            assert pixels(source, i) == pixels(copy, i) == np.asarray(picture(i)).tolist()
    assert source.name(3) == str(tmp_path / "train.zip" / "n1" / "a 3.png")
    (tmp_path / "train.zip").unlink()
    assert pixels(source, 4) == np.asarray(picture(4)).tolist()  # full: the archive is no longer needed


def test_the_cache_mode_decides_what_becomes_of_an_archive(tmp_path, monkeypatch):
    make_archives(tmp_path)
    asked = []
    monkeypatch.setattr(Archive, "read_ahead", lambda self, *part: asked.append(part))
    monkeypatch.setattr(Archive, "hold", lambda self: asked.append("hold"))
    for mode in ("no", "part", "full"):
        opened(tmp_path, "DATA.ZIP_MODE", True, "DATA.CACHE_MODE", mode, rank=5, on_machine=(1, 2))
    assert asked == [(1, 2), "hold"]


@pytest.mark.parametrize("mode", ["no", "part", "full"])
def test_a_damaged_file_of_an_archive_waits_until_it_is_wanted(tmp_path, mode):
    make_archives(tmp_path, compression=zipfile.ZIP_DEFLATED)
    path = tmp_path / "train.zip"
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("n0/a 2.png").header_offset + 40
    data = bytearray(path.read_bytes())
    data[start : start + 60] = b"\xa5" * 60
    path.write_bytes(data)
    source = opened(tmp_path, "DATA.ZIP_MODE", True, "DATA.CACHE_MODE", mode)
    assert pixels(source, 1) == np.asarray(picture(1)).tolist()
    with pytest.raises(UnreadableImage, match="cannot read '.*train.zip/n0/a 2.png': "):
        source.load(2, 3)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_map_files_in_the_encodings_of_windows(tmp_path, encoding):
    make_archives(tmp_path)
    path = tmp_path / "train_map.txt"
    path.write_text(path.read_text(), encoding=encoding, newline="\r\n")
    assert pixels(opened(tmp_path, "DATA.ZIP_MODE", True), 0) == np.asarray(picture(0)).tolist()


def test_cifar_from_a_local_folder(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not hold cifar10 whole: it holds nothing; unpack https"):
        opened(tmp_path, classes=10, dataset="cifar10")
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    contents = {
        "train": pickle.dumps({"data": data, "labels": [4, 9, 0]}),
        "test": pickle.dumps({"data": data[:1], "labels": [7]}),
        "meta": pickle.dumps({"label_names": [str(i) for i in range(10)]}),
    }
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(CIFAR10, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": sums["meta"]})
    train = opened(tmp_path, classes=10, dataset="cifar10")
    image, label = train.load(1, 3)
    assert label == 9 and np.asarray(image).transpose(2, 0, 1).ravel().tolist() == data[1].tolist()
    assert len(opened(tmp_path, classes=10, dataset="cifar10", training=False)) == 1
    (folder / "test").write_bytes(pickle.dumps({"data": data[:1], "labels": [3]}))
    with pytest.raises(UserError, match=r"test' is not the published file \(its MD5 is not \w+\); unpack .* again, or"):
        opened(tmp_path, classes=10, dataset="cifar10")
    (folder / "train").unlink()
    (folder / "test").write_bytes(contents["test"])
    with pytest.raises(UserError, match="does not hold cifar10 whole: it holds cifar-10-batches-py; unpack https"):
        opened(tmp_path, classes=10, dataset="cifar10")


def test_other_names_go_to_timm(tmp_path):
    make_folders(tmp_path)
    source = opened(tmp_path, dataset="torch/image_folder")
    assert len(source) == 4 and source.load(3, 3)[1] == 1 and pixels(source, 3) == np.asarray(picture(3)).tolist()
    with pytest.raises(UserError, match="unknown DATA.DATASET 'imagnet'; did you mean 'imagenet'"):
        opened(tmp_path, dataset="imagnet")
    with pytest.raises(UserError, match="timm cannot open split 'train' of 'torch/nonesuch'"):
        opened(tmp_path, dataset="torch/nonesuch")
    with pytest.raises(UserError, match=r"torch/image_folder has 2 classes, but MODEL.NUM_CLASSES is 5"):
        opened(tmp_path, dataset="torch/image_folder", classes=5)


def remove(path: Path) -> None:
    for child in sorted(path.rglob("*"), reverse=True):
        child.rmdir() if child.is_dir() else child.unlink()
    path.rmdir()


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda root: remove(root), "does not exist"),
        (lambda root: remove(root / "train"), "has no train/ folder: it holds val"),
        (
            lambda root: [remove(root / "train"), (root / "train.zip").touch()],
            r"set DATA.ZIP_MODE true \(--zip\)",
        ),
        (lambda root: (root / "train" / "dog" / "0.png").rename(root / "x"), None),
        (lambda root: [f.unlink() for f in (root / "train" / "dog").iterdir()], r"no image in class dog; fill"),
        (lambda root: [remove(f) for f in (root / "train").iterdir()], "has no folder of a class: it holds nothing"),
        (
            lambda root: (root / "train" / "owl").mkdir(),
            r"has 3 classes \(cat, dog, owl\), but MODEL.NUM_CLASSES is 2; set it to 3 \(main",
        ),
        (
            lambda root: [
                remove(root / "train" / "dog"),
                (root / "train" / "dog").symlink_to(".."),
            ],
            r"no image in class dog \(left out: 1 linked to a folder it lies in \('.*/dog'\)\); fill",
        ),
        (
            lambda root: [(root / "train" / name).mkdir() for name in ("~", "a", "b", "c", "@")],
            r"has 7 classes \(@, a, b, c, cat, ..., ~\), but MODEL.NUM_CLASSES is 2",
        ),
        (lambda root: (root / "train" / "owl").symlink_to(root / "gone"), "owl' is a link that leads nowhere; mend"),
    ],
)
def test_what_broken_training_folders_say(tmp_path, break_it, message):
    root = make_folders(tmp_path / "data")
    break_it(root)
    if message is None:
        assert len(opened(root)) == 3
        return
    with pytest.raises(UserError, match=message):
        opened(root)


def test_systems_folders_and_hidden_files_are_no_classes_and_no_images(tmp_path, caplog):
    make_folders(tmp_path)
    for file in (
        "__MACOSX/cat/0.png",
        "@tmp/0.png",
        "~snapshot/0.png",
        "Network Trash Folder/0.png",
        "@eaDir/0.png",
        "cat/@eaDir/0.png",
        "cat/._0.png",
        "dog/.0.png",
    ):
        path = tmp_path / "train" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no image")
    (tmp_path / "train" / "cat" / "up").symlink_to("..")
    (tmp_path / "train" / ".c").symlink_to("nowhere")
    source = opened(tmp_path)
    assert len(source) == 4 and [pixels(source, i) for i in range(4)]


def test_what_is_left_out_is_told_once_with_its_number(tmp_path, caplog):
    make_folders(tmp_path)
    for name in (
        "cat/a.heic",
        "dog/a.heic",
        "dog/b.HEIC",
        "dog/c.xml",
        "dog/d.jfif",
        "e.png",
        ".net/f.png",
        "dog/.more/g.png",
    ):
        path = tmp_path / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for rank in (0, 1, 2):
        assert len(opened(tmp_path, rank=rank)) == 5
    (record,) = caplog.records
    sentence = record.getMessage()
    assert record.name == "vmamba" and sentence.startswith(f"left out of '{tmp_path / 'train'}': 3 .heic ('")
    assert f"2 hidden folder ('{tmp_path / 'train' / '.net'}', ...)" in sentence and "1 .xml ('" in sentence
    assert f"1 beside the folders of classes ('{tmp_path / 'train' / 'e.png'}')" in sentence
    opened(tmp_path, training=False)
    assert len(caplog.records) == 1


def test_a_class_of_unknown_suffixes_says_so(tmp_path):
    make_folders(tmp_path)
    for i in range(2):
        (tmp_path / "train" / "cat" / f"{i}.png").rename(tmp_path / "train" / "cat" / f"{i}.heic")
    with pytest.raises(UserError, match=r"no image in class cat \(left out: 2 .heic \('.*', \.\.\.\)\); fill"):
        opened(tmp_path)


@pytest.mark.parametrize("folder", ["train", "train/cat", "train/cat/more"])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, folder):
    make_folders(tmp_path)
    (tmp_path / "train" / "cat" / "more").mkdir()
    deny(monkeypatch, tmp_path / folder)
    with pytest.raises(UserError, match=f"cannot read '{tmp_path / folder}': Permission denied; make it readable"):
        opened(tmp_path)


def deny(monkeypatch, folder: Path) -> None:
    """Let nobody list `folder`; the tests may run as root, whom permissions do not stop."""
    scandir = os.scandir

    def refusing(path):
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_one_class_is_evaluated_and_not_trained(tmp_path):
    make_folders(tmp_path, train=("cat",), val=("cat",))
    assert len(opened(tmp_path, "EVAL_MODE", True, training=False, classes=1)) == 2
    for classes in (1, 2):
        with pytest.raises(UserError, match="train' has one class, and training tells classes apart"):
            opened(tmp_path, classes=classes)
    make_archives(tmp_path, labels=(0, 0))
    assert len(opened(tmp_path, "DATA.ZIP_MODE", True, training=False, classes=1)) == 2
    with pytest.raises(UserError, match="train_map.txt' has one class, and training tells classes apart"):
        opened(tmp_path, "DATA.ZIP_MODE", True, classes=1)


def test_names_that_are_no_text_do_not_end_who_tells_them(tmp_path):
    make_folders(tmp_path)
    try:
        (tmp_path / "train" / "cat" / os.fsdecode(b"\xff.png")).write_text("no image")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes text only")
    source = opened(tmp_path)
    (bad,) = [i for i in range(len(source)) if "udcff" in source.name(i)]
    assert source.name(bad).encode()
    with pytest.raises(UnreadableImage) as error:
        source.load(bad, 3)
    assert str(error.value).encode().endswith(b"\\udcff.png': it is not an image of a format that Pillow knows")


def test_validation_must_have_the_same_classes(tmp_path):
    make_folders(tmp_path, train=("cat", "dog"), val=("cat", "eel", "fox"))
    message = "other classes in val/ than in train/; only in val/: eel, fox; only in train/: dog"
    with pytest.raises(UserError, match=message):
        opened(tmp_path, training=False)


def test_classes_that_look_the_same_are_told_apart(tmp_path):
    make_folders(tmp_path, train=("caf\u00e9", "dog"), val=("cafe\u0301", "dog"))
    if len(list(tmp_path.rglob("caf\u00e9"))) > 1:
        pytest.skip("this file system takes both for one name")
    with pytest.raises(UserError, match=r"in train/: café; some look the same in other Unicode forms \(NFC, NFD\): re"):
        opened(tmp_path, training=False)


def test_only_imagenet_comes_in_archives():
    with pytest.raises(UserError, match="--zip reads archives of imagenet's form, but DATA.DATASET is 'digits'"):
        opened("", "DATA.ZIP_MODE", True, dataset="digits", classes=10)


def test_a_data_path_is_needed_and_is_a_folder(tmp_path):
    with pytest.raises(UserError, match="name it with --data-path"):
        opened("")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        opened(tmp_path / "file")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("train_map.txt", "n0/a 0.png\t0\nn1/a 1.png\n", r"train_map.txt', line 2: 'n1/a 1.png' is not"),
        ("train_map.txt", "n0/a 0.png\t0\n\nn1/a 1.png\tone\n", r"train_map.txt', line 3: "),
        ("train_map.txt", "n0/a 0.png\t0\nn1/a 1.png\t-1\n", r"line 2: "),
        ("train_map.txt", "n0/a 0.png\t0\nn1/a 1.png\t2\n", r"line 2: label 2 is out of range; MODEL.NUM_CLASSES is 2"),
        ("train_map.txt", "n0/a 0.png\t0\n", r"has no image of class 1; MODEL.NUM_CLASSES is 2"),
        (
            "train_map.txt",
            "n0/a 0.png\t0\nn1/no.png\t1\n",
            r"train.zip' lacks 1 of the 2 files .* 'n1/no.png'; it holds",
        ),
        (
            "train_map.txt",
            "n0/a 0.png\t0\nn1/a 1.png\t1\n\n/n0/a 0.png\t1\n",
            r"line 4: 'n0/a 0.png' stands in line 1 al",
        ),
        ("train_map.txt", "", "names no image"),
        ("train_map.txt", None, "has no train_map.txt: it holds train.zip, val.zip, val_map.txt"),
        ("train.zip", None, "has no train.zip"),
        ("train.zip", "PK but not a zip", "train.zip' is not a zip archive"),
    ],
)
def test_what_broken_archives_say(tmp_path, file, content, message):
    make_archives(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        opened(tmp_path, "DATA.ZIP_MODE", True)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_and_other_files_are_named(tmp_path, kind):
    make_folders(tmp_path)
    bad, other = (tmp_path / "train" / "dog" / f"{i}.png" for i in (0, 1))
    bad.write_bytes(encoded(0, kind)[:-200])
    other.write_text("no image")
    source = opened(tmp_path)
    for index, path in ((2, bad), (3, other)):
        with pytest.raises(UnreadableImage, match=f"cannot read '{path}'"):
            source.load(index, 3)


@pytest.mark.parametrize("below", ["", "train"])
def test_a_share_of_each_class_is_held_out(tmp_path, below):
    for name, count in (("a", 20), ("b", 5), ("c", 2)):
        (tmp_path / below / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / below / name / f"{number}.png")
    parts = {}
    for seed in (0, 1):
        options = ("DATA.VAL_FRACTION", 0.2, "SEED", seed)
        parts[seed] = [[*opened(tmp_path, *options, training=t, classes=3).samples] for t in (True, False)]
    assert parts[0] == parts[1]
    training, held_out = parts[0]
    assert [sum(label == k for _, label in training) for k in range(3)] == [16, 4, 1]
    assert [sum(label == k for _, label in held_out) for k in range(3)] == [4, 1, 1]
    assert not {*training} & {*held_out} and len({*training} | {*held_out}) == 27
    (tmp_path / below / "c" / "1.png").unlink()
    with pytest.raises(UserError, match="has one image in class c, and DATA.VAL_FRACTION needs two"):
        opened(tmp_path, *options, training=False, classes=3)
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="DATA.VAL_FRACTION is 0.2 and .* has a folder val; set it to 0"):
        opened(tmp_path, *options, classes=3)
