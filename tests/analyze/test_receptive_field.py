"""Effective receptive fields: known ones, and what the door writes."""

import json

import pytest
import torch
from torch import nn

from vmamba.analysis.receptive_field import erf, receptive_field, square_areas
from vmamba.errors import UserError


def convolution(side: int, layers: int = 1) -> nn.Module:
    convolutions = [nn.Conv2d(2, 2, side, padding=side // 2, bias=False) for _ in range(layers)]
    for module in convolutions:
        nn.init.constant_(module.weight, 0.1)
    return nn.Sequential(*convolutions)


@pytest.mark.parametrize(("side", "layers", "reach"), [(1, 1, 0), (3, 1, 1), (3, 2, 2), (5, 1, 2)])
def test_the_field_of_convolutions_is_their_reach(side, layers, reach):
    field = receptive_field(convolution(side, layers), [torch.rand(1, 2, 12, 14) for _ in range(2)])
    expected = torch.zeros(12, 14, dtype=torch.bool)
    expected[6 - reach : 7 + reach, 7 - reach : 8 + reach] = True
    assert torch.equal(field > 0, expected)


def test_the_field_is_the_mean_over_images_of_the_rectified_gradient():
    scale = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)  # of the channels; the negative gradient does not count
    images = [torch.full((1, 2, 3, 3), 2.0), torch.full((1, 2, 3, 3), -1.0), torch.full((1, 2, 3, 3), 4.0)]
    # The output, rectified, is positive in channel 0 for the first and the last image, in channel 1 for the second.
    field = receptive_field(lambda x: scale * x, images)
    assert field[1, 1] == pytest.approx(2 / 3)
    assert field.sum() == field[1, 1]


def test_areas_of_a_uniform_field_are_the_shares_themselves():
    areas = square_areas(torch.ones(101, 101), (0.2, 0.5, 0.99))
    for share, (area, side) in zip((0.2, 0.5, 0.99), areas, strict=True):
        assert area >= share - 1e-12
        assert ((side - 2) / 101) ** 2 < share  # the next smaller square holds less
        assert area == pytest.approx((side / 101) ** 2)


def test_areas_of_a_point_and_of_a_field_at_the_border():
    point = torch.zeros(9, 8)
    point[4, 4] = 1
    assert square_areas(point) == [(1 / 72, 1)] * 4
    corner = torch.zeros(9, 8)
    corner[0, 0] = 1
    assert square_areas(corner, [0.5]) == [(1.0, 9)]  # what lies outside the image does not count


def test_a_field_without_contribution_is_an_error():
    with pytest.raises(UserError, match="no pixel contributes"):
        square_areas(torch.zeros(4, 4))


def test_a_digits_model_before_and_after_training(digits_run, tmp_path):
    weights = [str(digits_run / "best.pth"), "-"]
    rows = erf(["vmamba_digits", "resnet18"], weights, 32, None, 2, "cpu", str(tmp_path))
    assert [(row["model"], row["weights"]) for row in rows] == [
        ("vmamba_digits", "random weights, not trained on ImageNet"),
        ("vmamba_digits", "trained on digits, not on ImageNet"),
        ("resnet18", "random weights, not trained on ImageNet"),
    ]
    assert json.loads((tmp_path / "erf.json").read_text()) == rows
    fields = list(torch.load(tmp_path / "erf.pt").values())
    assert [tuple(field.shape) for field in fields] == [(32, 32)] * 3
    assert all(field.min() >= 0 and field.max() > 0 for field in fields)
    assert not torch.allclose(fields[0], fields[1])
    assert (fields[1] > 0).float().mean() > 0.5  # routes cross the whole image
    for row in rows:
        areas = [row[f"area of {share}"] for share in ("20%", "30%", "50%", "99%")]
        assert areas == sorted(areas)
        assert 0 < areas[0] <= areas[-1] <= 1
    for name in ("erf.pdf", "erf.png", "erf.md"):
        assert (tmp_path / name).stat().st_size > 100


@pytest.mark.parametrize(
    ("models", "weights", "sentence"),
    [
        (["vmamba_tny"], [], "did you mean 'vmamba_tiny'"),
        (["swin_tiny_patch4_window7_22"], [], "did you mean 'swin_tiny_patch4_window7_224'"),
        (["vmamba_digits"], ["a.pth", "b.pth"], "2 files for 1 models"),
        (["vmamba_digits"], ["absent.pth"], "no checkpoint 'absent.pth'"),
    ],
)
def test_what_the_user_can_mend(models, weights, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        erf(models, weights, 32, None, 1, "cpu", str(tmp_path))


def test_a_folder_with_too_few_images_is_named(tmp_path):
    with pytest.raises(UserError, match="holds 0 images of the 3"):
        erf(["vmamba_digits"], [], 32, str(tmp_path), 3, "cpu", str(tmp_path))
