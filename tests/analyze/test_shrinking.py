"""analyze/shrink.py: a copy that is smaller, goes on where it was stopped, and is looked over."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vmamba.analysis.shrinking import shrink
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


SIZES = {"a/wide.jpg": (128, 64), "a/tall.JPEG": (64, 213), "b/small.jpg": (40, 30), "b/deep/p.png.jpg": (64, 64)}


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


def test_what_is_whole_is_kept_and_the_rest_made_again(folder, tmp_path):
    out = tmp_path / "out"
    shrink(str(folder), output=str(out), side=64, workers=1)
    first = {path: path.read_bytes() for path in (out / "train").rglob("*.*")}
    (out / "train/a/wide.jpg").write_bytes(first[out / "train/a/wide.jpg"][:-9])  # cut off
    (out / "train/b/small.jpg").write_bytes(b"")
    (out / "train/a/tall.JPEG").unlink()
    result = shrink(str(folder), output=str(out), side=64, workers=1)
    assert (result["made"], result["copied"], result["kept"]) == (2, 1, 1)
    assert {path: path.read_bytes() for path in (out / "train").rglob("*.*")} == first


def test_no_image_takes_the_name_of_another_and_small_ones_are_read(folder, tmp_path):
    broken = (folder / "train/b/small.jpg").read_bytes()
    (folder / "train/b/half.jpg").write_bytes(broken[: len(broken) // 2])
    result = shrink(str(folder), output=str(tmp_path / "out"), side=64, workers=1)
    assert len(result["unreadable"]) == 2 and not (tmp_path / "out/train/b/half.jpg").exists()
    Image.new("RGB", (120, 120)).save(folder / "train/b/deep/p.png.jpg")
    with pytest.raises(UserError, match="would become 'p.png.jpg', a name that lies beside it; rename one"):
        shrink(str(folder), output=str(tmp_path / "other"), side=64, workers=1)


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
