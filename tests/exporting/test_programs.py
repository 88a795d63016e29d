"""Programs: of torch.export, AOTInductor and ONNX, what they give, and what they are given."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import vmamba
from vmamba.analysis.prediction import image_transform
from vmamba.errors import UserError
from vmamba.exporting import comparison, graphs, loading, programs

from ..forked import Program
from .test_exports import changed, images, same, small

FOUR = [[1, 1], [3, 3], [32, 32], [36, 36]]
BY_NAME = not callable(torch.export.Dim.DYNAMIC)  # PyTorch 2.6 leaves a size open only under a name, and proves little
needs_onnx = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

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
        (
            torch.nested.nested_tensor([torch.zeros(3, 32, 36)]),
            "the images are nested, and '.*a.pt2' takes a dense tensor",
        ),
        (
            torch.zeros(1, 3, 32, 36).to_sparse(),
            "the images are sparse_coo, and '.*a.pt2' takes a dense tensor; give it such",
        ),
    ],
)
def test_what_a_program_was_not_made_for_is_one_sentence(program, given, sentence):
    with pytest.raises(UserError, match=sentence):
        vmamba.load_program(program[1])(given)


def test_images_of_odd_kinds_reach_a_program_as_plain_ones(tmp_path, program):
    """Lazily negated ones, and such that want gradients, in a runtime that takes arrays of numpy."""
    model, x = program[0], images(1, 3, 32, 36)
    about = {"images": [[1, None], [3, 3], [32, 32], [36, 36]]}
    run = loading.Program(tmp_path / "a.onnx", lambda images: model(torch.from_numpy(images.numpy())), about)
    for given in (
        torch._neg_view(-x),
        x.clone().requires_grad_(),
        x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
    ):
        for each in (run, vmamba.load_program(program[1])):
            same(each(given), model(x))


def test_a_copy_of_a_program_is_loaded_from_its_file(program, monkeypatch):
    found, x = vmamba.load_program(program[1]), images(1, 3, 32, 36)
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(nn.Sequential(found))):
        assert torch.equal(again(x), found(x))
    monkeypatch.chdir(program[1].parent)
    held = pickle.dumps(vmamba.load_program(program[1].name))
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(held)(x), found(x))


def test_a_program_is_loaded_whatever_the_caller_has_set(program):
    x, expected = images(1, 3, 32, 36), vmamba.load_program(program[1])(images(1, 3, 32, 36))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            found = vmamba.load_program(program[1])
            assert torch.equal(found(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found(x), expected)


def test_a_program_that_tells_no_classes_says_what_to_do(tmp_path):
    from PIL import Image

    program = loading.Program(tmp_path / "backbone.onnx", lambda images: images, {"images": FOUR})
    for ask in (lambda: vmamba.predict(program, Image.new("RGB", (9, 9))), lambda: image_transform(program)):
        with pytest.raises(
            UserError, match="backbone.onnx' does not tell .* of a backbone .*; call the program itself"
        ):
            ask()


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
        layer.mixer.scan_backend = "triton"  # which no CPU serves
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
    (tmp_path / "full_disk.py").write_text(FULL_DISK)
    ran = Program(tmp_path / "full_disk.py", tmp_path / "a.pt2")
    said, errors = ran.communicate()
    assert ran.returncode == 0, errors[-2000:]
    assert said.startswith("sentence: cannot write") and [*tmp_path.iterdir()] == [tmp_path / "full_disk.py"]


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
