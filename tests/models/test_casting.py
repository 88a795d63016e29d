"""Weights cast once a block, beside autocast's own casts: the same bits, and everything as it was afterwards."""

import pytest
import torch

import vmamba
from vmamba.models import casting

TINY = dict(depths=(1, 2), dims=16, d_state=2, num_classes=7, drop_path_rate=0.5)


def outputs_and_gradients(model, device="cpu"):
    torch.manual_seed(1)
    images = torch.randn(2, 3, 32, 32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = model(images)
    out.float().square().sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    return out, gradients


@pytest.mark.parametrize("options", [
    {}, {"scan": "ssd", "dt_rank": 4}, {"scan_float32": True}, {"mlp_ratio": 0.0, "gate": True}, {"gated_mlp": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("how", ["as it is", "checkpointed", "partly frozen", "hooked"])
def test_the_bits_are_those_of_autocasts_own_casts(monkeypatch, options, how):
    torch.manual_seed(0)
    model = vmamba.VSSM(**TINY | options).train()
    block = model.layers[1].blocks[0]
    model.set_grad_checkpointing(how == "checkpointed")
    if how == "partly frozen":
        model.layers[0].requires_grad_(False)
        block.op.in_proj.weight.requires_grad_(False)
    seen = []
    if how == "hooked":
        block.op.in_proj.register_forward_hook(lambda module, inputs, output: seen.append(module.weight))
    weights = dict(model.named_parameters())
    out, gradients = outputs_and_gradients(model)
    monkeypatch.setattr(casting, "pays", lambda x: torch.is_grad_enabled())
    casts = []
    copies = casting._copies
    monkeypatch.setattr(casting, "_copies", lambda tensors, dtype: casts.append(dtype) or copies(tensors, dtype))
    again, same = outputs_and_gradients(model)
    assert torch.bfloat16 in casts and torch.float32 in casts
    assert torch.equal(out, again) and gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        assert (gradient is None) == (same[name] is None), name
        assert gradient is None or (torch.equal(gradient, same[name]) and same[name].dtype == torch.float32), name
    assert all(weights[name] is weight for name, weight in model.named_parameters())
    assert all(weight is block.op.in_proj.weight for weight in seen)


def test_an_error_inside_leaves_the_weights(monkeypatch):
    block = vmamba.Block(16)
    weight = block.op.in_proj.weight
    with pytest.raises(ZeroDivisionError), casting.weights_cast_once(block, torch.bfloat16):
        assert block.op.in_proj.weight.dtype == torch.bfloat16
        raise ZeroDivisionError
    assert block.op.in_proj.weight is weight


def test_second_derivatives(monkeypatch):
    monkeypatch.setattr(casting, "pays", lambda x: True)
    block, x = vmamba.Block(16, backend="reference"), torch.randn(1, 4, 4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), block.mlp.fc1.weight, create_graph=True)
    gradient.square().sum().backward()
    assert block.mlp.fc2.weight.grad.norm() > 0


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_happens(monkeypatch):
    torch.manual_seed(0)
    model = vmamba.VSSM(**TINY).cuda().train()
    assert not casting.pays(torch.ones(1, device="cuda"))  # no autocast
    casts = []
    copies = casting._copies
    monkeypatch.setattr(casting, "_copies", lambda tensors, dtype: casts.append(dtype) or copies(tensors, dtype))
    out, gradients = outputs_and_gradients(model, "cuda")
    assert casts == [torch.bfloat16] * 3 + [torch.float32] * 3
    monkeypatch.setattr(casting, "pays", lambda x: False)
    again, same = outputs_and_gradients(model, "cuda")
    assert torch.equal(out, again) and all(torch.equal(gradients[name], same[name]) for name in same)
