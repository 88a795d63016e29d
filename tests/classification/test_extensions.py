"""A user's own module: the example of docs/extending.md as its page says, and what goes wrong in one."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import vmamba
from vmamba import extensions
from vmamba.analysis.knn import knn
from vmamba.classification.task import Task
from vmamba.commands.export import parser as export_door
from vmamba.commands.predict import parser as predict_door
from vmamba.commands.push import parser as push_door
from vmamba.config import argument_parser, config_from_args, get_config
from vmamba.errors import UserError
from vmamba.exporting.command import export_file
from vmamba.runtime.trainer import run

from .tiny import ROOT, log, tiny_config

PAGE = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A working directory and registries of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for registry in (extensions.LOSSES, extensions.DATASETS):
        for name in [*registry]:
            monkeypatch.delitem(registry, name)
    yield tmp_path
    extensions.LOSSES.clear(), extensions.DATASETS.clear()
    for name in ("my_module", "own_module", "broken"):
        sys.modules.pop(name, None)


def test_the_example_of_the_page(alone):
    Path("my_module.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    line = shlex.split(re.search(r"^    python main.py (.*)$", PAGE, re.MULTILINE)[1])
    whole = config_from_args(argument_parser().parse_args(line))
    results = run(whole)
    assert results["acc1"] > 90
    assert "256 images to train on, 64 held out, 2 classes" in log(whole)
    last = knn("output/vmamba_digits/default", opts=["IMPORT", "my_module"], k=(5,), output="knn")[-1]
    assert last["top-1 (%)"] > 80  # of a model that does not tell its features
    tuned = [*line, "--tag", "tuned", "--pretrained", "output/vmamba_digits/default/best.pth", "--drop-head"]
    tuned = config_from_args(argument_parser().parse_args([*tuned, "--epochs", "1"]))
    run(tuned)
    assert "best.pth: dropped the head (4); the model's of 2 classes starts at random" in log(tuned)
    exported = export_file(checkpoint="output/vmamba_digits/default", output="net.safetensors")
    assert vmamba.load_model(exported).class_names == ["upright", "lying"]
    extensions.LOSSES.clear()  # another process: what a file names is not imported
    extensions.DATASETS.clear()
    assert get_config("output/vmamba_digits/default/config.yaml").IMPORT == ["my_module"]
    held_out = sys.modules["my_module"].Stripes(None, training=False)
    images, labels = zip(*[held_out[number] for number in range(20)], strict=True)
    told = vmamba.predict(vmamba.load_model("output/vmamba_digits/default"), images)
    assert sum(each["top"][0]["class"] == label for each, label in zip(told, labels, strict=True)) > 16
    assert {each["top"][0]["name"] for each in told} == {"upright", "lying"}


def test_a_checkpoint_names_the_module_to_import_and_a_flag_does_it(alone, monkeypatch, capsys):
    settings = {"MODEL": {"NAME": "timm/zebrafish", "NUM_CLASSES": 2}, "IMPORT": ["own_module"]}
    torch.save({"model": {"0.weight": torch.ones(2)}, "config": settings}, "own.pth")
    Path("own_module.py").write_text("raise RuntimeError('it runs')")
    words = (
        "timm knows no model 'zebrafish', and the config names modules that nothing has imported: own_module; if you"
    )
    with pytest.raises(UserError, match=rf"{words} trust them, import them first \(--import own_module\)"):
        vmamba.load_model("own.pth")
    with pytest.raises(
        UserError, match="unknown model 'zebrafish'; timm.list_models.. names timm's, and --import takes the"
    ):
        torch.save({"model": {"0.weight": torch.ones(2)}, "config": {**settings, "IMPORT": []}}, "none.pth")
        vmamba.load_model("none.pth")
    for door, arguments in (
        (predict_door, ["own.pth", "x.png"]),
        (export_door, ["--checkpoint", "own.pth", "--output", "x.onnx"]),
        (push_door, ["own.pth", "me/x"]),
    ):
        with pytest.raises(RuntimeError, match="it runs"):  # before anything else is done
            door().run([*arguments, "--import", "own_module"])
    with pytest.raises(SystemExit):
        predict_door().run(["own.pth", "x.png", "--import", "no_module"])
    assert "error: IMPORT names 'no_module', and there is no such module in" in capsys.readouterr().err


@pytest.mark.parametrize("soft", [False, True])
def test_a_registered_loss_by_hand(alone, soft):
    """Smoothed or mixed targets, and the classes' weights."""
    vmamba.register_loss("ce")(lambda logits, targets: -(targets * logits.log_softmax(1)).sum(1))
    task = Task(tiny_config(alone, "TRAIN.LOSS", "ce"))
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 6), torch.tensor([0, 5, 2, 2, 3])
    targets = torch.rand(5, 6).softmax(1) if soft else labels
    task.class_weights = None
    smoothing = 0.0 if soft else 0.1
    torch.testing.assert_close(
        task.criterion(logits, targets, smoothing), F.cross_entropy(logits, targets, label_smoothing=smoothing)
    )
    task.class_weights = torch.tensor([0.5, 1.0, 2.0, 3.0, 1.0, 0.0])
    weights = targets @ task.class_weights if soft else 0.9 * task.class_weights[labels] + 0.1 * 7.5 / 6
    by_hand = (F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none") * weights).mean()
    torch.testing.assert_close(task.criterion(logits, targets, smoothing), by_hand)


def test_what_a_module_does_wrong_is_a_sentence(alone):
    vmamba.register_loss("mean")(lambda logits, targets: logits.mean())
    vmamba.register_dataset("stream")(lambda config, training: iter([]))
    vmamba.register_dataset("none")(lambda config, training: [])
    for opts, words in (
        (("TRAIN.LOSS", "mean"), r"TRAIN.LOSS 'mean' gives losses \(\) of 10 images; give one for each, \(B,\)"),
        (("TRAIN.LOSS", "maen"), "unknown TRAIN.LOSS 'maen'; did you mean 'mean'"),
        (("DATA.DATASET", "stream"), r"DATA.DATASET 'stream' gives a list_iterator; register what gives a sequence"),
        (("DATA.DATASET", "none"), "DATA.DATASET 'none' has no training image; check DATA.DATA_PATH"),
        (("DATA.DATASET", "nnone"), "unknown DATA.DATASET 'nnone'; did you mean 'none'"),
        (
            ("IMPORT", "my_modul"),
            "IMPORT names 'my_modul', and there is no such module in '.*', nor where Python looks",
        ),
        (("IMPORT", "my/module.py"), "give its name, without .py and with dots for slashes"),
    ):
        with pytest.raises(UserError, match=words):
            run(tiny_config(alone, *opts))
    for register, name in ((vmamba.register_loss, "mean"), (vmamba.register_dataset, "imagenet")):
        with pytest.raises(UserError, match=f"the name '{name}' of a .* is taken; choose another"):
            register(name)(len)
    Path("broken.py").write_text("import nowhere_to_be_found")
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):  # whose traceback is the user's to read
        get_config(None, ["IMPORT", "broken"])


def test_a_mistake_in_a_data_sets_code_is_told_with_its_place_and_no_unreadable_image(alone):
    class Data(list):
        def __init__(self, wrong):
            super().__init__([0] * 20)
            self.wrong = wrong

        def __getitem__(self, index):
            return self.wrong()

    def mistaken():
        return {}["the image"], 0

    def refused():
        raise UserError("this data set is asleep; wake it")

    def damaged():
        raise OSError("the disk is broken")

    image = Image.new("RGB", (8, 8))
    for number, (wrong, words) in enumerate((
        (mistaken, r"the code that makes image \d+ of the training images of d0 raised KeyError \('the image'\) in '.*"
         r"test_extensions.py', line \d+; mend it"),
        (refused, "^this data set is asleep; wake it$"),
        (damaged, r"cannot read 'image \d+ of the training images of d2': the disk is broken; mend or remove it"),
        (lambda: (image, "cat"), r"label 'cat' of 'image \d+ of the training images of d3' is no class's number"),
    )):  # fmt: skip
        vmamba.register_dataset(f"d{number}")(lambda config, training, wrong=wrong: Data(wrong))
        with pytest.raises(UserError, match=words):
            run(tiny_config(alone, "DATA.DATASET", f"d{number}"))
