"""A small model of ours whose weights tests put into files and back."""

import torch

import vmamba

SMALL = dict(dims=8, depths=(1, 2), num_classes=5, img_size=32)


def model(seed=0, **options):
    torch.manual_seed(seed)
    return vmamba.create_model("vmamba_tiny", **SMALL | options).eval()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
