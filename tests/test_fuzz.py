"""The readers of other people's files take anything: each byte string is read, or refused in one sentence.

A few inputs of each here; for hours: FUZZ_EXAMPLES=100000 python -m pytest tests/test_fuzz.py
"""

import io
import json
import os
import pickle
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.classification.archived import _read_map
from vmamba.config import get_config
from vmamba.data.archives import Archive
from vmamba.data.images import UnreadableImage, decode, decode_pixels, reading
from vmamba.detection.annotations import read_annotations
from vmamba.errors import UserError
from vmamba.models.pretrained import read_file
from vmamba.runtime.checkpoint import newest_checkpoint
from vmamba.runtime.shares import read_folder, save_folder

hypothesis = pytest.importorskip("hypothesis", reason="of the dev extra")
st = hypothesis.strategies

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
fuzz = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES < 1000,
    suppress_health_check=list(hypothesis.HealthCheck),
)
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# A change: what to do, where (a share of the length), with which bytes.
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "delete", "truncate", "repeat", "number"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=9),
    ),
    max_size=4,
)
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]


def changed(content, changes):
    for kind, share, data in changes:
        place = int(share * len(content))
        if kind == "number":
            data = NUMBERS[data[0] % len(NUMBERS)].to_bytes(4, "little" if data[-1] % 2 else "big")
        end = place + (0 if kind == "insert" else len(data))
        if kind == "truncate":
            content = content[:place]
        elif kind == "repeat":
            content = content[:place] + content[place // 2 : place] + content[place:]
        else:
            content = content[:place] + (b"" if kind == "delete" else data) + content[end:]
    return content


def saved(what):
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


def image(kind, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(np.arange(16 * 12 * 3, dtype=np.uint8).reshape(16, 12, 3)).convert(mode).save(file, kind)
    return file.getvalue()


STATE = {"steps_per_epoch": 3, "step": 1, "recorded": 0, "epoch": 0, "model": {"weight": torch.ones(3)}, "best": {}}
CHECKPOINTS = [saved(STATE), saved({"weight": torch.ones(3)}), pickle.dumps({"a": [1]}), b"{", b"PK\x03\x04"]
IMAGES = [
    *(image(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG2000")),
    image("PNG", "I;16"),
    image("TIFF", "F"),
    b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (3, 2, 2), }".ljust(128) + bytes(12),
]
CONFIGS = [
    b"MODEL: {NAME: vmamba_tiny, OPTIONS: {depths: [1, 1], dims: 8}}\nTRAIN: {EPOCHS: 2, BASE_LR: 1e-3}\n",
    b"MODEL:\n  TYPE: vssm\n  VSSM: {EMBED_DIM: 96, DEPTHS: [2, 2, 5, 2]}\nDATA: &d {IMG_SIZE: 224}\nAUG: *d\n",
    b"!!python/object/apply:os.system ['true']\n",
    b"a: &a [x,x]\nb: &b [*a,*a]\nBASE: *b\n",
]
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
COCO = json.dumps({
    "images": [{"id": 1, "file_name": "a.png", "height": 16, "width": 12}],
    "categories": [{"id": 1, "name": "x"}],
    "annotations": [BOX | {"segmentation": [[1, 1, 6, 1, 6, 6]]},
                    BOX | {"id": 2, "iscrowd": 1, "segmentation": {"size": [16, 12], "counts": [3, 5, 184]}}],
}).encode()  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


@fuzz
@hypothesis.given(base=st.sampled_from(CONFIGS), changes=CHANGES)
def test_configs(path, base, changes):
    path.write_bytes(changed(base, changes))
    with suppress(UserError):
        get_config(str(path))


@fuzz
@hypothesis.given(base=st.sampled_from(CHECKPOINTS), changes=CHANGES, name=st.sampled_from(["last.pth", "best.2.pth"]))
def test_checkpoints(tmp_path, base, changes, name):
    (tmp_path / "run").mkdir(exist_ok=True)
    for old in (tmp_path / "run").iterdir():
        old.unlink()
    (tmp_path / "run" / name).write_bytes(changed(base, changes))
    for read in (lambda: read_file(tmp_path / "run" / name), lambda: newest_checkpoint(tmp_path / "run")):
        with suppress(UserError):
            read()


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares") / "last.sharded"
    save_folder({**STATE, "model_ema": None, "optimizer": {"state": {0: {"m": torch.ones(3)}}}}, folder, 2)
    plain = torch.load(folder / "plain.pth")
    del plain["sums"]  # by which all changes would be found before anything is read
    torch.save(plain, folder / "plain.pth")
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@fuzz
@hypothesis.given(changes=CHANGES, name=st.sampled_from([".metadata", "plain.pth", "__0_0.distcp"]))
@hypothesis.example(changes=[("overwrite", 0.09375, b"\0\0\0\0")], name=".metadata")  # another name of a tensor
@hypothesis.example(changes=[("overwrite", 0.09375, b"\0")], name=".metadata")
def test_shares(shares, changes, name):
    folder, contents = shares
    for each, content in contents.items():
        (folder / each).write_bytes(changed(content, changes) if each == name else content)
    with suppress(UserError):
        read_folder(folder)


@fuzz
@hypothesis.given(base=st.sampled_from(IMAGES), changes=CHANGES, channels=st.sampled_from([1, 3, 5]))
def test_images(base, changes, channels):
    content = changed(base, changes)
    for read in (decode, decode_pixels):
        try:
            read(content, channels, "name")
        except UnreadableImage as error:
            assert "\n" not in str(error)


@fuzz
@hypothesis.given(changes=CHANGES, key=st.sampled_from(["images", "categories", "annotations"]), value=VALUES,
                  inside=st.sampled_from(["id", "bbox", "segmentation", "image_id", "height", "name", ""]))  # fmt: skip
def test_coco(path, changes, key, value, inside):
    content = json.loads(COCO)
    if inside:
        content[key][0][inside] = value
    else:
        content[key] = value
    for text in (json.dumps(content).encode(), changed(COCO, changes)):
        path.write_bytes(text)
        try:
            read_annotations(path)
        except UserError as error:
            assert "\n" not in str(error)


@fuzz
@hypothesis.given(changes=CHANGES, names=st.lists(st.text(min_size=1, max_size=8), max_size=3))
def test_archives(tmp_path, changes, names):
    names, file = ["a/b.png", "../c.png", *(name for name in names if "\0" not in name)], io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, image("PNG"))
    place = tmp_path / "inside" / "data.zip"
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(changed(file.getvalue(), changes))
    try:
        archive = Archive(place, names)
        for index, name in enumerate(names):
            with reading(name):
                archive.read(index)
    except (UserError, UnreadableImage) as error:
        assert "\n" not in str(error)
    assert os.listdir(tmp_path) == ["inside"] and os.listdir(place.parent) == ["data.zip"]


@fuzz
@hypothesis.given(changes=CHANGES)
def test_zip_maps(path, changes):
    path.write_bytes(changed(b"a/b.png\t0\nc d.png 1\r\n\xc3\xa4.png\t2\n", changes))
    try:
        _read_map(path, 3)
    except UserError as error:
        assert "\n" not in str(error)


def test_names_in_a_checkpoint_that_are_no_text_are_a_sentence(path):
    """Found by fuzzing: bytes of its directory that are not UTF-8."""
    content = CHECKPOINTS[0]
    path.write_bytes(
        content[: content.rindex(b"archive/version")] + b"\x80" + content[content.rindex(b"archive/version") + 1 :]
    )
    with pytest.raises(UserError, match="is truncated or damaged"):
        read_file(path)
