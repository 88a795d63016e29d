"""Files for other programs: what they hold, what runs them gives what the model gives, and what is refused."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import vmamba
from vmamba.detection.roi_heads import PredictionSettings
from vmamba.errors import UserError
from vmamba.exporting import programs
from vmamba.exporting.places import check_place
from vmamba.models.pretrained import load_pretrained
from vmamba.models.variants import VARIANTS
from vmamba.models.vssm import VSSM
from vmamba.segmentation.upernet import UperNet


def small(name, seed=0, **options):
    """With weights so large that every scan shows in the result."""
    torch.manual_seed(seed)
    options = dict(depths=(1, 1), dims=8, num_classes=5, ssm_init="v1") | options
    model = vmamba.create_model(name, **options).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    return model


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def same(found, expected):
    """To 1e-4 of the largest number, and the same class comes first."""
    expected = expected.detach()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    if expected.dim() == 2:
        assert torch.equal(found.argmax(1), expected.argmax(1))


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_bare_weights_load_here_and_in_timm(tmp_path, suffix):
    model, path = small("vmamba_digits", drop_path_rate=0.3, dims=32, depths=(2, 1)), tmp_path / f"model.{suffix}"
    classes = ["a", "b", "c", "d", "é"]
    vmamba.export(nn.DataParallel(model), path, size=(32, 48), classes=classes, mean=[0.5], std=[0.25])
    found = vmamba.load_checkpoint(path)
    assert found.classes == tuple(classes)
    assert found.config["MODEL"] == dict(
        NAME="vmamba_nano",  # as vmamba_digits but for the depths
        NUM_CLASSES=5,
        IN_CHANS=3,
        DROP_PATH_RATE=0.3,
        OPTIONS=dict(depths=[2, 1], ssm_init="v1"),
    )
    assert found.config["DATA"] == dict(IMG_SIZE=[32, 48], MEAN=[0.5], STD=[0.25])
    other = small("vmamba_digits", 1, dims=32, depths=(2, 1))
    load_pretrained(other, found)
    x = images(2, 3, 32, 32)
    assert torch.equal(other(x), model(x))
    options = dict(depths=(2, 1), ssm_init="v1")
    theirs = timm.create_model("vmamba_digits", num_classes=5, checkpoint_path=str(path), **options)
    assert torch.equal(theirs.eval()(x), model(x))


def test_weights_of_the_released_spellings(tmp_path):
    model = small("vmamba_tiny", depths=(1, 1, 1, 1))
    for spelling in ("released", "january"):
        vmamba.export(model, tmp_path / "a.pth", spelling=spelling)
        held = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
        expected = vmamba.to_released(model, january=spelling == "january")
        assert list(held) == list(expected) and all(torch.equal(held[name], expected[name]) for name in held)
        x = images(1, 3, 32, 32)
        options = dict(depths=(1, 1, 1, 1), dims=8, num_classes=5, forward_type="v4", mlp_ratio=0.0)
        options |= dict(downsample_version="v1", patchembed_version="v1", norm_layer="ln")
        assert torch.equal(vmamba.from_released(options, held)(x), model(x))
    backbone = vmamba.Backbone(small("vmamba_tiny"), (0, 1))
    vmamba.export(backbone, tmp_path / "b.safetensors", spelling="released")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert set(file.keys()) == set(vmamba.to_released(backbone))
        assert json.loads(file.metadata()["vmamba"]) == {}


@pytest.mark.parametrize("name", ["vmamba_base_s2l15", "vmamba_small_m2", "vmamba_digits"])
def test_options_are_told_beside_the_nearest_variant(tmp_path, name):
    from vmamba.exporting.descriptions import described

    with torch.device("meta"):
        model = vmamba.create_model(name, pos_embed=True, img_size=64, patch_size=4, num_classes=7)
        told = described(model)["MODEL"]
        assert told["NAME"] == name and told["OPTIONS"] == {"pos_embed": True} and told["NUM_CLASSES"] == 7
        other = VSSM(**VARIANTS[name].options | dict(depths=(2, 1), dims=(24, 48), routes="col", drop_path_rate=0.25))
    found = described(other)["MODEL"]
    assert found["DROP_PATH_RATE"] == 0.25
    with torch.device("meta"):
        again = vmamba.create_model(found["NAME"], **found["OPTIONS"])
    shapes = [{key: tuple(each.shape) for key, each in each.state_dict().items()} for each in (other, again)]
    assert shapes[0] == shapes[1] and again.layers[0].blocks[0].op.routes == ("col",)


def test_the_command_takes_a_runs_checkpoint_and_predict_takes_its_file(tmp_path):
    import yaml
    from PIL import Image

    from vmamba.analysis.prediction import predict
    from vmamba.config import get_config
    from vmamba.exporting.command import export_file

    config = get_config("configs/vmamba_digits.yaml", ["MODEL.OPTIONS.dims", 8, "DATA.DATA_PATH", str(tmp_path)])
    model = vmamba.create_model("vmamba_digits", num_classes=10, in_chans=1, dims=8).eval()
    average = {name: weight + 0.1 for name, weight in model.state_dict().items()}
    content = {"model": model.state_dict(), "model_ema": average, "config": yaml.safe_load(config.dump())}
    torch.save(content, tmp_path / "best.pth")
    path = export_file(checkpoint=str(tmp_path), weights="ema", output=str(tmp_path / "out.safetensors"))
    found = vmamba.load_checkpoint(path)
    assert all(torch.equal(found.state_dict[name], weight) for name, weight in average.items())
    data = found.config["DATA"]
    assert data == dict(IMG_SIZE=[32, 32], MEAN=config.DATA.MEAN, STD=config.DATA.STD)
    assert found.classes == tuple("0123456789") and str(tmp_path) not in path.read_bytes().decode("latin-1")
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    answers = [
        predict(str(file), [str(tmp_path / "image.png")], weights=which, device="cpu", output=str(tmp_path / "told"))
        for file, which in ((path, "auto"), (tmp_path / "best.pth", "ema"))
    ]
    assert answers[0] == answers[1]
    with pytest.raises(UserError, match="would be written over '.*best.pth', which is read here"):
        export_file(checkpoint=str(tmp_path), output=str(tmp_path / "best.pth"))
    other = tmp_path / "last.pth"
    torch.save(content | {"steps_per_epoch": 1}, other)
    with pytest.raises(UserError, match="last.pth' is the state of a run, which would be lost; choose another"):
        export_file(checkpoint=str(tmp_path), output=str(other))
    loaded = vmamba.load_model(path)
    with pytest.raises(UserError, match="last.pth' is the state of a run, which would be lost; choose another"):
        vmamba.export(loaded, other)
    other.unlink()
    loaded.head = nn.Linear(16, 3)  # of other classes, whose names nothing tells
    found = vmamba.load_checkpoint(vmamba.export(loaded, tmp_path / "again.pth"))
    assert not found.classes and found.config["DATA"] == data


def test_a_classifier_without_classes_loads_again_and_predicts_nothing(tmp_path):
    from PIL import Image

    model = small("vmamba_digits", num_classes=0)
    again = vmamba.load_model(vmamba.export(model, tmp_path / "a.safetensors", size=32))
    x = images(2, 3, 32, 32)
    assert torch.equal(again(x), model(x)) and again(x).shape == (2, 16) and again.class_names == []
    with pytest.raises(
        UserError, match="this classifier has no classes .num_classes=0., so it says none; model.images"
    ):
        vmamba.predict(again, Image.new("RGB", (9, 9)))


def lasting(backbone="vmamba_nano", **options):
    """A segmenter whose options change no weight's shape, but what comes out."""
    torch.manual_seed(0)
    segmenter = vmamba.create_segmenter(
        "upernet", backbone, 3, backbone_options=options, channels=8, aux_channels=4, dropout=0.2, ignore_index=7
    )
    for parameter in segmenter.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    return segmenter.eval()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_file_of_a_segmenter_tells_what_it_is(tmp_path, suffix):
    model = lasting(depths=(1, 0, 0, 0), dims=8, ssm_act="gelu", routes=["col", "row"], drop_path_rate=0.3)
    path = vmamba.export(model, tmp_path / f"a.{suffix}", classes=["a", "b", "c"], mean=[0.1], std=[0.2])
    x = images(1, 3, 64, 64)
    for load in (vmamba.load_segmenter, vmamba.load_model):
        again = load(path)
        assert torch.equal(again(x), model(x))
        assert again.backbone.model.options.drop_path_rate == 0.3
        assert (again.ignore_index, again.decode_head.dropout.p) == (7, 0.2)
    assert again.config.DATA.MEAN == [0.1] and again.class_names == ["a", "b", "c"]
    assert vmamba.load_checkpoint(vmamba.export(again, tmp_path / "b.pth")).config["DATA"]["MEAN"] == [0.1]


def test_the_file_of_a_detector_tells_what_it_is(tmp_path):
    torch.manual_seed(0)
    options = dict(depths=(1, 0, 0, 0), dims=8, ssm_act="gelu")
    predictions = PredictionSettings(score_thr=0.01, max_dets=7)
    detector = vmamba.create_detector(
        "mask_rcnn", "vmamba_tiny", 2, backbone_options=options, channels=8, hidden=16, samples=9,
        predictions=predictions,
    ).eval()  # fmt: skip
    again = vmamba.load_detector(vmamba.export(detector, tmp_path / "a.pth"))
    x = images(1, 3, 64, 64)
    for one, other in zip(again.backbone(x), detector.backbone(x), strict=True):
        assert torch.equal(one, other)
    assert again.predictions == predictions and again.roi_head.samples == 9


def test_files_on_backbones_of_timm_load_again(tmp_path):
    model = lasting("resnet18")
    again = vmamba.load_segmenter(vmamba.export(model, tmp_path / "a.pth"))
    assert torch.equal(again(images(1, 3, 64, 64)), model(images(1, 3, 64, 64)))


def test_the_file_of_a_classifier_tells_its_dropped_paths_and_images(tmp_path):
    model = small("vmamba_digits", drop_path_rate=0.3, in_chans=1)
    again = vmamba.load_model(vmamba.export(model, tmp_path / "a.pth", size=32))
    assert again.options.drop_path_rate == 0.3
    assert pytest.approx([0.449]) == again.config.DATA.MEAN and pytest.approx([0.226]) == again.config.DATA.STD


def test_weights_of_timms_classifiers_load_again(tmp_path):
    """As those of Vim and of any other baseline in our loop; the model's size, mean and deviation come along."""
    torch.manual_seed(0)
    for name, options, size in (
        ("vim_tiny_patch16_224", dict(img_size=(32, 48), drop_path_rate=0.2), (32, 48)),
        ("resnet18", {}, (64, 64)),
    ):
        model = timm.create_model(name, num_classes=2, in_chans=1, **options).eval()
        path = vmamba.export(model, tmp_path / f"{name}.safetensors", size=size, classes=["a", "b"])
        state = torch.get_rng_state()
        again, x = vmamba.load_model(path), images(1, 1, *size)
        assert torch.equal(again(x), model(x)) and again.class_names == ["a", "b"]
        assert tuple(again.config.DATA.IMG_SIZE) == size and len(again.config.DATA.MEAN) == 1
        assert options.get("drop_path_rate") == again.config.MODEL.DROP_PATH_RATE
        torch.set_rng_state(state)
        vmamba.export(again, path)
        assert torch.equal(torch.get_rng_state(), state)
    for odd in (
        timm.create_model("resnet18", act_layer="gelu"),
        timm.create_model("vit_tiny_patch16_224", global_pool=""),
        timm.create_model("vim_tiny_patch16_224", num_classes=2, depth=1, divide=False),
    ):
        with pytest.raises(
            UserError, match="no file could tell what this model is: its layers are not those of timm's"
        ):
            vmamba.export(odd, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="spelling is 'released', .* of a ResNet leave it out"):
        vmamba.export(model, tmp_path / "odd.pth", spelling="released")


class Tripled(VSSM):
    def forward(self, x):
        return 3 * super().forward(x)


def with_another_activation(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, nn.ReLU())


def with_another_eps(model):
    next(module for module in model.modules() if isinstance(module, nn.LayerNorm)).eps = 0.5


def with_another_route(model):
    model.layers[0].blocks[0].op.routes = ("col",) * 4


def with_a_hook(model):
    model.layers[0].blocks[0].op.register_forward_hook(lambda module, given, out: 1.01 * out)


def with_another_forward(model):
    model.__class__ = Tripled


def with_a_forward_that_fails(model):
    model.forward = lambda x: x.no_such_thing


@pytest.mark.parametrize("change", [
    with_another_activation, with_another_eps, with_another_route, with_a_hook, with_another_forward,
    with_a_forward_that_fails,
])  # fmt: skip
def test_weights_are_refused_where_their_file_would_give_another_model(tmp_path, change):
    """As they are initialised: with zeros and small numbers in it, some of this does not show in logits."""
    torch.manual_seed(0)
    model = vmamba.create_model("vmamba_digits", depths=(1, 1), dims=8, num_classes=5).train()
    before, state = {name: weight.clone() for name, weight in model.state_dict().items()}, torch.get_rng_state()
    vmamba.export(model, tmp_path / "a.pth")
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    change(model)
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(
            UserError, match="no file could tell what this model is: .*save its weights alone"
        ) as raised:
            vmamba.export(model, tmp_path / f"b{suffix}")
        assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    vmamba.export(vmamba.Backbone(model, (0, 1)), tmp_path / "c.pth")  # whose file tells of no model


def test_options_of_timm_that_no_layer_shows_are_refused(tmp_path):
    for name, options in (
        ("vit_tiny_patch16_224", dict(num_heads=6)),
        ("eva02_tiny_patch14_224", dict(rope_grid_offset=0.7)),
    ):
        model = timm.create_model(name, num_classes=3, **options)
        with pytest.raises(UserError, match="what its config builds gives other numbers for the same image"):
            vmamba.export(model, tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


def test_detectors_and_segmenters_with_layers_of_their_own_are_refused(tmp_path):
    detector = vmamba.create_detector("mask_rcnn", "vmamba_nano", 2, channels=8, hidden=16)
    detector.rpn_head.rpn_conv.register_forward_hook(lambda module, given, out: -out)
    more = lasting(depths=(1, 0, 0, 0), dims=8)
    more.auxiliary_head.more = nn.Linear(1, 1)
    with pytest.raises(UserError, match="what its config builds does not take its weights .*unexpected: .*more.weight"):
        vmamba.export(more, tmp_path / "a.pth")
    for model in (detector, lasting(depths=(1, 0, 0, 0), dims=8)):
        with_another_activation(model)
        with pytest.raises(UserError, match="what its config builds gives other numbers for the same image"):
            vmamba.export(model, tmp_path / "a.pth")


def test_weights_in_other_places_and_types_are_exported(tmp_path):
    model = small("vmamba_digits", depths=(1,)).to(memory_format=torch.channels_last).half()
    again = vmamba.load_model(vmamba.export(model, tmp_path / "a.pth"))
    assert all(torch.equal(weight, model.state_dict()[name].float()) for name, weight in again.state_dict().items())
    model.float().set_backend("triton")  # which no CPU serves
    nn.init.constant_(model.head.weight, float("nan"))
    vmamba.export(model, tmp_path / "a.pth")


# ------------------------------------------------------------------------------------------------ what is refused


def changed():
    model = small("vmamba_digits", depths=(1,))
    model.layers[0].blocks[0].op.in_proj = nn.Linear(8, 8)  # which has a bias
    return model


def quantised():
    return torch.ao.quantization.quantize_dynamic(small("vmamba_digits"), {nn.Linear})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "name", "options", "sentence"),
    [
        (lambda: nn.Linear(1, 1), "a.onnx", {}, "this is a Linear; export takes what create_model"),
        (lambda: None, "a.onnx", {}, "this is a NoneType; export takes what create_model"),
        (
            lambda: small("vmamba_digits"),
            "a.zip",
            {},
            "the suffix of '.*a.zip' says no format; use one of .safetensors",
        ),
        (lambda: small("vmamba_digits"), "a.pt2", dict(format="torhc"), "unknown format 'torhc'; did you mean 'torch'"),
        (lambda: small("vmamba_digits"), "a.pt", dict(format="torch"), "let its name end in .pt2"),
        (
            lambda: small("vmamba_digits"),
            "a.pt2",
            dict(dynamic="batches"),
            "unknown word of dynamic 'batches'; did you",
        ),
        (lambda: small("vmamba_digits"), "a.pt2", dict(size=(1, 2, 3)), "size is .1, 2, 3.; expected 2 values"),
        (lambda: small("vmamba_digits"), "a.pt2", dict(spelling="released"), "has no names of weights; leave it out"),
        (lambda: small("vmamba_tiny"), "a.pt2", dict(size=3), "images are 3 x 3 pixels; this model's patches need"),
        (lambda: small("vmamba_digits"), "a.pth", dict(classes=["a"]), "classes names 1, and the model has 5"),
        (lambda: small("vmamba_digits"), "a.pth", dict(mean=[0, 0]), "mean has 2 numbers; give one, or one for"),
        (lambda: small("vmamba_digits"), "a.pth", dict(spelling="january"), "has no name in files of January 2024"),
        (changed, "a.safetensors", {}, "no longer those that its options make"),
        (lambda: small("vmamba_digits", global_pool=""), "a.pth", {}, "global_pool is '', and the model of a config"),
        (lambda: small("vmamba_digits"), 5, {}, "path is 5 .int.; give that of the file"),
        (lambda: small("vmamba_digits"), "a" * 256 + ".pth", {}, "File name too long; choose another name"),
        (lambda: small("vmamba_digits"), "a\0.onnx", {}, r"a.x00.onnx': embedded null byte; choose another name"),
        (lambda: small("vmamba_digits"), "a.pth", dict(mean="abc"), "mean is 'abc' .str.; expected a list of numbers"),
        (lambda: small("vmamba_digits"), "a.pth", dict(std=[0]), "std is .0.0.; it must be above 0"),
        (
            lambda: small("vmamba_digits"),
            "a.pth",
            dict(mean=[float("nan")]),
            "mean is .nan. .list.; expected a list of finite",
        ),
        (
            lambda: small("vmamba_digits"),
            "a.pth",
            dict(std=[0.1, "x"]),
            "std is .0.1, 'x'. .list.; expected a list of n",
        ),
        (lambda: small("vmamba_digits"), "a.pth", dict(classes="abcde"), "classes is 'abcde' .str.; expected a list"),
        (lambda: small("vmamba_digits"), "a.pt2", dict(dynamic=5), "dynamic is 5 .int.; give a list of batch and size"),
        (quantised, "a.pth", {}, "is quantised; export the model as it was before"),
        (quantised, "a.onnx", {}, "is quantised; export the model as it was before"),
        (
            lambda: vmamba.create_segmenter("upernet", "vmamba_nano", 2, channels=8, pool_scales=[1, 2, 3, 5]),
            "a.pth",
            {},
            "no file could tell what this model is: pool_scales is .1, 2, 3, 5., and that of",
        ),
        (
            lambda: UperNet(vmamba.create_segmenter("upernet", "resnet18", 2).backbone, 300, channels=8),
            "a.pth",
            {},
            "no file could tell what this model is: .*NUM_CLASSES is 300; it must be between 1 and 254",
        ),
        (lambda: small("vmamba_digits").half(), "a.onnx", {}, "the weights are float16, and a program is recorded in"),
        (lambda: small("vmamba_digits").to("meta"), "a.pt2", {}, "the weights are on the meta device"),
        (lambda: small("vmamba_digits").to("meta"), "a.pth", {}, "holds no plain numbers"),
        (
            lambda: small("vmamba_digits", pos_embed=True, img_size=32),
            "a.onnx",
            dict(dynamic=("batch", "size")),
            "a model with pos_embed resizes its map by the size of the images",
        ),
        (
            lambda: vmamba.create_detector("mask_rcnn", "vmamba_nano", 2, channels=8, hidden=8),
            "a.onnx",
            {},
            "a detector gives as many boxes as it finds, .* export its maps: vmamba.export.model.backbone",
        ),
        (
            lambda: vmamba.create_segmenter("upernet", "vmamba_nano", 2, channels=8),
            "a.pt2",
            dict(dynamic="size"),
            "a UperNet can be recorded for one size of images alone",
        ),
        (
            lambda: vmamba.create_segmenter("upernet", "vmamba_nano", 2, channels=8),
            "a.pth",
            dict(spelling="released"),
            "spelling is 'released', which classifiers and backbones of ours have alone",
        ),
    ],
)
def test_what_cannot_be_exported_is_one_sentence_before_any_work(tmp_path, monkeypatch, make, name, options, sentence):
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(UserError, match=sentence) as raised:
        vmamba.export(make(), tmp_path / name if isinstance(name, str) else name, **options)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        dict(classes=[1] * 1000),
        dict(std=[-1.0] * 1000),
        dict(dynamic=["x" * 1000]),
        dict(spelling="x" * 1000),
        dict(format="x" * 1000),
    ],
)
def test_a_sentence_tells_the_beginning_of_what_is_long(tmp_path, options):
    with pytest.raises(UserError) as raised:
        vmamba.export(small("vmamba_digits"), tmp_path / "a.pth", **options)
    assert len(str(raised.value)) < 400


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    model = small("vmamba_digits")
    monkeypatch.setattr("vmamba.exporting.graphs.find_spec", lambda name: None)
    with pytest.raises(UserError, match="the format onnx needs onnx and onnxscript; pip install -e '.\\[export\\]'"):
        vmamba.export(model, tmp_path / "a.onnx")
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(UserError, match="needs a compiler of C.., and there is no 'no-compiler'"):
        vmamba.export(model, tmp_path / "a.pt2", format="aoti")
    if Path("/proc/self").is_dir():  # which says that root may write there
        monkeypatch.setattr(programs, "recorded", lambda *_: pytest.fail("it has begun"))
        with pytest.raises(UserError, match="cannot write '/proc/a.pt2': .*; .*choose another folder"):
            vmamba.export(model, "/proc/a.pt2")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UserError, match="cannot write .*folder.pth': it is a folder; name a file in it"):
        vmamba.export(model, tmp_path / "folder.pth")


def test_the_command_names_what_is_missing(tmp_path):
    from vmamba.exporting.command import export_file

    with pytest.raises(UserError, match="--output is missing"):
        export_file(model="vmamba_digits")
    with pytest.raises(UserError, match="give one of --model, for random weights, and --checkpoint"):
        export_file(output="a.onnx")
    with pytest.raises(UserError, match="unknown model 'vim_tinny_patch16_224'; did you mean 'vim_tiny_patch16_224'"):
        export_file(model="vim_tinny_patch16_224", output=str(tmp_path / "a.pth"))
    path = export_file(model="timm/resnet18", output=str(tmp_path / "a.pth"))
    assert vmamba.load_checkpoint(path).config["MODEL"]["NAME"] == "timm/resnet18"
    with pytest.raises(UserError, match="--part backbone is of detectors and segmenters"):
        export_file(model="vmamba_digits", part="backbone", output=str(tmp_path / "a.onnx"))
    with pytest.raises(UserError, match="--cfg, --names and --weights are of a --checkpoint; leave them out"):
        export_file(model="vmamba_digits", names="names.txt", output=str(tmp_path / "a.onnx"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt2", ".onnx"])
def test_nothing_but_a_file_of_export_is_written_over(tmp_path, suffix):
    """Not what others wrote in the same format."""
    model, path = small("vmamba_digits", depths=(1,)), tmp_path / f"a{suffix}"
    others = {
        ".safetensors": lambda: save_file({"a": torch.ones(2)}, path),
        ".pth": lambda: torch.save({"model": model.state_dict(), "averaged": []}, path),
        ".pt2": lambda: torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(1),)), path),
        ".onnx": lambda: path.write_bytes(b"\x08\x0a\x12\x00"),
    }
    others[suffix]()
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"a{suffix}' is there already and is no file of vmamba.export; remove it, or"):
        vmamba.export(model, path, size=32, dynamic=())
    assert path.read_bytes() == before
    path.write_bytes(b"")
    vmamba.export(model, path, size=32, dynamic=())
    check_place(path)
