"""Frozen parts: nothing of them moves, in whatever model, and a name that is none is told."""

import copy

import pytest
import timm
import torch

import vmamba
from vmamba.errors import UserError
from vmamba.models.freezing import freeze, train

SMALL = dict(depths=(1, 2), dims=8, num_classes=3, drop_path_rate=0.5, norm_layer="bn")


def trained(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_nothing_of_a_frozen_part_moves():
    """Weights, a batch norm's statistics and count; and it computes as in evaluation, in a copy (an EMA's) as well."""
    torch.manual_seed(0)
    model = vmamba.create_model("vmamba_digits", **SMALL | {"drop_path_rate": 0.0})  # each block has a gradient
    freeze(model, ["patch_embed", "layers.0", "layers.1.blocks.0.op.Ds"])
    before, images = copy.deepcopy(model.state_dict()), torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.SGD((weight for weight in model.parameters() if weight.requires_grad), lr=0.1)
    train(model)
    assert model.layers[1].training and model.classifier.training
    for frozen in (model.layers[0], copy.deepcopy(model).layers[0]):
        assert not any(module.training for module in frozen.modules())
    model(images).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not {name for name in moved if name.startswith(("patch_embed", "layers.0", "layers.1.blocks.0.op.Ds"))}
    assert {"layers.1.blocks.0.norm.running_mean", "layers.1.blocks.1.op.A_logs", "classifier.head.weight"} <= moved


@pytest.mark.parametrize(("name", "head"), [
    ("vmamba_digits", {"classifier.head.weight", "classifier.head.bias"}),
    ("resnet10t", {"fc.weight", "fc.bias"}),
    ("deit_tiny_distilled_patch16_224", {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}),
])  # fmt: skip
def test_a_linear_probe_of_any_model(name, head):
    model = timm.create_model(name)
    freeze(model, ["all_but_head"])
    assert trained(model) == head
    train(model)
    leaves = [module for module in model.modules() if [*module.parameters(recurse=False)] and module is not model]
    assert all(module.training == next(module.parameters()).requires_grad for module in leaves)


@pytest.mark.parametrize(("parts", "words"), [
    (["layer.0"], "TRAIN.FREEZE names 'layer.0', which is no part .* that is trained; did you mean 'layers.0'"),
    (["backbone"], "names 'backbone', which is no part .*; the model has patch_embed, layers, classifier"),
    (["layers.7"], "names 'layers.7', which is no part of the model that is trained; did you mean 'layers.1'"),
    (["layers.0.blocks.0.drop_path"], "names 'layers.0.blocks.0.drop_path', which is no part .* that is trained"),
    (["patch_embed", "layers", "classifier"], r"is \['patch_embed', 'layers', 'classifier'\], which is the whole mode"),
    (["all_but_head", "classifier.head"], "which is the whole model; leave something to train"),
])  # fmt: skip
def test_what_cannot_be_frozen_is_a_sentence(parts, words):
    with pytest.raises(UserError, match=words):
        freeze(vmamba.create_model("vmamba_digits", **SMALL), parts)


def test_a_model_without_a_head_has_no_probe():
    with pytest.raises(UserError, match="FREEZE is all_but_head, and this Backbone has no head of classes; name parts"):
        freeze(vmamba.Backbone(vmamba.create_model("vmamba_digits", **SMALL), (0, 1)), ["all_but_head"])
