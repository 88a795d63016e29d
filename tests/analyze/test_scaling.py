"""What sizes cost and bring, and what a model is made of."""

import json

import pytest

from vmamba import create_model
from vmamba.analysis import zoo
from vmamba.analysis.scaling import scale
from vmamba.analysis.summary import modules, stages, summary
from vmamba.errors import UserError
from vmamba.models.flops import complexity
from vmamba.runtime.records import read_metrics


def test_costs_grow_with_the_pixels_and_accuracy_is_that_of_the_run(digits_run, tmp_path):
    weights = [str(digits_run / "last.pth")]
    cfg = "configs/vmamba_digits.yaml"
    small, large = scale(["vmamba_digits"], [32, 64], weights, cfg, None, "cpu", str(tmp_path))
    head = 64 * 10 / 1e9
    assert large["multiply-adds (G)"] - head == pytest.approx(4 * (small["multiply-adds (G)"] - head), rel=1e-3)
    assert large["parameters (M)"] == small["parameters (M)"]
    assert small["top-1 (%)"] == pytest.approx(read_metrics(digits_run / "metrics.jsonl")[-1]["ema_acc1"])
    assert small["weights"] == "trained on digits, not on ImageNet"
    assert json.loads((tmp_path / "scale.json").read_text()) == [small, large]
    for name in ("scale.pdf", "scale.png", "scale.md"):
        assert (tmp_path / name).stat().st_size > 100


def test_accuracy_needs_weights_and_data(tmp_path):
    with pytest.raises(UserError, match="needs both --weights"):
        scale(["vmamba_digits"], [32], [], "configs/vmamba_digits.yaml", None, "cpu", str(tmp_path))


def test_the_stages_of_the_summary_are_the_whole_model():
    model = create_model("vmamba_tiny_s1l8").eval()
    rows = stages(model, 224)
    cost = complexity(model, 224)
    assert [row["blocks"] for row in rows] == [2, 2, 8, 2, None]
    assert sum(row["parameters"] for row in rows) == cost.parameters == 30_249_064
    assert sum(row["multiply-adds (G)"] for row in rows) == pytest.approx(cost.macs / 1e9)
    assert rows[-1]["parameters"] == 768 * 1000 + 1000 + 2 * 768
    downsample = sum(parameter.numel() for parameter in model.layers[0].downsample.parameters())
    blocks = sum(parameter.numel() for parameter in model.layers[1].blocks.parameters())
    assert rows[1]["parameters"] == downsample + blocks


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
    text = summary("resnet18", None, 64, 1, str(tmp_path / "summary.md"))
    assert "11,689,512 parameters" in text
    assert text == (tmp_path / "summary.md").read_text()
