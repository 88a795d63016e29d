"""The table of analyze/flops.py: its numbers, its files."""

import json

import pytest

from vmamba import UserError
from vmamba.analysis.complexity import flops, table


def test_table_holds_ours_and_timms_by_one_counter(tmp_path):
    flops(models=["vmamba_tiny", "swin_tiny_patch4_window7_224"], output=tmp_path)
    ours, swin = json.loads((tmp_path / "flops.json").read_text())
    assert ours["parameters without head"] == 22_124_448
    assert abs(ours["GFLOPs (multiply-adds)"] - 5.62689504) < 1e-3
    assert swin["parameters"] == 28_288_354 and abs(swin["GFLOPs (multiply-adds)"] - 4.5) < 0.05
    assert "| vmamba_tiny | 224 | 22,893,448 | 22,124,448 | 5.627 |" in (tmp_path / "flops.md").read_text()


def test_size_and_unknown_names():
    small, large = table(["vmamba_tiny_s1l8"], [32, 64])
    assert 3.5 < large["GFLOPs (multiply-adds)"] / small["GFLOPs (multiply-adds)"] < 4.1
    with pytest.raises(UserError, match="unknown model 'vmamba_tinny'"):
        table(["vmamba_tinny"], [32])


@pytest.mark.parametrize(("name", "size"), [("deit_small_patch16_224", 8), ("convnext_tiny", 8)])
def test_a_size_that_a_model_of_timms_does_not_take(name, size):
    with pytest.raises(UserError, match=f"{name} does not take images of {size} x {size} pixels"):
        table([name], [size])
