"""The counter against the published figures, a convolution by hand, and PyTorch's own count."""

from functools import cache

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vmamba
from vmamba.models.flops import complexity
from vmamba.models.variants import VARIANTS

PUBLISHED = {  # GFLOPs at 224 of the January 2024 table as its authors corrected it, and of the later models
    "vmamba_tiny": 5.62689504,
    "vmamba_small": 11.231522784,
    "vmamba_base": 18.020115136,
    "vmamba_tiny_s1l8": 4.905609984,
    "vmamba_small_s1l20": 8.612211456,
    "vmamba_base_s1l20": 15.220859904,
}


def on_meta(name, **options):
    with torch.device("meta"):
        return vmamba.create_model(name, **options)


@cache
def counted_at_224(name):
    return complexity(on_meta(name), 224)


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_are_the_published_ones(name):
    counted = counted_at_224(name)
    assert abs(counted.macs / 1e9 / PUBLISHED[name] - 1) < 1e-4


def test_parameters_without_the_head():
    counted = complexity(on_meta("vmamba_tiny"), 32)
    assert (counted.parameters, counted.parameters_without_head) == (22_893_448, 22_124_448)


def test_a_model_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(2), nn.LayerNorm(20), nn.Linear(20, 5))
    counted = complexity(model, (4, 5))
    assert counted.macs == 4 * 5 * 8 * 27 + 5 * 8 * 20 + 8 * 20 * 5
    assert counted.activations == 8 * 20 + 8 * 5


@pytest.mark.parametrize("name", ["vmamba_tiny", "vmamba_tiny_m2"])
def test_cost_of_a_scan_grows_with_the_pixels_and_does_not_depend_on_who_counts(name):
    model = on_meta(name, depths=(1,), num_classes=0)
    small, large = complexity(model, (32, 32)), complexity(model, (32, 64))
    assert large.macs == 2 * small.macs and large.activations == 2 * small.activations
    assert small == complexity(model, 32)


def test_a_baseline_agrees_with_pytorchs_count_but_for_the_norms():
    model = timm.create_model("convnext_atto").eval().to("meta")
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.empty(1, 3, 64, 64, device="meta"))
    counted = complexity(model, 64)
    assert counter.get_total_flops() / 2 < counted.macs < 1.02 * counter.get_total_flops() / 2


def test_the_model_is_left_as_it_was():
    model = vmamba.VSSM(dims=16, depths=(1,), num_classes=3)
    complexity(model, 32)
    assert model.training and model(torch.randn(1, 3, 16, 16)).device.type == "cpu"


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.gflops])
def test_the_registry_says_what_is_counted(name):
    assert round(counted_at_224(name).macs / 1e9, 3) == VARIANTS[name].gflops
