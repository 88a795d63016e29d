"""Private interfaces of PyTorch, timm and submitit: each is where we look for it, and only one file looks."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from vmamba_kernels import private

ROOT = Path(__file__).parents[1]
FILES = [
    path for folder in ("vmamba", "kernels", "classification", "analyze") for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("name", private.WHERE)
def test_a_private_interface_is_where_it_was(name):
    """If this fails, a new version of PyTorch or timm has moved it: mend kernels/vmamba_kernels/private.py."""
    assert getattr(private, name) is not None


def test_transforms_of_torch_are_seen():
    seen = []
    torch.vmap(lambda x: seen.append((private.is_transformed(), private.is_watched())) or x)(torch.ones(2))
    with forward_ad.dual_level():
        seen.append((private.is_transformed(), private.is_watched()))
    assert seen == [(True, True), (True, False)] and not private.is_transformed() and not private.is_watched()
    with private.TorchDispatchMode():
        assert private.is_watched() and not private.is_transformed()


def test_which_optimisers_can_skip_a_step_by_themselves():
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    for fused in (False, True):
        optimizer = torch.optim.AdamW([weight], fused=fused)
        assert private.takes_found_inf(optimizer) is fused
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert weight.item() == 1 and optimizer.state[weight]["step"].item() == 0


def test_what_is_used_on_a_gpu_and_in_a_cluster_is_there():
    if torch.backends.cuda.is_built():
        assert callable(torch._C._cuda_getCurrentRawStream) and callable(torch.cuda._sleep)
    submitit = pytest.importorskip("submitit")
    assert callable(submitit.SlurmExecutor._make_submission_file_text)
    assert isinstance(submitit.SlurmExecutor._submitit_command_str, property)


def test_only_one_file_knows_them():
    private_name = re.compile(r"\b(?:torch|timm|submitit|torchvision|numpy)(?:\.\w+)*\._[a-zA-Z]\w*|executor\._\w+")
    found = {path: private_name.findall(path.read_text()) for path in FILES if path != Path(private.__file__)}
    assert {path: names for path, names in found.items() if names} == {}  # import them through vmamba_kernels.private


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = private.nothing


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_one_module_and_of_all_are_seen(kind):
    module = nn.Linear(1, 1)
    assert not private.has_hooks(module)
    for register in (
        getattr(module, f"register_{kind}_hook"),
        getattr(nn.modules.module, f"register_module_{kind}_hook"),
    ):
        handle = register(lambda *_: None)
        assert private.has_hooks(module)
        handle.remove()
        assert not private.has_hooks(module)
