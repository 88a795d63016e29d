"""What torch.compile is asked for a model by the name of a way."""

import pytest
import timm
import torch

import vmamba
from vmamba.models import compilation
from vmamba.models.compilation import compile_options

MODEL = vmamba.VSSM(depths=(1,), dims=8, num_classes=2)


def test_ours_keep_their_layout_and_others_are_compiled_as_pytorch_does():
    assert compile_options(MODEL, "default") == {"options": {"layout_optimization": False}}
    assert compile_options(torch.nn.Sequential(MODEL), "default") == {"options": {"layout_optimization": False}}
    assert compile_options(timm.create_model("resnet18"), "reduce-overhead") == {"mode": "reduce-overhead"}
    assert compile_options(MODEL, "reduce-overhead")["options"]["triton.cudagraphs"] is True
    assert compile_options(MODEL, "cudagraphs") == {"backend": "cudagraphs", "dynamic": False}


@pytest.mark.parametrize("combines", [True, False])
def test_small_kernels_are_combined_on_a_gpu_where_pytorch_can(monkeypatch, combines):
    monkeypatch.setattr(compilation, "COMBINES", combines)
    assert "combo_kernels" not in compile_options(MODEL, "default")["options"]
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    assert compile_options(MODEL, "default")["options"].get("combo_kernels", False) is combines
