"""Effective receptive fields: known ones, and what the door writes."""

import json

import pytest
import timm
import torch
from timm.layers import AvgPool2dSame, Conv2dSame
from torch import nn

from vmamba import create_model
from vmamba.analysis.receptive_field import centre, erf, last_features, receptive_field, recorded_steps, square_areas
from vmamba.errors import UserError


def constant(*modules: nn.Module) -> nn.Module:
    """The modules one after another, every weight 0.1: what reaches the centre is symmetric about it."""
    for module in modules:
        for parameter in module.parameters():
            nn.init.constant_(parameter, 0.1)
    return nn.Sequential(*modules)


def conv(side: int, stride: int = 1, padding: int = 0, **options: int) -> nn.Module:
    return nn.Conv2d(2, 2, side, stride, padding, bias=False, **options)


def same(side: int, stride: int) -> nn.Module:
    return Conv2dSame(2, 2, side, stride, bias=False)


@pytest.mark.parametrize(("side", "layers", "reach"), [(1, 1, 0), (3, 1, 1), (3, 2, 2), (5, 1, 2)])
def test_the_field_of_convolutions_is_their_reach_about_the_image_s_centre(side, layers, reach):
    model = constant(*(conv(side, padding=side // 2) for _ in range(layers)))
    field = receptive_field(model, [torch.rand(1, 2, 12, 15) for _ in range(2)])
    expected = torch.zeros(12, 15, dtype=torch.bool)
    expected[5 - reach : 7 + reach, 7 - reach : 8 + reach] = True  # of twelve rows two are the middle
    assert torch.equal(field > 0, expected)


@pytest.mark.parametrize(
    ("pixels", "covered"),
    [(12, slice(4, 8)), (16, slice(4, 12))],  # three cells: the middle one; four: the two in the middle
)
def test_of_patches_those_in_the_middle_count(pixels, covered):
    field = receptive_field(constant(conv(4, stride=4)), [torch.ones(1, 2, pixels, pixels)])
    expected = torch.zeros(pixels, pixels)
    expected[covered, covered] = field.max()
    assert torch.equal(field, expected)


def test_between_padded_convolutions_cells_the_nearer_counts_more():
    # A side of 3, stride 2, padding 1: the cells of 8 pixels are around pixels 0, 2, 4 and 6, the middle is at 3.5.
    field = receptive_field(constant(conv(3, stride=2, padding=1)), [torch.ones(1, 2, 8, 8)])
    row = torch.tensor([0, 1, 1, 1 + 3, 3, 3, 0, 0]) / 4  # a quarter of cell 1, three of cell 2
    torch.testing.assert_close(field / field[4, 4] * row[4] ** 2, row.outer(row))


LINEAR = {  # modules, and sides of images whose border the middle cells do not reach
    "a ResNet's": (lambda: [conv(7, 2, 3), nn.AvgPool2d(3, 2, 1), *(conv(3, 2, 1) for _ in range(3))], [160, 192]),
    "a later VMamba's": (lambda: [conv(3, 2, 1) for _ in range(5)], [96, 97, 128]),
    "patches": (lambda: [conv(4, 4), *(conv(2, 2) for _ in range(3))], [96, 100, 128]),
    "pools": (lambda: [nn.AvgPool2d(2), conv(4, 2, 1), nn.AvgPool2d(3, 2, 1)], [64, 72]),
    "TensorFlow's": (lambda: [same(3, 2), AvgPool2dSame(2, 2), same(5, 2), same(3, 2), same(5, 2)], [224, 225, 230]),
    "rounded up": (lambda: [nn.AvgPool2d(3, 2, ceil_mode=True), conv(3, 2, 1)], [64, 66]),
    "dilated": (lambda: [conv(3, 2, 2, dilation=2), conv(5, 4, 1)], [64, 72]),
}


@pytest.mark.parametrize(
    ("kind", "pixels"), [(kind, pixels) for kind, (_, sides) in LINEAR.items() for pixels in sides]
)
def test_the_field_of_a_linear_model_lies_about_the_image_s_centre(kind, pixels):
    field = receptive_field(constant(*LINEAR[kind][0]()), [torch.ones(1, 2, pixels, 64)])
    middle = (field.sum(1) * torch.arange(pixels)).sum() / field.sum()
    assert middle == pytest.approx((pixels - 1) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "position"),
    [
        (lambda: timm.create_model("resnet18"), 1 + 15.5 / 32),  # cells at 0, 32 and 64 of 96 pixels
        (lambda: timm.create_model("pvt_v2_b0"), 1 + 15.5 / 32),  # its attention has strided branches
        (lambda: timm.create_model("convnext_atto"), 1),
        (lambda: timm.create_model("tf_efficientnet_b0"), 1 - 15.5 / 32),
        (lambda: create_model("vmamba_digits", in_chans=3), (12 - 1) / 2 + 3.5 / 8),
        (lambda: create_model("vmamba_digits", patch_embed="v1", downsample="v1"), (12 - 1) / 2),
    ],
)
def test_where_the_centre_lies_among_the_cells_of_models(build, position):
    model = build().eval()
    with torch.no_grad(), recorded_steps(model) as steps:
        output = last_features(model)(torch.zeros(1, 3, 96, 96))
    assert centre(steps, 2, 96, output.shape[2]) == centre(steps, 3, 96, output.shape[3]) == position
    assert not any(module._forward_hooks for module in model.modules())


def test_the_field_is_the_mean_over_images_of_the_rectified_gradient():
    class Scaled(nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, -2.0]).view(1, 2, 1, 1) * x  # the negative gradient does not count

    images = [torch.full((1, 2, 3, 3), 2.0), torch.full((1, 2, 3, 3), -1.0), torch.full((1, 2, 3, 3), 4.0)]
    # The output, rectified, is positive in channel 0 for the first and the last image, in channel 1 for the second.
    field = receptive_field(Scaled(), images)
    assert field[1, 1] == pytest.approx(2 / 3)
    assert field.sum() == field[1, 1]


@pytest.mark.parametrize("side", [100, 101])
def test_areas_of_a_uniform_field_are_the_shares_themselves(side):
    areas = square_areas(torch.ones(side, side), (0.2, 0.5, 0.99))
    for share, (area, square) in zip((0.2, 0.5, 0.99), areas, strict=True):
        assert area >= share - 1e-12
        assert ((square - 2) / side) ** 2 < share  # the next smaller square holds less
        assert area == pytest.approx((square / side) ** 2)


def test_areas_about_the_centre_by_hand():
    point = torch.zeros(9, 9)
    point[4, 4] = 1
    assert square_areas(point) == [(1 / 81, 1)] * 4
    four = torch.zeros(8, 8)  # about the centre of an even side lie four pixels
    four[3:5, 3:5] = 1
    assert square_areas(four) == [(4 / 64, 2)] * 4
    ring = torch.zeros(8, 8)
    ring[3, 3], ring[2, 5] = 2, 1
    assert square_areas(ring, [0.6, 0.7]) == [(4 / 64, 2), (16 / 64, 4)]
    corner = torch.zeros(9, 8)
    corner[0, 0] = 1
    assert square_areas(corner, [0.5]) == [(1.0, 9)]  # what lies outside the image does not count


def test_a_field_without_contribution_is_an_error():
    with pytest.raises(UserError, match="no pixel contributes"):
        square_areas(torch.zeros(4, 4))


def test_a_digits_model_before_and_after_training(digits_run, tmp_path):
    path = str(digits_run / "best.pth")
    settings = dict(size=32, num_images=2, device="cpu", output=str(tmp_path))
    rows = erf(models=["vmamba_digits", "resnet18"], weights=[path, "-"], **settings)
    assert [(row["model"], row["parameters"], row["weights"], row["file"]) for row in rows] == [
        ("vmamba_digits", 139_498, "random weights", None),
        ("vmamba_digits", 139_498, "trained on digits (10 classes)", path),
        ("resnet18", 11_689_512, "random weights", None),
    ]
    assert json.loads((tmp_path / "erf.json").read_text()) == rows
    fields = torch.load(tmp_path / "erf.pt")
    assert fields.shape == (3, 32, 32)
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
        (["vmamba_digits"], ["a.pth", "b.pth"], "2 files for 1 model;"),
        (["vmamba_digits"], ["absent.pth"], "no checkpoint 'absent.pth'"),
    ],
)
def test_what_the_user_can_mend(models, weights, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        erf(models=models, weights=weights, size=32, num_images=1, device="cpu", output=str(tmp_path))


def test_a_folder_with_too_few_images_is_named(tmp_path):
    with pytest.raises(UserError, match="holds 0 images of the 3"):
        erf(models=["vmamba_digits"], size=32, images_from=str(tmp_path), num_images=3, device="cpu")
