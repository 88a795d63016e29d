"""What feeds training, part by part: what is timed and what is said of it.  No time itself is tested."""

import json

import pytest
import torch
from PIL import Image

from vmamba.analysis.dataloading import MODES, dataloading, endless_timm, make_jpegs, summary
from vmamba.classification.data import build_eval_loader
from vmamba.config import get_config
from vmamba.errors import UserError

SMALL = ["DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "AMP.ENABLE", "false"]
SMALL += ["MODEL.OPTIONS.depths", "[1,1]", "MODEL.OPTIONS.dims", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataloading")
    make_jpegs(folder / "jpegs", 20)
    return folder


def test_both_modes_are_timed_on_jpegs_that_are_made_once(folder):
    kept = sorted((folder / "jpegs").rglob("*.jpg"))
    made = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 30
    opts = [*SMALL, "DATA.NUM_WORKERS", "1"]  # fewer than are timed
    told = dataloading(images=20, workers=[0, 2], seconds=0.1, opts=opts, device="cpu", output=str(folder))
    assert sorted((folder / "jpegs").rglob("*.jpg")) == kept and [path.stat().st_mtime_ns for path in kept] == made
    for mode in MODES:
        found = told[mode]
        assert list(found["parts"]) == ["reading", "decoding", "augmentation", "collation", "transfer", "step"]
        assert all(value > 0 for value in found["parts"].values())
        assert list(found["loading"]) == list(found["from_files"]) == list(found["by_timm"]) == [0, 2]
        core = sum(found["parts"][name] for name in ("decoding", "augmentation", "collation"))
        assert 0.3 * core < found["core"] < 3 * core
    assert json.loads((folder / "dataloading.json").read_text())["batch"] == 4
    page = (folder / "dataloading.md").read_text()
    assert "## Training" in page and "What limits evaluation is" in page


def test_the_decoder_of_the_config_is_timed(folder, tmp_path):
    opts = [*SMALL, "DATA.IMG_SIZE", "48", "DATA.DECODE", "torchvision"]
    told = dataloading(
        data_path=str(folder / "jpegs"), workers=[0], modes=["training"], seconds=0.1, device="cpu",
        opts=[*opts, "MODEL.NUM_CLASSES", "10"], output=str(tmp_path),
    )  # fmt: skip
    assert all(value > 0 for value in told["training"]["parts"].values())


def test_generated_jpegs_are_of_imagenets_sizes(folder):
    paths = [folder / "jpegs" / "train" / f"class{index}" / f"{index}.jpg" for index in range(6)]
    assert [Image.open(path).size for path in paths[:1] + paths[3:6]] == [
        (500, 375),
        (500, 333),
        (375, 500),
        (333, 500),
    ]
    assert 95_000 < paths[0].stat().st_size < 115_000


def test_what_limits_and_the_cores_that_would_be_enough_by_hand():
    found = {"loading": {1: 100.0, 4: 390.0}, "parts": {"transfer": 1e-4}, "step": 2000.0, "core": 0.010}
    said = summary("training", found)
    assert "What limits training is loading by 4 processes, 390 images/s" in said
    assert "takes 10.00 ms of a core: that needs 20.0 cores" in said
    assert "is the device, 50 images/s" in summary("training", found | {"step": 50.0})


@pytest.mark.parametrize("given", [{}, {"data_path": "somewhere"}])
def test_another_task_is_a_sentence(tmp_path, given):
    with pytest.raises(UserError, match="scenes_detection.yaml is of detection; this times the images of a classif"):
        dataloading(cfg="configs/scenes_detection.yaml", output=str(tmp_path), **given)


def test_no_jpegs_are_made_where_other_data_is_named(tmp_path):
    opts = [*SMALL[2:6], "DATA.DATASET", "digits", "DATA.BATCH_SIZE", "20"]
    cfg = "configs/vmamba_digits.yaml"
    dataloading(cfg=cfg, workers=[0], modes=["evaluation"], seconds=0.1, device="cpu", opts=opts, output=str(tmp_path))
    assert not (tmp_path / "jpegs").exists() and "images of digits." in (tmp_path / "dataloading.md").read_text()


def test_an_image_that_cannot_be_read_is_a_sentence_or_left_out(tmp_path):
    make_jpegs(tmp_path / "jpegs", 20)
    broken = tmp_path / "jpegs/val/class3/3.jpg"
    broken.write_bytes(broken.read_bytes()[:3000])
    told = dict(data_path=str(tmp_path / "jpegs"), workers=[0], modes=["evaluation"], seconds=0.1, device="cpu")
    told |= {"output": str(tmp_path)}
    opts = [*SMALL, "MODEL.NUM_CLASSES", "10"]
    with pytest.raises(UserError, match="cannot read '.*val/class3/3.jpg': .*; mend or remove it, or set DATA.SKIP"):
        dataloading(**told, opts=opts)
    assert dataloading(**told, opts=[*opts, "DATA.SKIP_BAD_IMAGES", "true"])["evaluation"]["core"] > 0


def test_timms_loader_beside_it_gives_the_same_images(folder):
    """To the last bits: timm takes the mean off what is 255 times as large."""
    opts = ["DATA.DATA_PATH", str(folder / "jpegs"), "MODEL.NUM_CLASSES", "10", "DATA.IMG_SIZE", "48"]
    config = get_config(None, [*opts, "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0", "TEST.CROP_PCT", "0.9"])
    loader = build_eval_loader(config, rank=0, world_size=1)
    theirs = endless_timm(config, loader, False, torch.device("cpu"), 0)
    for (images, labels), batch in zip(theirs, loader, strict=False):
        ours, expected = loader.finish(batch)
        assert torch.equal(labels, expected) and torch.allclose(images, ours, atol=1e-5)
    policy = ["AUG.AUTO_AUGMENT", "rand-m10-n60-inc1"]  # which posterizes to 0 bits
    config = get_config(None, [*opts, *policy, "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0"])
    shape = next(endless_timm(config, loader, True, torch.device("cpu"), 0))[0].shape
    assert shape == (4, 3, 48, 48)
