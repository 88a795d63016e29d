"""A run's card, and its model as the hub would hold it."""

import json
import os
import shutil

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.models._hub import has_hf_hub, save_for_hf

import vmamba
from vmamba.config import get_config, output_folder
from vmamba.errors import UserError
from vmamba.exporting import publishing
from vmamba.exporting.command import export_file
from vmamba.exporting.publishing import as_timms, card_text, push, write_card
from vmamba.runtime.evaluation import data_of
from vmamba.runtime.records import read_metrics
from vmamba.runtime.trainer import run

from ..classification.tiny import TINY, tiny_config, tiny_file


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("run"), "TRAIN.EPOCHS", 1, "MODEL.WEIGHTS", "model")
    run(config)
    return config


def test_a_card_tells_data_recipe_results_command_and_licence(config, tmp_path):
    best = output_folder(config) / "best.pth"
    export_file(checkpoint=str(best), output=str(tmp_path / "tiny.safetensors"), card=True, licence="mit")
    _, head, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) | {"tags": None} == {
        "license": "mit",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": None,
    }
    assert "`vmamba_digits` with depths [1, 1], dims 8, trained on folder 'images' (6 classes) at 16 x 16" in text
    last = json.loads((output_folder(config) / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"- acc1: {last['acc1']:.4g}\n" in text and "- seconds" not in text
    assert "- TRAIN.BASE_LR: 0.1\n" in text and "DATA_PATH" not in text and "EVAL_FREQ" not in text
    start = json.loads((output_folder(config) / "run.json").read_text())["starts"][0]
    assert f"    {start['command']}\n" in text and f"torch {start['versions']['torch']}" in text
    assert 'vmamba.load_model("tiny.safetensors")' in text
    write_card(best, tmp_path / "again.pth")  # over one of its own
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="README.md' would be written over; move it away"):
        write_card(best, tmp_path / "again.pth")
    torch.save(torch.load(best), tmp_path / "alone.pth")
    with pytest.raises(UserError, match="alone.pth' does not lie in the folder of a run"):
        write_card(tmp_path / "alone.pth", tmp_path / "sub" / "x.pth")
    with pytest.raises(UserError, match="--card is of a run, and --model gives random weights"):
        export_file(model="vmamba_digits", output=str(tmp_path / "x.pth"), card=True)


def test_a_card_tells_no_result_of_an_evaluation_that_does_not_count(config, tmp_path):
    """What the argmax of NaN gets right is no accuracy."""
    folder = shutil.copytree(output_folder(config), tmp_path / "run")
    words = "evaluation does not count: a loss or a result was not finite."
    rounds = [entry | {"val_loss": None} for entry in read_metrics(folder / "metrics.jsonl")]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in rounds))
    text = card_text(folder / "last.pth", tmp_path / "x.pth")
    assert f"last.pth is of, whose {words}" in text and "acc1" not in text
    told = {"results": {"acc1": 12.34, "val_loss": None}, "details": {}, "checkpoint": str(folder / "last.pth")}
    told["data"] = data_of(get_config(folder / "config.yaml"))
    (folder / "evaluation.json").write_text(json.dumps(told))
    text = card_text(folder / "last.pth", tmp_path / "x.pth")
    assert "Of last.pth, evaluated by itself, which does not count: a loss" in text and "acc1" not in text


def test_a_card_has_the_results_of_its_own_file_and_names_its_weights(config, tmp_path):
    folder = shutil.copytree(output_folder(config), tmp_path / "run")
    best, path = folder / "best.pth", folder / "evaluation.json"
    its = read_metrics(folder / "metrics.jsonl")[-1]
    told = {"results": {"acc1": 12.34}, "details": {}, "data": data_of(get_config(folder / "config.yaml"))}
    for checkpoint, data, later, ours in (
        (best, {}, 5, True),
        (folder / "last.pth", {}, 5, False),  # other weights
        (best, {"DATA.DATA_PATH": "elsewhere"}, 5, False),
        (best, {}, -5, False),  # of weights that lay there before
    ):
        path.write_text(json.dumps(told | {"checkpoint": str(checkpoint), "data": told["data"] | data}))
        os.utime(path, (best.stat().st_mtime + later,) * 2)
        text = card_text(best, tmp_path / "x.pth", weights="ema")
        assert ("- acc1: 12.34\n" in text, f"- acc1: {its['acc1']:.4g}\n" in text) == (ours, not ours)
        said = "best.pth, evaluated by itself" if ours else "the round of training that best.pth is of"
        assert f"Of {said}. The weights are their average (EMA)" in text
        assert ("whose numbers begin with ema_" in text) != ours  # the evaluation here has none
    text = card_text(folder, tmp_path / "x.pth", weights="model")
    assert "the plain ones, not an average, whose numbers begin without ema_" in text
    torch.save(torch.load(best) | {"step": 2}, best)
    assert "Of the run's last round of training." in card_text(best, tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"starts": []}, "run.json' tells no start of a run"),
        ([], "tells no start"),
        ({"starts": [{}]}, "run.json', start 1, does not tell 'command' as a run does; put back"),
        ({"starts": ["x"]}, "start 1, does not tell"),
    ],
)
def test_a_run_json_of_another_form_is_told_before_anything_is_written(config, tmp_path, told, said):
    folder = shutil.copytree(output_folder(config), tmp_path / "run")
    (folder / "run.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=said):
        export_file(checkpoint=str(folder), output=str(tmp_path / "out" / "tiny.pth"), card=True)
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").iterdir()]
    with pytest.raises(UserError, match=said):
        push(folder, "me/tiny")


@pytest.mark.skipif(not has_hf_hub(), reason="timm finds no huggingface_hub that it can use")
@pytest.mark.parametrize("name", ["vmamba_digits", "timm/resnet10t"])
def test_what_the_hub_would_hold_is_the_model_again(config, tmp_path, name):
    other = config
    if name.startswith("timm/"):
        images, settings = tiny_file(tmp_path).parent / "images", TINY | {"MODEL": {"NAME": name, "NUM_CLASSES": 6}}
        (tmp_path / "timm.yaml").write_text(yaml.safe_dump(settings))
        opts = ["DATA.DATA_PATH", images, "OUTPUT", tmp_path, "TRAIN.EPOCHS", 1, "DATA.IMG_SIZE", 32]
        run(other := get_config(tmp_path / "timm.yaml", [*map(str, opts)]))
    model = vmamba.load_model(output_folder(other))
    published, settings, arguments = as_timms(model)
    save_for_hf(published, tmp_path / "hub", model_config=settings, model_args=arguments, safe_serialization=True)
    told = json.loads((tmp_path / "hub" / "config.json").read_text())
    side = other.DATA.IMG_SIZE
    images = torch.randn(2, 3, side, side)
    arguments = {"num_classes": told["num_classes"], **told["model_args"]}
    back = timm.create_model(told["architecture"], **arguments).eval()
    back.load_state_dict(load_file(tmp_path / "hub" / "model.safetensors"))
    torch.testing.assert_close(back(images), model(images))
    assert told["label_names"] == [f"class{number}" for number in range(6)]
    assert tuple(told["pretrained_cfg"]["mean"]) == (0.485, 0.456, 0.406)
    if "local-dir" in timm.create_model.__doc__:  # as from the hub, which earlier versions do from there alone
        back = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
        torch.testing.assert_close(back(images), model(images))
        assert timm.data.resolve_data_config({}, model=back)["input_size"] == (3, side, side)


def test_pushing_goes_through_timm_and_its_refusals_are_sentences(config, monkeypatch):
    asked = []
    monkeypatch.setattr(publishing, "push_to_hf_hub", lambda model, repo, **options: asked.append((repo, options)))
    assert push(output_folder(config), "me/tiny", licence="mit", private=True) == "https://huggingface.co/me/tiny"
    ((repo, options),) = asked
    assert repo == "me/tiny" and options["private"] and options["model_card"]["license"] == "mit"
    assert "## Recipe" in options["model_card"]["description"]

    def refuse(*_, **__):
        raise ConnectionError("no way\nthere")

    monkeypatch.setattr(publishing, "push_to_hf_hub", refuse)
    with pytest.raises(UserError, match="the hub did not take 'me/tiny': no way$"):
        push(output_folder(config), "me/tiny")
    with pytest.raises(UserError, match="'tiny' is no repository of the hub; give it as USER/NAME"):
        push(output_folder(config), "tiny")
