"""Models copied, pickled, shared, wrapped and in other numbers, as users do with any module."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vmamba

kinds = pytest.mark.parametrize("name", ["vmamba_tiny", "vmamba_tiny_s1l8", "vmamba_tiny_m2"])


def small(name, **options):
    torch.manual_seed(0)
    return vmamba.create_model(name, **dict(depths=(1, 1), dims=16, num_classes=5) | options).eval()


def images(batch=2):
    return torch.randn(batch, 3, 32, 36, generator=torch.Generator().manual_seed(batch))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@kinds
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled, saved])
def test_copies_compute_the_same_and_stand_alone(name, copied):
    model = small(name, pos_embed=name == "vmamba_tiny_m2", img_size=32)
    expected = model(images()).detach()
    other = copied(model)
    assert torch.equal(other(images()), expected)
    if copied is not copy.copy:  # which shares its weights
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(model(images()), expected)
    other.head = nn.Linear(32, 3)
    assert other(images()).shape == (2, 3)


@pytest.mark.parametrize("whole", [False, True])
def test_copies_of_what_stands_on_a_backbone(whole):
    options = dict(depths=(1, 1, 1, 1), dims=8)
    model = vmamba.create_segmenter("upernet", "vmamba_nano", 3, backbone_options=options, channels=8).eval()
    model = model if whole else model.backbone
    x = torch.randn(1, 3, 64, 64)
    for copied in (copy.deepcopy, pickled, saved):
        for one, other in zip(copied(model)(x), model(x), strict=True):
            assert torch.equal(one, other)


@kinds
@pytest.mark.parametrize("dtype", ["double", "bfloat16", "half"])
def test_other_numbers(name, dtype):
    """Forward and backward, beside float32: the difference is a few units of the coarser numbers' last digit."""
    model = small(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)  # so that the scans' gradients are numbers of half
    other, labels = getattr(copy.deepcopy(model), dtype)(), torch.tensor([1, 4])
    found = []
    for each in (model, other):
        logits = each(images().to(each.head.weight.dtype))
        assert logits.dtype == each.head.weight.dtype
        (2**8 * F.cross_entropy(logits.float(), labels)).backward()
        found.append((logits, *(parameter.grad for parameter in each.parameters())))
    last = max(torch.finfo(each.head.weight.dtype).eps for each in (model, other))
    for part, units in ((slice(1), 8), (slice(1, None), 16)):  # the logits; the whole gradient
        one, expected = (torch.cat([t.float().flatten() for t in each[part]]) for each in (found[1], found[0]))
        assert (one - expected).norm() <= units * last * expected.norm()


@kinds
def test_shared_memory_and_data_parallel(name):
    model = small(name)
    expected = model(images()).detach()
    assert model.share_memory() is model and all(each.is_shared() for each in model.state_dict().values())
    assert torch.equal(model(images()), expected)
    wrapped = nn.DataParallel(model)
    assert torch.equal(wrapped(images()), expected)
    wrapped(images()).sum().backward()
    assert all(each.grad is not None for each in model.parameters())


@pytest.mark.gpu
@kinds
def test_data_parallel_on_several_gpus(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model, x = small(name).cuda(), images(4).cuda()
    wrapped = nn.DataParallel(model)
    torch.testing.assert_close(wrapped(x), model(x), rtol=1e-4, atol=1e-5)
    wrapped(x).sum().backward()
    assert all(each.grad is not None for each in model.parameters())
