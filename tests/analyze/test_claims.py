"""What pictures and tables say of models, weights and data: what is known, and no more."""

import json
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text

from vmamba import create_model
from vmamba.analysis import zoo
from vmamba.analysis.attention import activation_map
from vmamba.analysis.curves import curves
from vmamba.analysis.gradcam import gradcam
from vmamba.analysis.receptive_field import erf
from vmamba.analysis.scaling import scale
from vmamba.analysis.speed import throughput
from vmamba.analysis.summary import summary
from vmamba.analysis.tables import parameters
from vmamba.config import get_config, save_config
from vmamba.errors import UserError
from vmamba.models.variants import VARIANTS, build_model
from vmamba.text import counted


def config_of(*changes: str):
    return get_config("configs/vmamba_digits.yaml", changes)


def save_run(folder, *changes: str) -> str:
    """A checkpoint as a run leaves it, and what else its folder holds."""
    config = config_of(*changes)
    folder.mkdir()
    content = {"model": build_model(config).state_dict(), "config": yaml.safe_load(config.dump())}
    torch.save(content, folder / "last.pth")
    save_config(config, folder / "config.yaml")
    entry = {"epoch": 1, "train_loss": 2.0, "seconds": 1}
    (folder / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    return str(folder / "last.pth")


FLOWERS = (
    "DATA.DATASET",
    "imagenet",
    "DATA.DATA_PATH",
    "/data/flowers",
    "MODEL.NUM_CLASSES",
    "5",
    "MODEL.IN_CHANS",
    "3",
)
CHANGED = ("MODEL.OPTIONS.d_state", "2", "MODEL.OPTIONS.gate", "False")  # the variant has no gate either


@pytest.fixture
def flowers(tmp_path):
    """A run on a folder of images, whose format is called imagenet, with an option changed."""
    return save_run(tmp_path / "run", *FLOWERS, *CHANGED)


@pytest.fixture
def written(monkeypatch):
    """What stands on the pictures that are saved meanwhile."""
    texts = []

    def remember(figure, file, **settings):
        texts.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", remember)
    return texts


PICTURES = {
    "erf": lambda weights, output: erf(models=["vmamba_digits"], weights=[weights], size=32, num_images=1, **output),
    "activation_map": lambda weights, output: activation_map(model="vmamba_digits", weights=weights, size=32, **output),
    "gradcam": lambda weights, output: gradcam(model="vmamba_digits", weights=weights, size=32, **output),
    "curves": lambda weights, output: curves([weights.removesuffix("/last.pth")], output=output["output"]),
}


@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture_names_data_classes_parameters_and_changed_options(picture, flowers, written, tmp_path, monkeypatch):
    if picture == "gradcam":  # its package, which the maps alone need, may not be there
        monkeypatch.setattr("vmamba.analysis.gradcam.class_map", lambda *_: torch.zeros(32, 32))
    PICTURES[picture](flowers, {"output": str(tmp_path)} | ({} if picture == "curves" else {"device": "cpu"}))
    text = " ".join(" ".join(written).split())
    model = create_model("vmamba_digits", num_classes=5, d_state=2)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert "vmamba_digits (d_state=2)" in text
    assert f"{parameters(count)}, trained on folder 'flowers' (5 classes)" in text
    assert "imagenet" not in text.lower()


def test_tables_name_them_too(flowers, tmp_path):
    assert summary("vmamba_digits", weights=flowers, size=32).startswith(
        "vmamba_digits (d_state=2), trained on folder 'flowers' (5 classes); 32 x 32 pixels: "
    )


def test_a_picture_of_accuracies_names_the_data_of_both(digits_run, written, tmp_path):
    weights = [str(digits_run / "last.pth")]
    scale(models=["vmamba_digits"], sizes=[32], weights=weights, cfg="configs/vmamba_digits.yaml", output=str(tmp_path))
    assert "vmamba_digits, 0.139M parameters, trained on digits (10 classes)" in written
    assert "held-out images of digits (10 classes)" in written


def test_a_picture_of_costs_or_speeds_names_sizes(written, tmp_path):
    scale(models=["deit_tiny_patch16_224"], sizes=[32, 896], output=str(tmp_path))
    assert "deit_tiny_patch16_224, 5.7M to 6.3M parameters" in written
    throughput(
        models=["vmamba_digits"], sizes=[32], batch_sizes=[1], warm_up=1, repeats=1, device="cpu", output=str(tmp_path)
    )
    assert "vmamba_digits, 0.204M parameters" in written
    threads = counted(torch.get_num_threads(), "thread")
    assert any(text.startswith(f"on {threads} of a CPU") and "random weights" in text for text in written)


@pytest.mark.parametrize(
    ("changes", "data"),
    [
        ((), "digits (10 classes)"),
        (("MODEL.NUM_CLASSES", "1"), "digits (1 class)"),
        (("DATA.DATASET", "cifar10", "DATA.DATA_PATH", "/data"), "cifar10 (10 classes)"),
        (("DATA.DATASET", "hfds/fashion"), "hfds/fashion (10 classes)"),
        (("DATA.DATASET", "torch/x", "DATA.DATA_PATH", "flowers/"), "torch/x in folder 'flowers' (10 classes)"),
        (("DATA.DATASET", "imagenet", "DATA.DATA_PATH", "data/imagenet/", "MODEL.NUM_CLASSES", "1000"),
         "folder 'imagenet' (1,000 classes)"),
        (("DATA.DATASET", "imagenet", "DATA.DATA_PATH", "."), "folder '.' (10 classes)"),
    ],
)  # fmt: skip
def test_the_data_of_a_config(changes, data):
    assert zoo.data_of(config_of(*changes)) == data


def test_weights_that_a_run_started_from_are_named(tmp_path):
    path = save_run(tmp_path / "run", "MODEL.PRETRAINED", "weights/released.pth")
    assert zoo.create("vmamba_digits", 32, path).weights == "trained on digits (10 classes), from released.pth"


def test_changed_options_are_those_that_differ_from_the_variant():
    options = {"d_state": 1, "gate": False, "depths": [2, 2], "out_norm": "ln", "mlp_ratio": 2.0, "routes": ["row"]}
    assert zoo.changed_options("vmamba_digits", options) == {"mlp_ratio": 2.0, "routes": ["row"]}


def test_imagenet_is_said_of_released_files_only(tmp_path, monkeypatch):
    address = "https://example.org/%23v2cls/released.pth"
    variant = replace(VARIANTS["vmamba_digits"], weights=address, parameters=204_136)
    monkeypatch.setitem(VARIANTS, "vmamba_digits", variant)
    model = create_model("vmamba_digits")
    other = create_model("vmamba_digits", num_classes=7)
    (tmp_path / "other").mkdir()
    for name, saved in {"released.pth": model, "mine.pth": model, "other/released.pth": other}.items():
        torch.save(saved.state_dict(), tmp_path / name)

    def said(weights):
        return zoo.create("vmamba_digits", 32, weights).weights

    assert said(tmp_path / "released.pth") == "released weights, trained on ImageNet (1,000 classes)"
    assert said(tmp_path / "mine.pth") == "weights mine.pth, trained on unknown data (1,000 classes)"
    assert said(tmp_path / "other/released.pth") == "weights released.pth, trained on unknown data (7 classes)"
    monkeypatch.setattr("vmamba.models.pretrained.download", lambda url: tmp_path / "released.pth")
    assert said(address) == "released weights, trained on ImageNet (1,000 classes)"
    assert said("https://elsewhere.org/released.pth").startswith("weights released.pth, trained on unknown data")


def test_of_timms_weights_the_tag_is_told_and_of_a_file_nothing(tmp_path, monkeypatch):
    build = timm.create_model
    torch.save(build("resnet10t").state_dict(), tmp_path / "mine.pth")
    label = zoo.create("resnet10t", 32, tmp_path / "mine.pth").weights
    assert label == "weights mine.pth, trained on unknown data (1,000 classes)"
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: build(name, **options))
    assert zoo.create("resnet10t", 32, "pretrained").weights == "timm's weights c3_in1k (1,000 classes)"


def test_timms_weights_that_cannot_be_downloaded_are_a_sentence(monkeypatch):
    build = timm.create_model

    def offline(name, pretrained, **options):
        if pretrained:
            raise FileNotFoundError("cannot find the file on the Hub\nand no cached copy")
        return build(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    message = r"cannot download timm's weights of resnet10t \(cannot find the file on the Hub\); give a file of them"
    with pytest.raises(UserError, match=message):
        zoo.create("resnet10t", 32, "pretrained")


def test_a_file_that_does_not_fit_one_of_timms_models_says_where(flowers, tmp_path):
    with pytest.raises(UserError, match="last.pth' holds a vmamba_digits, not a resnet10t; name that model"):
        summary("resnet10t", weights=flowers, size=32)
    torch.save(create_model("vmamba_digits").state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"bare.pth' is of another architecture: \d+ missing: bn1.bias, .*unexpected"):
        summary("resnet10t", weights=tmp_path / "bare.pth", size=32)
    with pytest.raises(UserError, match="no checkpoint 'absent.pth'"):
        summary("resnet10t", weights="absent.pth", size=32)
    for content in ({"model": {"a": 1}}, [1], {"epoch": 1}, torch.zeros(1)):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match="other.pth' holds no state dict"):
            summary("resnet10t", weights=str(tmp_path / "other.pth"), size=32)
    weights = {f"module.{name}": weight for name, weight in timm.create_model("resnet10t").state_dict().items()}
    torch.save({"epoch": 3, "state_dict": {}, "state_dict_ema": weights}, tmp_path / "timms.pth")
    model = zoo.create("resnet10t", 32, tmp_path / "timms.pth").model
    assert torch.equal(model.fc.weight, weights["module.fc.weight"])


def test_the_untrained_model_of_a_file_has_its_classes(flowers):
    subject = zoo.create_untrained("vmamba_digits", 32, flowers)
    assert subject.facts.endswith("random weights")
    assert subject.model.num_classes == 5
    assert subject.title == "vmamba_digits (d_state=2)"


def test_numbers_in_words():
    assert [counted(number, "thread") for number in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
    assert counted(1000, "class", "classes") == "1,000 classes"
    assert parameters(30_249_064) == "30.2M parameters"
    assert parameters(98_410) == "0.0984M parameters"
    assert parameters(2_000_000, 1_960_000) == "2.0M parameters"


def test_a_timm_model_that_our_loop_trained_has_the_channels_classes_and_data_of_its_run(tmp_path):
    opts = ["MODEL.NAME", "timm/resnet10t", "MODEL.NUM_CLASSES", 3, "MODEL.IN_CHANS", 1, "DATA.DATASET", "digits"]
    config = get_config(None, [*opts, "DATA.MEAN", [0.3], "DATA.STD", [0.2]])
    weights = build_model(config).state_dict()
    torch.save({"model": weights, "config": yaml.safe_load(config.dump())}, tmp_path / "last.pth")
    subject = zoo.create("resnet10t", 32, tmp_path / "last.pth")
    assert (subject.in_chans, subject.mean, subject.name) == (1, [0.3], "resnet10t")
    assert subject.weights == "trained on digits (3 classes)"
    assert torch.equal(subject.model.state_dict()["fc.weight"], weights["fc.weight"])
    untrained = zoo.create_untrained("resnet10t", 32, tmp_path / "last.pth")
    assert not torch.equal(untrained.model.state_dict()["fc.weight"], weights["fc.weight"])
    with pytest.raises(UserError, match="last.pth' holds a timm/resnet10t, not a resnet18; name that model"):
        zoo.create("resnet18", 32, tmp_path / "last.pth")
