"""Backbones of chosen stages: what is computed, what is trained, what is refused."""

import pytest
import timm
import torch
from torch import nn

import vmamba
from vmamba.errors import UserError
from vmamba.models.pretrained import Checkpoint, load_pretrained
from vmamba.models.released import backbone_weights, to_released

SMALL = dict(depths=(1, 1, 1), dims=8, num_classes=5)


def model(seed=0, **options):
    torch.manual_seed(seed)
    return vmamba.VSSM(**SMALL | options).eval()


def images(*size):
    return torch.randn(2, 3, *size or (32, 48), generator=torch.Generator().manual_seed(1))


def expected(stages, **options):
    """The stages' outputs, each through a norm as it starts."""
    outputs = model(**options).forward_intermediates(images(), intermediates_only=True)
    return [
        nn.functional.layer_norm(output.permute(0, 2, 3, 1), output.shape[1:2]).permute(0, 3, 1, 2)
        for output in (outputs[stage] for stage in stages)
    ]


@pytest.mark.parametrize(
    ("indices", "stages"),
    [((0, 1, 2), (0, 1, 2)), ([1], [1]), ((0, 1), (0, 1)), ((2, 0), (2, 0)), ((-1,), (2,)), (range(-3, -1), (0, 1))],
)
def test_chosen_stages_and_nothing_else(indices, stages):
    backbone = vmamba.Backbone(model(), indices)
    outputs = backbone(images())
    torch.testing.assert_close(outputs, expected(stages), rtol=1e-5, atol=1e-6)
    assert backbone.channels == [output.shape[1] for output in outputs] == [8 * 2**stage for stage in stages]
    assert backbone.strides == [32 // output.shape[2] for output in outputs]
    sum(output.square().sum() for output in outputs).backward()
    without = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without == []  # DistributedDataParallel waits for every gradient


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ((), r"out_indices is \[\]; name at least one stage, and each only once"),
        ((1, 1), r"out_indices is \[1, 1\]; name at least one stage, and each only once"),
        ((0, -3), r"out_indices is \[0, -3\]; name at least one stage, and each only once"),
        ((3,), "stage 3 does not exist; the model's stages are 0 to 2"),
        ((-4,), "stage -4 does not exist"),
        (2, "out_indices is 2; expected a list of stages"),
        ("012", "out_indices is '012'; expected a list of stages"),
    ],
)
def test_other_indices_are_refused(indices, words):
    with pytest.raises(UserError, match=words):
        vmamba.Backbone(model(), indices)


def test_a_model_has_one_backbone():
    taken = model()
    vmamba.Backbone(taken, (2,))
    with pytest.raises(UserError, match="a Backbone has taken this model already"):
        vmamba.Backbone(taken, (0,))
    features = taken.forward_features(images())
    for use in (
        lambda: taken(images()),
        lambda: taken.forward_head(features),
        lambda: taken.forward_intermediates(images(), norm=True),
        lambda: taken.head,
        lambda: setattr(taken, "head", nn.Linear(8, 5)),
        lambda: taken.global_pool,
        lambda: taken.get_classifier(),
        lambda: taken.reset_classifier(3),
        lambda: taken.prune_intermediate_layers([0], prune_norm=True),
    ):
        with pytest.raises(UserError, match="no classifier since a Backbone took it"):
            use()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: None, "a Backbone takes a VSSM, and this is a NoneType; give what vmamba.create_model"),
        (lambda: vmamba.Backbone(model(), (0,)), "this is a Backbone; give what vmamba.create_model"),
        (lambda: nn.DataParallel(model()), "this is a DataParallel; give the VSSM inside of it"),
        (lambda: torch.compile(model()), "this is a OptimizedModule; give the VSSM inside of it"),
        (lambda: timm.create_model("resnet10t"), "this is a ResNet; give what vmamba.create_model"),
        (lambda: "vmamba_tiny", "this is a str; give what vmamba.create_model"),
    ],
)
def test_a_backbone_takes_a_vssm_alone(other, words):
    with pytest.raises(UserError, match=words):
        vmamba.Backbone(other())


@pytest.mark.parametrize("options", [{}, dict(norm_layer="bn")], ids=["ln", "bn"])
def test_weights_of_a_whole_model_fill_a_part_of_it(options):
    weights = to_released(model(1, **options))
    backbone = vmamba.Backbone(model(**options), (1,))
    checkpoint = Checkpoint("some.pth", "", weights, {}, {})
    load_pretrained(backbone, checkpoint)
    torch.testing.assert_close(backbone(images()), vmamba.Backbone(model(1, **options), (1,))(images()))
    assert backbone_weights(backbone, weights).keys() == backbone.state_dict().keys()
    with pytest.raises(UserError, match=r"unexpected: model\.layers\.3\.blocks"):  # a stage that the model never had
        load_pretrained(backbone, Checkpoint("other.pth", "", weights | {"layers.3.blocks.0.a": torch.ones(1)}, {}, {}))


def test_stopping_early_leaves_out_the_downsampling():
    """It would not fit: the first stage's features are 1 x 2 here."""
    found = model(patch_embed="v1", downsample="v2").forward_intermediates(
        images(4, 8), indices=[0], stop_early=True, intermediates_only=True
    )
    assert found[0].shape == (2, 8, 1, 2)
    last, (first,) = model().forward_intermediates(images(), indices=[0], stop_early=True)
    assert torch.equal(last.permute(0, 3, 1, 2), first)
