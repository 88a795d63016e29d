"""analyze/shrink.py: a copy that is smaller, goes on where it was stopped, and is looked over."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vmamba.analysis import shrinking
from vmamba.analysis.shrinking import shrink
from vmamba.classification.label_files import read_labels
from vmamba.data.images import decode_pixels
from vmamba.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Photographs of two classes: wide, tall, small, a PNG, and one that is none."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    for name, size in {
        "a/wide.jpg": (200, 100),
        "a/tall.JPEG": (90, 300),
        "b/small.jpg": (40, 30),
        "b/deep/p.png": (120, 120),
    }.items():
        path = tmp_path / "all" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.resize(size, Image.Resampling.BICUBIC).save(path)
    (tmp_path / "all" / "train" / "b" / "bad.jpg").write_bytes(b"no image")
    return tmp_path / "all"


SIZES = {"a/wide.jpg": (128, 64), "a/tall.JPEG": (64, 213), "b/small.jpg": (40, 30), "b/deep/p.png": (64, 64)}


@pytest.mark.parametrize("workers", [1, 2])
def test_large_images_become_small(folder, tmp_path, workers, capsys):
    out = tmp_path / "out"
    result = shrink(str(folder), output=str(out), side=64, workers=workers)
    assert {
        path.relative_to(out / "train").as_posix(): Image.open(path).size for path in (out / "train").rglob("*.*")
    } == SIZES
    assert (out / "train/b/small.jpg").read_bytes() == (folder / "train/b/small.jpg").read_bytes()
    expected = io.BytesIO()
    small = Image.open(folder / "train/a/wide.jpg").resize((128, 64), Image.Resampling.BICUBIC)
    small.save(expected, "JPEG", quality=90)
    assert (out / "train/a/wide.jpg").read_bytes() == expected.getvalue()
    assert (result["made"], result["copied"], result["kept"], result["finished"]) == (3, 1, 0, True)
    assert len(result["unreadable"]) == 1 and "bad.jpg" in result["unreadable"][0]
    assert json.loads((out / "shrunk.json").read_text()) == result and "left out, 1 image" in capsys.readouterr().out


def copied(out):
    return {path.relative_to(out / "train").as_posix(): path.read_bytes() for path in (out / "train").rglob("*.*")}


def counts(result):
    return tuple(result[name] for name in ("made", "copied", "kept", "removed"))


def test_what_is_whole_is_kept_and_the_rest_made_again(folder, tmp_path):
    out = tmp_path / "out"
    shrink(str(folder), output=str(out), side=64, workers=1)
    first = copied(out)
    wide = bytearray(first["a/wide.jpg"])
    wide[-1000:-500] = bytes(500)  # a JPEG of the right size still
    (out / "train/a/wide.jpg").write_bytes(wide)
    (out / "train/b/small.jpg").write_bytes(b"")
    (out / "train/a/tall.JPEG").unlink()
    assert counts(shrink(str(folder), output=str(out), side=64, workers=1)) == (2, 1, 1, 0) and copied(out) == first
    assert counts(shrink(str(folder), output=str(out), side=64, workers=1)) == (0, 0, 4, 0)


def test_what_has_changed_is_made_again_and_what_is_gone_removed(folder, tmp_path, capsys):
    out = tmp_path / "out"
    shrink(str(folder), output=str(out), side=64, workers=1)
    (out / "train/a/of_the_user.jpg").write_bytes(b"stays")
    before = copied(out)
    Image.new("RGB", (200, 100)).save(folder / "train/a/wide.jpg")  # another image of the same size
    (folder / "train/a/tall.JPEG").unlink()
    (folder / "train/b/small.jpg").write_bytes(b"no image any more")
    result = shrink(str(folder), output=str(out), side=64, workers=1)
    assert counts(result) == (1, 0, 1, 2) and len(result["unreadable"]) == 2
    assert "removed, 2 copies of what is no longer there" in capsys.readouterr().out
    now = copied(out)
    assert now.keys() == before.keys() - {"a/tall.JPEG", "b/small.jpg"}
    assert now["a/wide.jpg"] != before["a/wide.jpg"] and now["a/of_the_user.jpg"] == b"stays"
    (out / "shrunk.jsonl").write_text('["../all/train/a/wide.jpg", 1, 2]\n["/etc/x", 1, 2]\n7\n[[], 1, 2]\n["b/dee')
    assert counts(shrink(str(folder), output=str(out), side=64, workers=1)) == (2, 0, 0, 0)


def test_a_copy_that_was_stopped_goes_on(folder, tmp_path, monkeypatch):
    def stopped(data, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(data)
        return smaller(data, *rest)

    written, smaller, out = [], shrinking._smaller, tmp_path / "out"
    monkeypatch.setattr(shrinking, "_smaller", stopped)
    monkeypatch.setattr(shrinking, "_AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        shrink(str(folder), output=str(out), side=64, workers=1)
    assert not json.loads((out / "shrunk.json").read_text())["finished"]
    monkeypatch.undo()
    assert counts(shrink(str(folder), output=str(out), side=64, workers=1)) == (1, 1, 2, 0)


def test_names_stay_so_that_lists_of_them_fit_and_what_is_not_copied_is_named(folder, tmp_path, capsys):
    (folder / "labels.csv").write_text("train/a/wide.jpg,a\ntrain/b/deep/p.png,b\n")
    (folder / "train/c").mkdir()
    for name in ("train/c/1.heic", "train/c/2.heic", "train/a/.hidden.jpg", "train/a/bands.npy"):
        (folder / name).write_bytes(b"")
    shrink(str(folder), output=str(tmp_path / "out"), side=64, workers=1)
    told = capsys.readouterr().out
    assert "2 .heic ('" in told and "train/c/1.heic', ...)" in told and "1 .csv ('" in told
    assert "1 .npy ('" in told and "1 hidden image ('" in told
    assert len(read_labels(folder / "labels.csv", tmp_path / "out")) == 2
    with Image.open(tmp_path / "out/train/b/deep/p.png") as image:
        assert image.format == "JPEG"
    assert decode_pixels(tmp_path / "out/train/b/deep/p.png", 3, "it").shape == (3, 64, 64)


def test_small_ones_are_read_and_what_no_jpeg_holds_is_named(folder, tmp_path):
    broken = (folder / "train/b/small.jpg").read_bytes()
    (folder / "train/b/half.jpg").write_bytes(broken[: len(broken) // 2])
    Image.new("L", (70000, 66)).save(folder / "train/a/long.png")
    result = shrink(str(folder), output=str(tmp_path / "out"), side=64, workers=1)
    assert len(result["unreadable"]) == 3 and not (tmp_path / "out/train/b/half.jpg").exists()
    (sentence,) = [each for each in result["unreadable"] if "long.png" in each]
    assert "it would have 67,879 x 64 pixels, and a JPEG has at most 65,535 a side" in sentence


def test_what_others_have_put_there_is_not_written_over(folder, tmp_path):
    out = tmp_path / "out"
    (out / "train/a").mkdir(parents=True)
    (out / "train/a/wide.jpg").write_bytes(b"the user's")
    with pytest.raises(UserError, match=r"' holds files that are no copy made here \(train\), .*choose an empty --out"):
        shrink(str(folder), output=str(out), side=64, workers=1)
    assert (out / "train/a/wide.jpg").read_bytes() == b"the user's" and [*out.iterdir()] == [out / "train"]
    earlier = {"folder": str(folder), "side": 64, "quality": 90}
    for text, words in (
        ("[]", "shrunk.json' is no record of a copy; choose an empty --output"),
        ("{", "shrunk.json' cannot be read .*; choose an empty --output"),
        (json.dumps(earlier), "holds a copy with names None, not kept; choose another --output"),
    ):
        (out / "shrunk.json").write_text(text)
        with pytest.raises(UserError, match=words):
            shrink(str(folder), output=str(out), side=64, workers=1)


def test_mistakes_are_sentences(folder, tmp_path):
    out = str(tmp_path / "out")
    shrink(str(folder), output=out, side=64, workers=1)
    with pytest.raises(UserError, match="holds a copy with side 64, not 80; choose another --output"):
        shrink(str(folder), output=out, side=80, workers=1)
    for inside in (folder / "copy", folder.parent, folder):
        with pytest.raises(UserError, match="lie in each other"):
            shrink(str(folder), output=str(inside), workers=1)
    with pytest.raises(UserError, match="is no folder; name the one that holds the images"):
        shrink(str(tmp_path / "no"), output=str(tmp_path / "new"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        shrink(str(tmp_path / "empty"), output=str(tmp_path / "new"))
