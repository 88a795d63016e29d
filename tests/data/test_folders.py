"""Folders: which files are images, what is passed over and told, and what the system refuses."""

import errno
import os
from pathlib import Path

import pytest

from vmamba.data.folders import LeftOut, contents, image_files, listing, what_is
from vmamba.errors import UserError


def make(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def below(root: Path, left_out: LeftOut | None = None) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in image_files(root, left_out)]


def look_into(folder: Path) -> None:
    listing(folder, LeftOut())


def deny(monkeypatch, name: str, number: int = errno.EACCES) -> None:
    """Let the system refuse to list or to look at what is called `name`; root may read everything."""

    def refusing(function):
        def call(path, *args, **kwargs):
            if isinstance(path, (str, os.PathLike)) and Path(path).name == name:
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir))


def test_images_come_folder_by_folder_in_the_order_of_torchvision(tmp_path):
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    make(tmp_path, *(f"all/{name}" for name in ("b/2.png", "b/10.JPEG", "a.jpg", "b/c/1.bmp", "b-c/1.png", "z.tif")))
    theirs = [path for path, _ in make_dataset(str(tmp_path), {"all": 0}, IMG_EXTENSIONS)]
    assert image_files(str(tmp_path / "all")) == theirs and len(theirs) == 6


def test_every_suffix_of_pillow_counts_and_others_are_told(tmp_path):
    make(tmp_path, "1.jfif", "2.JPEG", "3.gif", "4.webp", "x/5.HEIC", "x/6.heic", "notes.txt", "README", ".DS_Store")
    left_out = LeftOut()
    assert below(tmp_path, left_out) == ["1.jfif", "2.JPEG", "3.gif", "4.webp"]
    assert left_out.counts == {".heic": 2, ".txt": 1, "without a suffix": 1}
    assert str(left_out).startswith(f"2 .heic ('{tmp_path / 'x' / '5.HEIC'}', ...), 1 ")


def test_what_systems_put_beside_images_is_passed_over(tmp_path):
    make(
        tmp_path, "1.png", "._1.png", ".cache/2.png", "__MACOSX/3.png", "a/@eaDir/1.png/SYNOPHOTO_THUMB.jpg", "a/4.png"
    )
    left_out = LeftOut()
    assert below(tmp_path, left_out) == ["1.png", "a/4.png"]
    assert left_out.examples == {
        "hidden image": str(tmp_path / "._1.png"),
        "hidden folder": str(tmp_path / ".cache"),
    }
    assert listing(tmp_path, LeftOut()) == (["a"], ["._1.png", "1.png"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_would_keep_its_reader_waiting_is_left_out_and_told(tmp_path):
    make(tmp_path, "1.png")
    os.mkfifo(tmp_path / "p.png")
    for name, target in {"2.png": "1.png", "3.png": "p.png", "4.png": "/dev/zero", "5.png": "gone.png"}.items():
        (tmp_path / name).symlink_to(target)
    left_out = LeftOut()
    assert below(tmp_path, left_out) == ["1.png", "2.png", "5.png"]
    assert left_out.counts == {"pipe or device": 3}


def test_links_are_followed_but_not_back_up(tmp_path):
    make(tmp_path, "train/a/1.png", "train/b/2.png", "elsewhere/3.png", "elsewhere/deep/4.png")
    a = tmp_path / "train" / "a"
    for name, target in {
        "up": "..",
        "self": ".",
        "root": tmp_path,
        "more": tmp_path / "elsewhere",
        "5.png": tmp_path / "elsewhere" / "3.png",
        "gone.png": tmp_path / "gone",
    }.items():
        (a / name).symlink_to(target)
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "begin").symlink_to(a)
    left_out = LeftOut()
    assert below(a, left_out) == ["1.png", "5.png", "gone.png", "more/3.png", "more/deep/4.png"]
    assert left_out.counts == {"linked to a folder it lies in": 5}


@pytest.mark.parametrize("target", ["..", ".", "../train", "{root}", "{root}/..", "{disk}"])
@pytest.mark.parametrize("through", ["data", "elsewhere/../data", "link"])
def test_a_folder_that_links_to_where_it_lies_holds_nothing(tmp_path, target, through):
    """As a class of a data set it would hold the other classes, and the images held out."""
    make(tmp_path, "disk/train/a/1.png", "data/val/a/2.png", "elsewhere/3.png")
    (tmp_path / "data" / "train").symlink_to(tmp_path / "disk" / "train")
    (tmp_path / "link").symlink_to("data")
    link = tmp_path / "data" / "train" / "c"
    link.symlink_to(target.format(root=tmp_path / "data", disk=tmp_path / "disk"))
    left_out = LeftOut()
    assert image_files(tmp_path / through / "train" / "c", left_out) == []
    assert left_out.counts == {"linked to a folder it lies in": 1}
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere")
    assert len(image_files(tmp_path / through / "train" / "c")) == 1
    (tmp_path / "elsewhere" / "up").symlink_to("..")  # of what a link leads to
    assert len(image_files(tmp_path / through / "train" / "c")) == 1


def test_a_folder_that_may_not_be_read_is_named_wherever_it_is(tmp_path, monkeypatch):
    make(tmp_path, "a/b/1.png")
    deny(monkeypatch, "b")
    for look in (image_files, look_into, contents):
        folder = tmp_path if look is image_files else tmp_path / "a" / "b"
        with pytest.raises(UserError, match="cannot read '.*a/b': Permission denied; make it readable"):
            look(folder)


def test_a_link_in_a_circle_is_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for look in (lambda: listing(tmp_path, LeftOut()), lambda: what_is(tmp_path / "loop")):
        with pytest.raises(UserError, match="cannot read '.*loop': Too many levels of symbolic links"):
            look()


def test_what_a_path_is(tmp_path):
    make(tmp_path, "file")
    assert what_is(tmp_path) == "folder" and what_is(tmp_path / "file") == "file"
    assert what_is(tmp_path / "none") is None and what_is(tmp_path / "file" / "none") is None
    with pytest.raises(UserError, match="cannot read '.*none': No such file or directory; check that it is there"):
        image_files(tmp_path / "none")


def test_names_that_are_no_text_are_told(tmp_path):
    try:
        make(tmp_path, os.fsdecode(b"\xff.heic"))
    except (OSError, UnicodeError):
        pytest.skip("this file system takes text only")
    left_out = LeftOut()
    image_files(tmp_path, left_out)
    assert str(left_out) == f"1 .heic ('{tmp_path}/\\udcff.heic')" and contents(tmp_path) == "it holds \\udcff.heic"
