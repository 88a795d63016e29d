"""Our backbones in other people's detectors and segmenters, as docs/elsewhere.md shows."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import vmamba
from vmamba.errors import UserError
from vmamba.models.released import options_from_released
from vmamba.models.vssm import VSSM

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden_downstream"


def test_mm_vssm_is_the_released_backbone_under_its_names():
    registry = pytest.importorskip("mmengine.registry")
    import vmamba.models.mm_vssm

    golden = torch.load(GOLDEN / "mask_rcnn_s1.pt", weights_only=True)
    model = registry.MODELS.build({"type": "MM_VSSM", "out_indices": (0, 1, 2, 3), **golden["config"]["backbone"]})
    detector = torch.nn.ModuleDict({"backbone": model})  # as mmdetection's model holds it
    released = {name: weight for name, weight in golden["state_dict"].items() if name.startswith("backbone.")}
    detector.load_state_dict(released)
    assert detector.state_dict().keys() == released.keys()
    assert all(torch.equal(weight, released[name]) for name, weight in detector.state_dict().items())
    ours = vmamba.detector_from_released(golden["config"], golden["state_dict"]).backbone
    with torch.no_grad():
        for mine, theirs in zip(model.eval()(golden["input"]), ours(golden["input"]), strict=True):
            assert torch.equal(mine, theirs)


def test_mm_vssm_starts_from_a_classifiers_weights(tmp_path):
    pytest.importorskip("mmengine")
    from vmamba.models.mm_vssm import MM_VSSM

    options = dict(dims=8, depths=(1, 1, 1, 1), forward_type="v05_noz", ssm_d_state=1)
    classifier = VSSM(**options_from_released(options))
    torch.save(vmamba.to_released(classifier), tmp_path / "w.pth")
    model = MM_VSSM(**options, pretrained=str(tmp_path / "w.pth"))
    model.init_weights()
    weights = model.state_dict()
    assert torch.equal(weights["layers.3.blocks.0.op.in_proj.weight"], classifier.layers[3].blocks[0].op.in_proj.weight)


def test_mm_vssm_starts_as_init_cfg_says(tmp_path):
    """mmengine's ordinary way; of a detector's file the backbone, or what is under a prefix."""
    pytest.importorskip("mmengine")
    from vmamba.models.mm_vssm import MM_VSSM

    options = dict(dims=8, depths=(1, 1, 1, 1), forward_type="v05_noz", ssm_d_state=1)
    source = MM_VSSM(**options)
    path, teacher = str(tmp_path / "d.pth"), str(tmp_path / "t.pth")
    torch.save({"state_dict": {f"backbone.{name}": each for name, each in source.state_dict().items()}}, path)
    torch.save({f"teacher.net.{name}": each for name, each in source.state_dict().items()}, teacher)

    def started(init_cfg, **more):
        model = MM_VSSM(**{**options, "init_cfg": init_cfg, **more})
        model.init_weights()
        return model

    for init_cfg in (
        dict(type="Pretrained", checkpoint=path),
        [dict(type="Pretrained", checkpoint=path, prefix="backbone.", map_location="cpu")],
        dict(type="Pretrained", checkpoint=teacher, prefix="teacher.net"),
    ):
        for name, weight in started(init_cfg).state_dict().items():
            assert torch.equal(weight, source.state_dict()[name])
    for init_cfg, more, sentence in (
        (dict(type="Kaiming", layer="Conv2d"), {}, "init_cfg .*Kaiming.*; its weights start as the original's do, or"),
        ([dict(type="Pretrained", checkpoint=path)] * 2, {}, "MM_VSSM has init_cfg "),
        (dict(type="Pretrained"), {}, "MM_VSSM has init_cfg "),
        (dict(type="Pretrained", checkpoint=path, prefx="a"), {}, "option of init_cfg 'prefx'; did you mean 'prefix'"),
        (dict(type="Pretrained", checkpoint=path, prefix="neck"), {}, "no weights under the prefix 'neck' of init_cfg"),
        (dict(type="Pretrained", checkpoint=str(tmp_path / "no.pth")), {}, "there is no checkpoint '.*no.pth'"),
        (dict(type="Pretrained", checkpoint=path), {"pretrained": path}, "both pretrained and init_cfg"),
        (dict(type="Pretrained", checkpoint=path), {"dims": 16}, "of another architecture"),
        (None, {"use_checkpoint": 3}, "use_checkpoint is 3"),
    ):
        with pytest.raises(UserError, match=sentence):
            started(init_cfg, **more)
    assert all(stage.grad_checkpointing for stage in started(None, use_checkpoint=True).backbone.model.layers)


def test_the_adapter_leaves_the_position_map_out_as_the_released_backbone():
    pytest.importorskip("mmengine")
    from vmamba.models.mm_vssm import MM_VSSM

    options = dict(dims=8, depths=[1, 1], posembed=True, imgsize=32, ssm_d_state=1)
    torch.manual_seed(0)
    adapter = MM_VSSM(out_indices=(0, 1), **options).eval()
    weights = adapter.state_dict() | {"pos_embed": torch.randn(1, 8, 8, 8)}
    adapter.load_state_dict(weights)
    expected = vmamba.from_released(options, weights, features=(0, 1))
    image = torch.randn(1, 3, 32, 32)
    for ours, theirs in zip(adapter(image), expected(image), strict=True):
        torch.testing.assert_close(ours, theirs)


# --------------------------------------------------------------------- the blocks of docs/elsewhere.md, as written

BLOCKS = re.findall(r"^## (.+?)\n.*?```python\n(.+?)```", (ROOT / "docs" / "elsewhere.md").read_text(), re.S | re.M)


def run_block(title, *packages):
    """The names that a block has defined."""
    (code,) = [code for name, code in BLOCKS if name.startswith(title)]
    for package in packages:
        pytest.importorskip(package)
    names = {}
    exec(code, names)
    return names


def test_every_block_is_run_here():
    titles = [name.partition(" ")[0] for name, _ in BLOCKS]
    assert titles == ["mmdetection", "torchvision's", "segmentation-models-pytorch", "transformers'"]


def test_the_block_of_mmdetection(tmp_path, monkeypatch):
    names = run_block("mmdetection", "mmengine")
    for module in names["custom_imports"]["imports"]:
        importlib.import_module(module)
    settings = names["model"]["backbone"]
    model = importlib.import_module("mmengine.registry").MODELS.build(dict(settings))
    expected = vmamba.create_model("vmamba_tiny_s1l8")
    monkeypatch.chdir(tmp_path)
    torch.save({"model": vmamba.to_released(expected)}, settings["init_cfg"]["checkpoint"])
    model.init_weights()
    weights = expected.state_dict()
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items() if "outnorm" not in name)


def test_the_block_of_torchvision(monkeypatch):
    whole = vmamba.create_model
    monkeypatch.setattr(vmamba, "create_model", lambda name, pretrained: whole(name, dims=8, depths=(1, 1, 1, 1)))
    names = run_block("torchvision")
    model = names["detector"]
    model.transform.min_size, model.transform.max_size = (64,), 96
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 30.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 60, 70, dtype=torch.uint8),
    }
    losses = model([torch.rand(3, 60, 70)], [target])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in names["backbone"].parameters())
    assert {"boxes", "labels", "scores", "masks"} == model.eval()([torch.rand(3, 60, 70)])[0].keys()


def test_the_block_of_segmentation_models_pytorch():
    model = run_block("segmentation-models-pytorch", "segmentation_models_pytorch")["segmenter"].eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 7, 64, 64)


def test_the_block_of_transformers():
    model = run_block("transformers", "transformers", "timm")["segmenter"].eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).logits.shape == (1, 150, 64, 64)
