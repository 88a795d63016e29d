"""What sizes cost and bring, and what a model is made of."""

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml

from vmamba import create_model
from vmamba.analysis import zoo
from vmamba.analysis.scaling import scale
from vmamba.analysis.summary import modules, stages, summary
from vmamba.errors import UserError
from vmamba.models.flops import complexity
from vmamba.runtime.records import read_metrics


def test_costs_grow_with_the_pixels_and_accuracy_is_that_of_the_run(digits_run, tmp_path):
    data = dict(weights=[str(digits_run / "last.pth")], cfg="configs/vmamba_digits.yaml")
    small, large = scale(models=["vmamba_digits"], sizes=[32, 64], device="cpu", output=str(tmp_path), **data)
    head = 64 * 10 / 1e9
    assert large["multiply-adds (G)"] - head == pytest.approx(4 * (small["multiply-adds (G)"] - head), rel=1e-3)
    assert large["parameters"] == small["parameters"] == 139_498
    last = read_metrics(digits_run / "metrics.jsonl")[-1]
    assert small["top-1 (%)"] == pytest.approx(max(last["acc1"], last["ema_acc1"]))
    assert small["weights"] == "trained on digits (10 classes)"
    assert small["data"] == "digits (10 classes)"
    assert json.loads((tmp_path / "scale.json").read_text()) == [small, large]
    for name in ("scale.pdf", "scale.png", "scale.md"):
        assert (tmp_path / name).stat().st_size > 100


def test_accuracy_needs_weights_and_data(tmp_path):
    with pytest.raises(UserError, match="needs both --weights"):
        scale(models=["vmamba_digits"], cfg="configs/vmamba_digits.yaml", output=str(tmp_path))


@pytest.mark.parametrize(
    ("model", "classes", "channels", "sentence"),
    [
        ("vmamba_digits", 2, 1, r"last.pth' has MODEL.NUM_CLASSES 10, but '.*other.yaml' has 2; name the config that"),
        ("vmamba_digits", 10, 3, r"last.pth' has MODEL.IN_CHANS 1, but '.*other.yaml' has 3; name the config that"),
        ("resnet10t", 10, 3, r"mine.pth' has MODEL.NUM_CLASSES 1000, but '.*other.yaml' has 10; name the config that"),
    ],
)
def test_accuracy_is_of_weights_with_the_config_s_classes_and_channels(
    model, classes, channels, sentence, digits_run, tmp_path
):
    """Ten classes' weights on a data set of two had an accuracy, two classes' on one of ten a traceback."""
    weights = digits_run / "last.pth"
    if model == "resnet10t":
        weights = tmp_path / "mine.pth"
        torch.save(timm.create_model(model).state_dict(), weights)
    config = {"BASE": str(Path("configs/vmamba_digits.yaml").resolve())}
    config["MODEL"] = {"NUM_CLASSES": classes, "IN_CHANS": channels}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=sentence):
        scale(
            models=[model],
            sizes=[32],
            weights=[str(weights)],
            cfg=str(tmp_path / "other.yaml"),
            device="cpu",
            output=str(tmp_path),
        )


def test_the_stages_of_the_summary_are_the_whole_model_and_what_the_modules_are():
    subject = zoo.create("vmamba_tiny_s1l8", 64)
    rows = stages(subject.model, 64)
    cost = complexity(subject.model, 64)
    assert [row["part"] for row in rows] == ["stem", *(f"stage {number}" for number in range(4)), "classifier"]
    assert [row["blocks"] for row in rows] == [None, 2, 2, 8, 2, None]
    assert sum(row["parameters"] for row in rows) == cost.parameters == 30_249_064
    assert sum(row["multiply-adds (G)"] for row in rows) == pytest.approx(cost.macs / 1e9)
    listed = {row["module"]: row["parameters"] for row in modules(subject, 64, 2)}
    names = ["patch_embed", *(f"layers.{number}" for number in range(4)), "classifier"]
    assert [row["parameters"] for row in rows] == [listed[name] for name in names]


def test_the_multiply_adds_of_a_stage_are_those_of_its_blocks_and_of_the_downsampling_behind_it():
    model = create_model("vmamba_digits", num_classes=10, in_chans=1)
    stem, first, last, classifier = (row["multiply-adds (G)"] * 1e9 for row in stages(model, 32))
    convolutions = 16 * 16 * 16 * 9 + 8 * 8 * 32 * 16 * 9
    assert stem == pytest.approx(convolutions + 5 * 16 * 16 * 16 + 5 * 8 * 8 * 32)  # and their norms
    assert classifier == pytest.approx(5 * 4 * 4 * 64 + 64 * 10)
    assert first > 4 * 4 * 64 * 32 * 9 + 5 * 4 * 4 * 64  # of the downsampling alone
    whole = create_model("vmamba_digits", num_classes=10, in_chans=1, depths=(0, 2))
    assert stages(whole, 32)[1]["multiply-adds (G)"] * 1e9 == pytest.approx(4 * 4 * 64 * 32 * 9 + 5 * 4 * 4 * 64)
    assert stages(whole, 32)[2]["multiply-adds (G)"] * 1e9 == pytest.approx(last)


def test_the_summary_names_modules_with_their_parameters_and_shapes(tmp_path):
    subject = zoo.create("vmamba_digits", 48)
    rows = {row["module"]: row for row in modules(subject, 48, 3)}
    assert rows["layers.0"]["output"] == "1 x 12 x 12 x 32"
    assert rows["layers.1"]["output"] == "1 x 6 x 6 x 64"
    assert rows["classifier.head"] == {
        "module": "classifier.head",
        "class": "Linear",
        "parameters": 65_000,
        "output": "1 x 1000",
    }
    assert "layers.0.blocks" in rows
    assert "layers.0.blocks.0" not in rows  # four names
    text = summary("resnet18", size=64, depth=1, output=str(tmp_path / "summary.md"))
    assert summary("resnet18", size=64, depth=1, output=str(tmp_path / "summary.md")) == text
    (tmp_path / "README.md").write_text("# Mine, of 5 parameters")
    with pytest.raises(UserError, match="README.md' is there already and is no summary of a model; remove it, or"):
        summary("resnet18", size=64, depth=1, output=str(tmp_path / "README.md"))
    assert text.startswith("resnet18, random weights; 64 x 64 pixels: 11,689,512 parameters")
    assert text == (tmp_path / "summary.md").read_text()
