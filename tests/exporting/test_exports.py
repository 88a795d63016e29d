"""Files for other programs: what they hold, what runs them gives what the model gives, and what is refused."""

import copy
import json
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import vmamba
from vmamba.detection.roi_heads import PredictionSettings
from vmamba.errors import UserError
from vmamba.exporting import comparison, graphs, loading, programs
from vmamba.models.pretrained import load_pretrained
from vmamba.models.variants import VARIANTS
from vmamba.models.vssm import VSSM
from vmamba.segmentation.upernet import UperNet

BY_NAME = not callable(torch.export.Dim.DYNAMIC)  # PyTorch 2.6 leaves a size open only under a name, and proves little
needs_onnx = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


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


# ------------------------------------------------------------------------------------------------ programs

ELSEWHERE = """
import sys, torch
class No:
    def find_spec(self, name, *rest):
        if name.startswith("vmamba"):
            raise ImportError(name)
sys.meta_path.insert(0, No())
path = sys.argv[1]
program = torch.export.load(path).module()
torch.save([program(x) for x in torch.load(path + ".in")], path + ".out")
"""


def test_programs_run_in_a_process_that_has_only_pytorch(tmp_path):
    model, path = small("vmamba_tiny_s1l8", depths=(1,)), tmp_path / "backbone.pt2"
    backbone = vmamba.Backbone(model, (0,))
    model.set_backend("triton")  # which no CPU serves
    vmamba.export(backbone, path, size=(36, 44))
    model.set_backend("auto")
    several = [images(count, 3, 36, 44) for count in (1, 3)]
    torch.save(several, f"{path}.in")
    subprocess.run([sys.executable, "-c", ELSEWHERE, path], check=True, timeout=120)
    for x, found in zip(several, torch.load(f"{path}.out"), strict=True):
        same(found[0], backbone(x)[0])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A model that takes any batch of 32 x 36 pixels and its file."""
    model, path = small("vmamba_digits", depths=(1,)), tmp_path_factory.mktemp("program") / "a.pt2"
    return model, vmamba.export(model, path, size=(32, 36), classes=list("abcde"))


def test_a_program_is_run_here_too(program):
    from PIL import Image

    model, path = program
    found = vmamba.load_program(path)
    for count in (1, 3):
        same(found(images(count, 3, 32, 36)), model(images(count, 3, 32, 36)))
    assert found.class_names == list("abcde") and repr(found) == f"Program('{path}', images (1 or more, 3, 32, 36))"
    top = vmamba.predict(found, Image.new("RGB", (50, 60), (200, 30, 90)))[0]["top"]
    assert sorted(each["name"] for each in top) == list("abcde")
    model.config, model.class_names = found.config, found.class_names
    assert vmamba.predict(model, Image.new("RGB", (50, 60), (200, 30, 90)))[0]["top"][0]["name"] == top[0]["name"]


def test_what_the_caller_has_set_changes_no_programs_numbers(program):
    from PIL import Image

    found, x, image = vmamba.load_program(program[1]), images(2, 3, 32, 36), Image.new("RGB", (50, 60), (200, 30, 90))
    expected, top = found(x), vmamba.predict(found, image)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = found(x)
            assert again.dtype == torch.float32 and torch.equal(again, expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(found(x), expected) and vmamba.predict(found, image) == top


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            torch.zeros(0, 3, 32, 36),
            r"the images have the shape \(0, 3, 32, 36\), and '.*a.pt2' takes \(1 or more, 3, 32, 36",
        ),
        (torch.zeros(1, 3, 36, 32), r"\(1, 3, 36, 32\), and .* give it such, or export the model for yours"),
        (torch.zeros(3, 32, 36), r"the images have the shape \(3, 32, 36\), and"),
        (torch.zeros(1, 3, 32, 36).half(), "the images are float16 on cpu, and '.*' takes float32 on the CPU; give it"),
        (torch.zeros(1, 3, 32, 36, device="meta"), "the images are float32 on meta, and"),
        ([1], "the images are a list; '.*a.pt2' takes a tensor"),
    ],
)
def test_what_a_program_was_not_made_for_is_one_sentence(program, given, sentence):
    with pytest.raises(UserError, match=sentence):
        vmamba.load_program(program[1])(given)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_segmenters_program_of_one_size_predicts_images_of_any(tmp_path, mode):
    """A model whose classes are whether a pixel is brighter than black, in a program of 64 x 96 pixels."""
    from PIL import Image

    asked = []

    def run(x):
        asked.append(x)
        return torch.cat((0 * x[:, :1], x[:, :1]), 1)

    data, test = dict(SCALE=[64, 999], MEAN=[0.5], STD=[0.5], CROP_SIZE=48), dict(MODE=mode, STRIDE=40)
    told = {"TASK": "segmentation", "MODEL": {"NUM_CLASSES": 2}, "DATA": data, "TEST": test}
    about = {"config": told, "classes": ["dark", "light"], "images": [[1, None], [3, 3], [64, 64], [96, 96]]}
    program = loading.Program(tmp_path / "a.onnx", run, about)
    assert program.size == (64, 96)
    for width, height in ((96, 64), (30, 20), (40, 400), (400, 40)):
        image = Image.new("RGB", (width, height))
        image.paste((255, 255, 255), (0, 0, width // 2, height))
        told = vmamba.predict(program, image)[0]["classes"]
        assert {each["name"] for each in told} == {"dark", "light"}
        assert all(each["share"] == pytest.approx(0.5, abs=0.05) for each in told)
    assert all(x.shape == (1, 3, 64, 96) for x in asked)
    if mode == "whole":  # 640 x 64 pixels of the last image are 96 x 10 of the program's, and zeros below
        assert not asked[-1][:, :, 10:].any() and (asked[-1][:, :, :10, :47] > 0.99).all()


def vim(**options):
    """With weights so large that every scan shows in the result."""
    torch.manual_seed(0)
    options = dict(img_size=(32, 48), depth=2, embed_dim=16, num_classes=5, d_state=4) | options
    model = timm.create_model("vim_tiny_patch16_224", **options).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    return model


def test_a_program_of_vim_has_pytorchs_operators_alone(tmp_path):
    model, path = vim(), tmp_path / "vim.pt2"
    for layer in model.layers:
        layer.mixer.set_backend("triton")  # which no CPU serves
    vmamba.export(model, path)
    for layer in model.layers:
        layer.mixer.set_backend("auto")
    program = vmamba.load_program(path)
    nodes = torch.export.load(path).graph.nodes
    assert not [node for node in nodes if node.op == "call_function" and "vmamba" in str(node.target)]
    for count in (1, 3):
        same(program(images(count, 3, 32, 48)), model(images(count, 3, 32, 48)))
    with pytest.raises(UserError, match="a Vim can be recorded for one size of images alone .*; leave 'size' out of"):
        vmamba.export(model, path, dynamic="size")
    with pytest.raises(UserError, match="vim_tiny_patch16_224 does not take images of 32 x 32 pixels"):
        vmamba.export(model, path, size=32)


def test_what_is_open_is_told(tmp_path):
    model, x = small("vmamba_digits", depths=(1,)), torch.zeros(2, 3, 32, 36)
    for dynamic, sizes in (
        ((), [[1, 1], [3, 3], [32, 32], [36, 36]]),
        (("size",), [[1, 1], [3, 3], [8, 4096], [8, 4096]]),
        (("batch", "size"), [[1, None], [3, 3], [8, 4096], [8, 4096]]),
    ):
        assert json.loads(programs.told(model, x, dynamic, {"classes": ["a"]})) == {"classes": ["a"], "images": sizes}


def test_a_compiled_program_is_told_what_it_takes(tmp_path, monkeypatch):
    """With stand-ins for PyTorch's functions: a compilation takes half a minute."""
    model, told = small("vmamba_digits", depths=(0,)), {}

    class Package:
        def get_metadata(self):
            return told["aot_inductor.metadata"]

        def __call__(self, images):
            return model(images)

    def compiled(program, package_path, inductor_configs):
        assert not inductor_configs.get("aot_inductor.check_lowerbound", BY_NAME)
        told.update(inductor_configs)
        with zipfile.ZipFile(package_path, "w") as archive:
            archive.writestr("model/data/aotinductor/model/a.so", "")
        return package_path

    monkeypatch.setattr(programs, "aoti_compile_and_package", compiled)
    monkeypatch.setattr(loading, "aoti_load_package", lambda path: Package())
    monkeypatch.setattr(programs, "check_compiler", lambda: None)
    found = vmamba.load_program(vmamba.export(model, tmp_path / "a.pt2", format="aoti", size=16, classes=list("abcde")))
    same(found(images(1, 3, 16, 16)), model(images(1, 3, 16, 16)))
    assert found.class_names == list("abcde")
    with pytest.raises(UserError, match="shape .1, 3, 17, 16., and"):
        found(images(1, 3, 17, 16))
    monkeypatch.setattr(loading, "aoti_load_package", lambda path: 1 / 0)
    with pytest.raises(UserError, match="a.pt2' cannot be run here .division by zero.; export the model again on this"):
        vmamba.load_program(tmp_path / "a.pt2")


def test_what_is_no_program_is_one_sentence(tmp_path, program):
    weights = vmamba.export(program[0], tmp_path / "a.pth")
    torch.export.save(torch.export.export(nn.Linear(1, 1), (torch.zeros(1, 1),)), tmp_path / "theirs.pt2")
    (tmp_path / "cut.pt2").write_bytes(program[1].read_bytes()[:-100])
    (tmp_path / "a.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch and no more")
    for path, sentence in (
        (weights, "is no program of ONNX, torch.export or AOTInductor, or not a whole one; files of weights are for"),
        (tmp_path / "cut.pt2", "or not a whole one"),
        (tmp_path / "theirs.pt2", "does not tell what images it takes: .*; export the model again"),
        (tmp_path / "nowhere.onnx", "cannot read '.*nowhere.onnx': No such file"),
        (5, "path is 5 .int.; give that of a program's file"),
    ):
        with pytest.raises(UserError, match=sentence):
            vmamba.load_program(path)
    for path, what in (
        (tmp_path / "a.onnx", "an ONNX model, a program for onnxruntime"),
        (program[1], "a program of Py"),
    ):
        with pytest.raises(UserError, match=f"is {what}.*no file of weights; vmamba.load_program.path. runs it"):
            vmamba.load_model(path)


FOUR = [[1, 1], [3, 3], [32, 32], [36, 36]]


def named(count):
    return {"images": FOUR, "config": {"MODEL": {"NUM_CLASSES": 5}}, "classes": ["a"] * count}


DAMAGED = [
    ("{", "it is '{', no mapping in JSON"),
    ("[" * 10**5, "it is '.*, no mapping in JSON"),
    ("3", "it is '3', no mapping"),
    ("null", "it is 'null', no mapping"),
    (dict(config=[], images=FOUR), "config is .., no mapping"),
    (dict(config={"TASK": "cooking", "MODEL": {"NUM_CLASSES": 5}}, images=FOUR), "unknown TASK 'cooking'"),
    (dict(config={"MODEL": {"NUM_CLASSES": "a"}}, images=FOUR), "MODEL.NUM_CLASSES is 'a' .str.; expected an integer"),
    (dict(classes=7, images=FOUR), "classes is 7, no list of names"),
    (dict(classes=["a", 7], images=FOUR), "classes is .'a', 7., no list of names"),
]


@pytest.mark.parametrize(
    ("told", "what"),
    [
        *DAMAGED,
        (named(4), "4 names for 5 classes"),
        *(
            (dict(images=each), "images is .*, no list of four .least, most.")
            for each in (3, None, FOUR[:3], [1, 3, 32, 36], [*FOUR[:3], [1, 2, 3]], [*FOUR[:3], [None, 3]])
        ),
    ],
)
def test_a_programs_damaged_description_is_one_sentence(tmp_path, monkeypatch, told, what):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\x08\x0a\x12\x07pytorch")
    text = told if isinstance(told, str) else json.dumps(told)
    monkeypatch.setattr(loading, "check_installed", lambda *_: None)
    monkeypatch.setitem(loading._OPENERS, "onnx", lambda path: (lambda images: images, text))
    with pytest.raises(UserError, match=f"what '.*a.onnx' tells of its model is damaged .*{what}.*; export the model"):
        vmamba.load_program(path)


@pytest.mark.parametrize(("told", "what"), DAMAGED)
def test_a_damaged_description_of_weights_is_one_sentence(tmp_path, told, what):
    text = told if isinstance(told, str) else json.dumps(told)
    save_file({"weight": torch.zeros(1)}, tmp_path / "a.safetensors", {"vmamba": text})
    with pytest.raises(UserError, match=f"'.*a.safetensors'.*{what}") as raised:
        vmamba.load_model(tmp_path / "a.safetensors")
    assert "\n" not in str(raised.value) and "truncated" not in str(raised.value)


class Measured(torch.fx.Interpreter):
    """Runs a program and keeps the size of its largest tensor."""

    largest = 0

    def run_node(self, node):
        found = super().run_node(node)
        self.largest = max(self.largest, found.numel() if isinstance(found, torch.Tensor) else 0)
        return found


def test_a_program_of_any_size():
    model = small("vmamba_tiny", depths=(1, 0), patch_size=16)  # a stride of 32, as four stages have with patches of 4
    assert programs.open_sides(model) == (64, 2**14)
    if BY_NAME:
        with pytest.raises(
            UserError, match="PyTorch 2.6.* batch and size open .*; use a newer PyTorch, or leave 'size'"
        ):
            programs.recorded(model, images(2, 3, 32, 32), ("batch", "size"))
        return
    program = programs.recorded(model, images(2, 3, 32, 32), ("batch", "size")).module()
    x, large = images(3, 3, 64, 68), images(1, 3, 517, 403)
    same(program(large), model(large))
    run = Measured(program)
    same(run.run(x), model(x))
    assert run.largest <= 3 * 4 * 48 * 16 * 16  # three images, four routes, three chunks, states, channels


@pytest.mark.parametrize(
    ("backend", "options"),
    [("graph", {}), ("reference", dict(routes="col", norm_layer="bn", patch_embed="v2", downsample="v1"))],
)
def test_any_size_of_a_single_image(backend, options):
    """Which makes conditions on one side alone; PyTorch wants those proven that are on a side with a name."""
    model = small("vmamba_tiny_s1l8", depths=(1, 0), **options)
    programs.set_backend(model, backend)
    if BY_NAME and options:
        with pytest.raises(UserError, match="PyTorch 2.6.* size open .*; use a newer PyTorch, or leave 'size'"):
            programs.recorded(model, images(2, 3, 32, 32), ("size",))
        return
    program = programs.recorded(model, images(2, 3, 32, 32), ("size",)).module()
    programs.set_backend(model, "reference")
    for sides in ((16, 16), (35, 147)):
        same(program(images(1, 3, *sides)), model(images(1, 3, *sides)))
    with pytest.raises(Exception, match=r"\[0\].*1"):
        program(images(2, 3, 32, 32))


def test_what_pytorch_does_not_record_is_one_sentence(monkeypatch):
    def refuse(*_, **__):
        raise torch._dynamo.exc.UserError(torch._dynamo.exc.UserErrorType.CONSTRAINT_VIOLATION, "No!\nMore of it")

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(
        UserError,
        match=r"cannot record this model with size open \(No!\); use a newer PyTorch, or leave 'size' out of dynamic",
    ):
        programs.recorded(small("vmamba_digits"), images(2, 3, 32, 32), ("size",))


def test_what_the_caller_has_set_is_not_recorded(tmp_path):
    model, x = small("vmamba_digits", depths=(1,)), images(2, 3, 32, 32)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            vmamba.export(model, tmp_path / "a.pt2", size=32)
            assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    same(torch.export.load(tmp_path / "a.pt2").module()(x), model(x))


FULL_DISK = """
import pathlib, resource, signal, sys, torch, vmamba
from vmamba.exporting import programs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    programs.write(pathlib.Path(sys.argv[1]), torch.nn.Linear(99, 99), torch.zeros(2, 99), (), {})
except vmamba.UserError as error:
    print("sentence:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are Unix's")
def test_a_full_disk_is_one_sentence_and_the_process_goes_on(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "a.pt2")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith("sentence: cannot write") and not list(tmp_path.iterdir())


def test_a_scan_of_heads_of_any_size():
    op = small("vmamba_tiny_m2", depths=(1,)).layers[0].blocks[0].op
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    with torch.no_grad():
        program = torch.export.export(op, (images(2, 6, 7, 8),), dynamic_shapes=(shape,), strict=False).module()
    for sides in ((3, 4, 5), (1, 41, 33)):  # of one chunk and of several
        same(program(images(*sides, 8)), op(images(*sides, 8)))


def test_a_program_tells_nothing_of_the_machine_and_leaves_the_model_as_it_is(tmp_path):
    model = changed().train()  # of layers that no option makes
    before = copy.deepcopy(model.state_dict())
    vmamba.export(model, tmp_path / "a.pt2", size=32)
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        assert not [name for name in archive.namelist() if b"vmamba/models" in archive.read(name)]
    assert model.training and all(each.requires_grad for each in model.parameters())
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ ONNX


def outputs(path, x):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime has no wheel here (Python 3.10)")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(each) for each in session.run(None, {"images": x.numpy()})]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of 16 states and its ONNX file, of any batch and size; of PyTorch 2.6 of one image of 32 pixels."""
    pytest.importorskip("onnxscript")
    model, path = small("vmamba_tiny", depths=(1, 0)), tmp_path_factory.mktemp("exported") / "model.onnx"
    vmamba.export(model, path, size=32, dynamic=() if BY_NAME else ("batch", "size"), classes=list("abcde"))
    return model, path


@needs_onnx
def test_onnx_of_any_batch_and_size(exported):
    model, path = exported
    program = vmamba.load_program(path) if find_spec("onnxruntime") else None
    for shape in [(1, 3, 32, 32)] if BY_NAME else [(1, 3, 32, 44), (3, 3, 75, 61)]:
        same(outputs(path, images(*shape))[0], model(images(*shape)))
        same(program(images(*shape)), model(images(*shape)))
    with pytest.raises(UserError, match=r"\(0, 3, 32, 32\), and '.*model.onnx' takes \(1"):
        program(images(0, 3, 32, 32))


@needs_onnx
def test_an_onnx_file_has_standard_operators_alone_and_tells_nothing_of_the_machine(exported):
    onnx = pytest.importorskip("onnx")
    held = onnx.load(exported[1])
    onnx.checker.check_model(held, full_check=True)
    assert [(each.domain, each.version) for each in held.opset_import] == [("", 18)] and not held.functions
    nodes = list(graphs._nodes(held.graph))
    names = {node.op_type for node in nodes}
    assert {node.domain for node in nodes} == {""} and "Scan" in names and "Loop" not in names
    content = exported[1].read_bytes()
    assert b"site-packages" not in content and b".py" not in content
    sides = [
        [[dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in values]
        for values in (held.graph.input, held.graph.output)
    ]
    assert sides == ([[[1, 3, 32, 32]], [[1, 5]]] if BY_NAME else [[["batch", 3, "height", "width"]], [["batch", 5]]])
    assert json.loads(held.metadata_props[0].value)["classes"] == list("abcde")


@needs_onnx
def test_onnx_of_a_segmenter_and_of_its_other_options(tmp_path):
    """The scan is of heads, in four chunks."""
    pytest.importorskip("onnxscript")
    options = dict(depths=(1, 0, 0, 0), dims=8, routes=("col_rev", "row"), out_norm="softmax", norm_layer="bn")
    segmenter = vmamba.create_segmenter("upernet", "vmamba_tiny_m2", 3, backbone_options=options, channels=8).eval()
    if BY_NAME:
        with pytest.raises(
            UserError, match=r"PyTorch 2.6.* as ONNX .*; use a newer one, or leave nothing open"
        ) as raised:
            vmamba.export(segmenter, tmp_path / "a.onnx", size=64)
        assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())
        return
    vmamba.export(segmenter, tmp_path / "a.onnx", size=64)
    for count in (1, 3):
        x = images(count, 3, 64, 64)
        same(outputs(tmp_path / "a.onnx", x)[0], segmenter(x))


@needs_onnx
def test_onnx_of_vim(tmp_path):
    pytest.importorskip("onnxscript")
    onnx, model = pytest.importorskip("onnx"), vim(depth=1)
    vmamba.export(model, tmp_path / "a.onnx", dynamic=() if BY_NAME else ("batch",))
    nodes = list(graphs._nodes(onnx.load(tmp_path / "a.onnx").graph))
    assert {node.domain for node in nodes} == {""} and [node.op_type for node in nodes].count("Scan") == 2
    for count in (1,) if BY_NAME else (1, 3):
        x = images(count, 3, 32, 48)
        same(outputs(tmp_path / "a.onnx", x)[0], model(x))


def test_the_maps_of_a_backbone_are_called_after_their_stages():
    assert graphs.output_names(vmamba.Backbone(small("vmamba_tiny"), (1, 0))) == ["stage1", "stage0"]
    assert graphs.output_names(small("vmamba_tiny")) == ["logits"]


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


@needs_onnx
def test_models_beside_each_other(tmp_path, monkeypatch, exported):
    """analyze/exports.py"""
    if BY_NAME:
        pytest.skip("PyTorch 2.6 writes no ONNX with the number of images open, which is what is compared")
    pytest.importorskip("onnxruntime", reason="onnxruntime has no wheel here (Python 3.10)")
    model, file = exported
    monkeypatch.setattr(comparison.zoo, "create", lambda name, size: SimpleNamespace(model=model))
    monkeypatch.setattr(comparison, "export", lambda model, path, size: shutil.copy(file, path))
    options = dict(models=["mixed"], sizes=[32], numbers=["float32", "int8"], repeats=1)
    rows = comparison.exports(**options, output=str(tmp_path), markdown=str(tmp_path / "table.md"))
    assert [row["numbers"] for row in rows] == ["float32", "int8"] and rows[0]["ratio"] == 1
    assert float(rows[0]["difference"]) < 1e-5 < float(rows[1]["difference"]) < 1
    assert rows[0]["same class"] == "yes" and rows[1]["file (MB)"] < rows[0]["file (MB)"]
    assert (tmp_path / "table.md").read_text() == (tmp_path / "exports.md").read_text()
