"""The drawing of a model: what it says is what the model does."""

import pytest

import vmamba
from vmamba.analysis.architecture import architecture, steps
from vmamba.errors import UserError


def test_the_steps_of_a_block_are_its_modules():
    first = lambda name, **options: vmamba.create_model(name, **options).layers[0].blocks[0]  # noqa: E731
    scan = "selective scan\n4 routes, summed"
    one = ["norm", "linear", "depthwise\nconv 3 x 3", "SiLU", scan, "norm", "linear"]
    assert steps(first("vmamba_tiny_s1l8")) == [one, ["norm", "linear", "GELU", "linear"]]
    (gated,) = steps(first("vmamba_tiny"))
    assert gated == [*one[:-1], "times gate", "linear"]
    small = steps(first("vmamba_tiny_m2", routes=("row",), ssm_conv=1, mlp_ratio=0.0))
    assert small == [["norm", "linear", "GELU", "SSD scan\n1 route, summed", "norm", "linear"]]


def test_the_picture_is_written_and_other_models_are_refused(tmp_path):
    architecture("vmamba_digits", output=str(tmp_path))
    assert (tmp_path / "architecture.png").stat().st_size > 10_000 and (tmp_path / "architecture.pdf").exists()
    with pytest.raises(UserError, match="resnet18 has no routes to draw; name one of vmamba.list_models"):
        architecture("resnet18", output=str(tmp_path))
