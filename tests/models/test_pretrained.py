"""Files of weights of every origin, mismatches, and downloads from a loopback server that breaks off or lies."""

import argparse
import collections
import datetime
import hashlib
import logging
import os
import pickle
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from yacs.config import CfgNode

import vmamba
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.models import variants
from vmamba.models.backbones import create_backbone
from vmamba.models.download import download
from vmamba.models.formats import Ignored, read_file
from vmamba.models.pretrained import Checkpoint, load_pretrained, open_checkpoint
from vmamba.models.released import to_released
from vmamba.models.variants import build_model
from vmamba.models.vssm import resize_pos_embed

SMALL = dict(dims=8, depths=(1, 2), num_classes=5, img_size=32)


def model(seed=0, **options):
    torch.manual_seed(seed)
    return vmamba.create_model("vmamba_tiny", **SMALL | options).eval()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="vmamba")
    logging.getLogger("vmamba").propagate = True
    return lambda: caplog.text


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def plain():
    return model().state_dict()


@pytest.fixture(scope="module")
def averaged():
    return model(1).state_dict()


@pytest.fixture
def released(tmp_path, plain, averaged):
    """A file as the original writes it, in the spelling of January, with a real yacs config in it."""
    config = CfgNode({"MODEL": {"TYPE": "vssm", "VSSM": {"DEPTHS": [1, 2]}}, "TRAIN": {"OPTIMIZER": {"BETAS": (0, 1)}}})
    config.freeze()
    content = {
        "model": to_released(model(), january=True),
        "model_ema": to_released(model(1), january=True),
        "optimizer": {"state": {0: {"step": torch.zeros(1)}}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"t_initial": 3},
        "scaler": {"scale": 65536.0},
        "epoch": 262,
        "max_accuracy": 82.1,
        "max_accuray_ema": 82.5,
        "config": config,
    }
    torch.save(content, tmp_path / "released.pth")
    return tmp_path / "released.pth"


@pytest.mark.parametrize(
    ("weights", "source", "accuracy"),
    [("auto", "model_ema", 82.5), ("ema", "model_ema", 82.5), ("model", "model", 82.1)],
)
def test_a_released_file(released, plain, averaged, said, weights, source, accuracy):
    checkpoint = vmamba.load_checkpoint(released, weights)
    assert same(checkpoint.state_dict, plain if source == "model" else averaged)
    assert (checkpoint.source, checkpoint.accuracy) == (source, accuracy)
    assert checkpoint.metadata == {"epoch": 262, "max_accuracy": 82.1, "max_accuracy_ema": 82.5}
    assert checkpoint.config["MODEL"] == {"TYPE": "vssm", "VSSM": {"DEPTHS": [1, 2]}}
    nodes = [checkpoint.config, checkpoint.config["MODEL"], checkpoint.config["TRAIN"]["OPTIMIZER"]]
    assert [type(node) for node in nodes] == [dict] * 3
    assert f"taking the weights '{source}' (epoch 262, {accuracy:.2f}% top-1), not '" in said()


def test_a_released_file_without_averaged_weights(released, plain, said):
    content = read_file(released)
    del content["model_ema"], content["max_accuray_ema"]
    torch.save(content, released)
    assert same(vmamba.load_checkpoint(released).state_dict, plain)
    assert "taking the weights 'model' (epoch 262, 82.10% top-1)\n" in said()
    with pytest.raises(UserError, match=r"released\.pth' has no weights 'ema', only 'model'"):
        vmamba.load_checkpoint(released, "ema")
    with pytest.raises(UserError, match="unknown weights 'emma'; did you mean 'ema'?"):
        vmamba.load_checkpoint(released, "emma")


def test_reading_a_config_allows_nothing_afterwards(released):
    before = set(torch.serialization.get_safe_globals())
    vmamba.load_checkpoint(released)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(released, weights_only=True)


def test_code_beside_the_config_is_refused_and_does_not_run(tmp_path, plain):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    config = CfgNode()
    config["TAG"] = Attack()
    torch.save({"model": plain, "config": config}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth' holds pickled objects"):
        vmamba.load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "attacked").exists()


def test_a_detectors_file_gives_its_backbone(tmp_path, plain, said):
    backbone = {name: weight for name, weight in plain.items() if not name.startswith("classifier.")}
    backbone |= {f"outnorm{i}.{name}": torch.ones(8 * 2**i) for i in range(2) for name in ("weight", "bias")}
    heads = {"neck.lateral.weight": torch.ones(1), "rpn_head.a": torch.ones(1), "rpn_head.b": torch.ones(1)}
    state_dict = {f"backbone.{name}": weight for name, weight in backbone.items()} | heads
    torch.save({"meta": {"epoch": 12, "CLASSES": ("a", "b")}, "state_dict": state_dict}, tmp_path / "det.pth")
    checkpoint = vmamba.load_checkpoint(tmp_path / "det.pth")
    assert checkpoint.source == "state_dict" and same(checkpoint.state_dict, backbone)
    assert "taking what is under 'backbone', ignoring neck (1 keys), rpn_head (2 keys)" in said()

    target = model(2)
    with pytest.raises(UserError, match=r"4 missing: classifier.*; 4 unexpected: outnorm0\.bias"):
        load_pretrained(target, checkpoint)
    load_pretrained(target, checkpoint, drop_head=True)
    assert same(target.state_dict(), model(2).state_dict() | {n: w for n, w in plain.items() if n in backbone})
    assert "ignored the norms of the outputs; the model's head of 5 classes starts at random" in said()


def test_what_a_detectors_trainer_logged_is_not_read(tmp_path, plain):
    history = pytest.importorskip("mmengine.logging")
    logged = history.HistoryBuffer([0.5, 1.5], [1, 1])
    content = {
        "state_dict": {f"backbone.{key}": weight for key, weight in plain.items()},
        "message_hub": {"log_scalars": {"loss": logged}, "runtime_info": {"best": np.float64(45.1)}},
        "meta": {"epoch": 12, "seed": np.int64(3)},
    }
    torch.save(content, tmp_path / "detector.pth")
    assert same(vmamba.load_checkpoint(tmp_path / "detector.pth").state_dict, plain)


def test_nothing_is_looked_up_for_a_file(tmp_path, plain):
    """`getattr` in a pickle, which mmengine's history has, gives nothing that could be called."""

    class Looks:
        def __reduce__(self):
            return getattr, (torch.Size, "numel")

        def __call__(self):
            pass

    class Calls:
        def __reduce__(self):
            return Looks(), ()

    torch.save({"model": plain, "meta": Looks()}, tmp_path / "looks.pth")
    assert same(vmamba.load_checkpoint(tmp_path / "looks.pth").state_dict, plain)
    assert isinstance(read_file(tmp_path / "looks.pth")["meta"], Ignored)
    torch.save({"model": plain, "meta": Calls()}, tmp_path / "calls.pth")
    with pytest.raises(UserError, match="calls.pth"):
        vmamba.load_checkpoint(tmp_path / "calls.pth")


def test_a_backbone_takes_a_detectors_file(tmp_path, plain):
    backbone = vmamba.Backbone(model(), out_indices=(0, 1))
    norms = {f"outnorm{i}.{kind}": torch.rand(8 << i) for i in (0, 1) for kind in ("weight", "bias")}
    weights = {name: weight for name, weight in plain.items() if not name.startswith("classifier.")} | norms
    torch.save({"state_dict": {f"backbone.{name}": weight for name, weight in weights.items()}}, tmp_path / "d.pth")
    load_pretrained(backbone, vmamba.load_checkpoint(tmp_path / "d.pth"))
    assert same(to_released(backbone), weights)
    with pytest.raises(UserError, match="for a new head of 5 classes where the file has no classifier"):
        load_pretrained(model(), vmamba.load_checkpoint(tmp_path / "d.pth"))


@pytest.mark.parametrize("name", ["plain.pth", "plain.safetensors", "wrapped.pth"])
def test_state_dicts(tmp_path, plain, name):
    weights = {f"module.{key}": weight for key, weight in plain.items()} if name == "wrapped.pth" else plain
    (save_file if name.endswith(".safetensors") else torch.save)(weights, tmp_path / name)
    checkpoint = vmamba.load_checkpoint(str(tmp_path / name))
    assert same(checkpoint.state_dict, plain)
    assert (checkpoint.source, checkpoint.metadata, checkpoint.config) == ("", {}, {})


@pytest.mark.parametrize("content", [{"epoch": 1}, {}, [1, 2], {"model": {"weight": "none"}}])
def test_a_file_without_weights_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth' holds"):
        vmamba.load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "text"])
@pytest.mark.parametrize("name", ["released.pth", "weights.safetensors"])
def test_damaged_files_are_named(tmp_path, released, plain, damage, name):
    path = tmp_path / name
    if name != released.name:
        save_file(plain, path)
    data = {"empty": b"", "half": path.read_bytes()[: path.stat().st_size // 2], "text": b"version https://git-lfs"}
    path.unlink() if damage == "missing" else path.write_bytes(data[damage])
    with pytest.raises(UserError, match=rf"'.*{name}'") as error:
        vmamba.load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_where_nothing_is_adapted_nothing_is_said_to_be(tmp_path, said):
    torch.save(vmamba.create_model("vmamba_nano", dims=8).state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(UserError, match="of another architecture"):
        load_pretrained(vmamba.create_model("vmamba_nano", dims=16), vmamba.load_checkpoint(tmp_path / "narrow.pth"))
    assert "taking the weights" in said() and "adapted the" not in said()


def test_bytes_that_are_not_those_saved_are_found(tmp_path, plain):
    """torch.load takes no notice of an archive's sums."""
    torch.save(plain, tmp_path / "whole.pth")
    data = bytearray((tmp_path / "whole.pth").read_bytes())
    weight = max(plain.values(), key=torch.Tensor.numel).contiguous().numpy().tobytes()
    data[data.index(weight) + len(weight) // 2] ^= 1
    (tmp_path / "damaged.pth").write_bytes(data)
    with pytest.raises(UserError, match=r"damaged.pth' is truncated or damaged \(Bad CRC-32 .*\); fetch it again"):
        vmamba.load_checkpoint(tmp_path / "damaged.pth")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(plain, tmp_path / "without.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(vmamba.load_checkpoint(tmp_path / "without.pth").state_dict, plain)


def test_best_weights_are_those_that_the_file_names(tmp_path, plain, averaged, said):
    content = {"model": plain, "model_ema": averaged, "best_weights": "model", "max_accuracy": 90.0}
    torch.save(content, tmp_path / "run.pth")
    checkpoint = vmamba.load_checkpoint(tmp_path / "run.pth")
    assert same(checkpoint.state_dict, plain) and checkpoint.metadata["best_weights"] == "model"
    assert "taking the weights 'model' (90.00% top-1), not 'model_ema'" in said()
    assert same(vmamba.load_checkpoint(tmp_path / "run.pth", "ema").state_dict, averaged)
    torch.save(content | {"best_weights": "ema"}, tmp_path / "run.pth")
    assert same(vmamba.load_checkpoint(tmp_path / "run.pth").state_dict, averaged)
    torch.save(content | {"best_weights": "ema", "model_ema": None}, tmp_path / "run.pth")
    assert same(vmamba.load_checkpoint(tmp_path / "run.pth").state_dict, plain)


def test_a_checkpoint_is_shown_in_a_line(released):
    text = repr(vmamba.load_checkpoint(released))
    assert "\n" not in text and len(text) < 400 and "source='model_ema', 50 tensors of 22,237 numbers" in text


WRAPPED = ["module.", "module.module.", "_orig_mod.", "module._orig_mod.", "model.", "net.", "encoder.model."]


@pytest.mark.parametrize("prefix", WRAPPED)
def test_prefixes_of_wrappers_go(tmp_path, plain, said, prefix):
    torch.save({"state_dict": {prefix + name: weight for name, weight in plain.items()}}, tmp_path / "w.pth")
    assert same(vmamba.load_checkpoint(tmp_path / "w.pth").state_dict, plain)
    without = prefix.replace("_orig_mod.", "").replace("module.", "")
    assert (f"taking what is under '{without[:-1]}'\n" in said()) == bool(without)


def test_names_inside_of_wrapped_parts_and_leftovers(tmp_path, plain, said):
    weights = {name.replace("blocks.0.", "blocks.0._orig_mod.") for name in plain}
    assert len(weights - plain.keys()) > 5
    weights = {name.replace("blocks.0.", "blocks.0._orig_mod."): weight for name, weight in plain.items()}
    leftovers = {
        f"module.{part}total_{what}": torch.ones(1) for part in ("", "layers.0.") for what in ("ops", "params")
    }
    weights = {f"module.{name}": weight for name, weight in weights.items()} | leftovers
    torch.save(weights | {"n_averaged": torch.tensor(3)}, tmp_path / "w.pth")
    assert same(vmamba.load_checkpoint(tmp_path / "w.pth").state_dict, plain)
    assert "ignoring 5 buffers of averaging or profiling" in said()


def test_a_compiled_and_an_averaged_model(tmp_path, plain):
    compiled = torch.compile(model(), backend="eager")
    torch.save(compiled.state_dict(), tmp_path / "compiled.pth")
    assert same(vmamba.load_checkpoint(tmp_path / "compiled.pth").state_dict, plain)
    torch.save(torch.optim.swa_utils.AveragedModel(model()).state_dict(), tmp_path / "averaged.pth")
    assert same(vmamba.load_checkpoint(tmp_path / "averaged.pth").state_dict, plain)


def test_a_backbone_of_ours_and_a_container_of_any_name(tmp_path, plain):
    backbone = vmamba.Backbone(model(), out_indices=(0, 1))
    torch.save({"net": backbone.state_dict(), "step": 3}, tmp_path / "w.pth")
    checkpoint = vmamba.load_checkpoint(tmp_path / "w.pth")
    assert checkpoint.source == "net" and same(checkpoint.state_dict, to_released(backbone))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda w: {"student." + n: t for n, t in w.items()} | {"teacher." + n: t for n, t in w.items()},
         "holds several models, under 'student', 'teacher'; save one"),
        (lambda w: {"net_g": w, "net_d": w}, "holds weights under 'net_g', 'net_d'; save those of one"),
        (lambda w: dict(w) | {"epoch": 3}, "holds 'epoch', a int, among tensors"),
        (lambda w: dict(w) | {f"module.{n}": t for n, t in w.items()}, "'patch_embed.0.weight' twice, wrapped and not"),
        (lambda w: {"net": {"model": w, "ema": w}}, "holds no weights"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_said(tmp_path, plain, content, words):
    torch.save(content(plain), tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        vmamba.load_checkpoint(tmp_path / "w.pth")


def test_empty_averaged_weights_are_none(tmp_path, plain):
    torch.save({"model": plain, "model_ema": {}}, tmp_path / "w.pth")
    assert same(vmamba.load_checkpoint(tmp_path / "w.pth").state_dict, plain)


@pytest.mark.parametrize(
    ("content", "source", "over"),
    [
        (lambda w, ema: {"model": w, "model_ema": {"module": ema, "decay": 0.999}}, "model_ema", ""),
        (lambda w, ema: {"model": w, "ema": ema}, "ema", ""),
        (lambda w, ema: {"model": w, "ema": {"state_dict": ema, "updates": 3}}, "ema", ""),
        (lambda w, ema: {"state_dict": ema, "ema_state_dict": w}, "state_dict", "'ema_state_dict'"),  # mmengine swaps
        (lambda w, ema: {"model": ema, "teacher": {"module": w}, "optimizer": {}}, "model", "'teacher'"),
        (lambda w, ema: {"net": {"module": ema}}, "net", ""),
    ],
)
def test_averaged_weights_are_found_or_named(tmp_path, plain, averaged, said, content, source, over):
    torch.save(content(plain, averaged), tmp_path / "w.pth")
    checkpoint = vmamba.load_checkpoint(tmp_path / "w.pth")
    assert checkpoint.source == source and same(checkpoint.state_dict, averaged)
    assert (f"passing over the weights under {over}" if over else "") in said()
    assert ("passing over" in said()) == bool(over)


@pytest.mark.parametrize("odd", [{"module": {"module": {}}}, {"params": {"a": 1}}, [torch.zeros(2)], "ema.pth"])
def test_averaged_weights_that_are_none_are_named(tmp_path, plain, said, odd):
    torch.save({"model": plain, "model_ema": odd}, tmp_path / "w.pth")
    assert vmamba.load_checkpoint(tmp_path / "w.pth").source == "model"
    assert "passing over 'model_ema', which is no state dict" in said()


@pytest.mark.parametrize("name", ["model_ema", "state_dict_ema", "ema"])
def test_averaged_weights_have_their_own_accuracy(tmp_path, plain, averaged, name):
    torch.save({"model": plain, name: averaged, "max_accuracy": 81.0, "max_accuracy_ema": 82.0}, tmp_path / "w.pth")
    assert vmamba.load_checkpoint(tmp_path / "w.pth").accuracy == 82.0


def test_numbers_of_numpy_and_mappings_with_defaults(tmp_path, plain):
    numbers = {"epoch": np.int64(7), "max_accuracy": np.float64(81.5), "max_accuracy_ema": torch.tensor(82.5)}
    more = {"log": collections.defaultdict(list, {"loss": [0.5]}), "nested": collections.defaultdict(dict)}
    for legacy in (False, True):
        content = {
            "model": plain,
            **numbers,
            **more,
            "best": np.float32(0.5),
            "seen": np.bool_(True),
            "t": np.str_("x"),
        }
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        checkpoint = vmamba.load_checkpoint(tmp_path / "w.pth")
        assert checkpoint.metadata == {"epoch": 7, "max_accuracy": 81.5, "max_accuracy_ema": 82.5}
        read = read_file(tmp_path / "w.pth")
        assert (read["best"], read["seen"], read["t"]) == (0.5, True, None)
        assert (read["log"], read["nested"]) == ({"loss": [0.5]}, {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda w: {1: w["classifier.norm.weight"], "a": w["classifier.norm.weight"]}, "the name 1, a int, among"),
        (lambda w: {1: {"a": 2}}, "holds no weights: neither"),
        (lambda w: {"model": {3: w["classifier.norm.weight"]}}, "holds no weights: neither"),
    ],
)
def test_names_that_are_none(tmp_path, plain, content, words):
    torch.save(content(plain), tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        vmamba.load_checkpoint(tmp_path / "w.pth")


def test_what_is_asked_for_in_vain(tmp_path, plain):
    torch.save({"model": plain, "best_weights": [1]}, tmp_path / "w.pth")
    assert "best_weights" not in vmamba.load_checkpoint(tmp_path / "w.pth").metadata
    for wrong in (None, 3, ["w.pth"], b"w.pth"):
        with pytest.raises(UserError, match="is no file; give the path of a file of weights, or its address"):
            vmamba.load_checkpoint(wrong)
    for wrong in (None, ["ema"], {}):
        with pytest.raises(UserError, match=r"unknown weights .*; known: auto, ema, model"):
            vmamba.load_checkpoint(tmp_path / "w.pth", wrong)
    for wrong in (None, ["vmamba_tiny"], {}):
        with pytest.raises(UserError, match=r"unknown model .*; known: vmamba_base"):
            vmamba.create_model(wrong)


def test_a_wrapped_model_takes_weights(tmp_path, plain):
    torch.save({"model": plain}, tmp_path / "w.pth")
    for wrap in (torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")):
        target = model(3)
        load_pretrained(wrap(target), vmamba.load_checkpoint(tmp_path / "w.pth"))
        assert same(target.state_dict(), plain)
        target = model(3)
        target.layers[0].blocks[0] = wrap(target.layers[0].blocks[0])
        load_pretrained(target, vmamba.load_checkpoint(tmp_path / "w.pth"))
        assert same(to_released(target), plain)


def test_arguments_of_other_trainers_are_read_as_mappings(tmp_path, plain):
    args = argparse.Namespace(
        lr=0.1, output=Path("/runs/one"), started=datetime.datetime.now(), more=argparse.Namespace()
    )
    for legacy in (False, True):
        torch.save(
            {"state_dict": plain, "args": args, "time": datetime.timedelta(1), "arch": "x"},
            tmp_path / "timm.pth",
            _use_new_zipfile_serialization=not legacy,
        )
        assert same(vmamba.load_checkpoint(tmp_path / "timm.pth").state_dict, plain)
    read = read_file(tmp_path / "timm.pth")["args"]
    assert (read["lr"], read["output"], read["more"]) == (0.1, "/runs/one", {})


# ------------------------------------------------------------------------------------------- what a file is


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("w.pth", b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS .* 'git lfs pull'"),
        ("w.pth", b"\n<!DOCTYPE html><html>", "is a web page"),
        ("w.safetensors", b"<?xml version='1.0'?><Error>", "is a web page"),
        (
            "w.bin",
            b'{"weight_map": {"a": "w-1.bin", "b": "w-2.bin"}}',
            r"is the index of weights in 2 files \(w-1.bin, ",
        ),
        ("w.json", b'{"lr": 1}', "is JSON text, which holds no weights"),
        ("w.json", b'{"weight_map": {}}', "is JSON text, which holds no weights"),
        ("w.json", b"[" * 100_000, "is JSON text, which holds no weights"),
        ("w.pth", b"\xef\xbb\xbf<!DOCTYPE html>", "is a web page"),
        ("w.pth", b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        ("w.json", b'\xef\xbb\xbf{"weight_map": {"a": "w-1.bin"}}', r"is the index of weights in 1 files \(w-1.bin, "),
        ("w.txt", "\ufeff<html>".encode("utf-16-le"), "is a web page"),
        ("w.tar", b"w.pth".ljust(257, b"\0") + b"ustar".ljust(300, b"\0"), "is a tar archive; unpack it"),
        ("w.pth", b"\0" * 3000, "begins with 1024 zeros"),
        ("w.pth", b"", "is empty"),
        ("w.pth", b"\x1f\x8b\x08\x00", "is compressed by gzip; unpack"),
        ("w.pth", b"a note to myself", "is a text file"),
        ("w.pth", pickle.dumps({"a": 1}, protocol=2), "was written by pickle and not by torch.save"),
        ("w.pth", pickle.dumps({"a": 1}, protocol=5), "was written by pickle and not by torch.save"),
        ("w.pth", bytes(range(128, 200)), "is truncated or not a checkpoint"),
    ],
    ids=lambda value: value[:20].decode(errors="replace") if isinstance(value, bytes) else None,
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_a_file_is_instead(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}' {words}") as error:
        read_file(tmp_path / name)
    assert "weights_only" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", ["tar", "middle", "zeros"])
def test_no_damage_makes_us_advise_to_run_code(tmp_path, plain, change):
    for legacy in (False, True):
        torch.save(plain, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        data = bytearray((tmp_path / "w.pth").read_bytes())
        if change == "tar":  # as before PyTorch 0.1.10, which torch.load would read
            with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                archive.add(tmp_path / "w.pth", "storages")
            data = (tmp_path / "t.tar").read_bytes()
        for at in {"middle": range(200, 300), "zeros": range(600)}.get(change, ()):
            data[at] = 0 if change == "zeros" else 46 + at % 60
        (tmp_path / "w.pth").write_bytes(data)
        with pytest.raises(UserError) as error:
            read_file(tmp_path / "w.pth")
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_what_else_torch_can_save(tmp_path, plain):
    for protocol in (4, 5):
        torch.save(plain, tmp_path / "w.pth", pickle_protocol=protocol)
        with pytest.raises(UserError, match=f"was saved with pickle's protocol {protocol}, .*; save it again"):
            read_file(tmp_path / "w.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"holds pickled objects \(torch\.nn\.modules\.linear\.Linear\) besides"):
        read_file(tmp_path / "module.pth")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), tmp_path / "program.pt")
    with pytest.raises(UserError, match="is a program of TorchScript"):
        read_file(tmp_path / "program.pt")
    np.savez(tmp_path / "w.npz", a=np.ones(2))
    with pytest.raises(UserError, match="is an archive without a checkpoint"):
        read_file(tmp_path / "w.npz")
    with pytest.raises(UserError, match="is a folder; give the path of a file"):
        read_file(tmp_path)


def test_the_name_does_not_tell_what_a_file_is(tmp_path, plain):
    save_file(plain, tmp_path / "w.bin")
    torch.save(plain, tmp_path / "w.safetensors")
    assert same(read_file(tmp_path / "w.bin"), plain) and same(read_file(tmp_path / "w.safetensors"), plain)


# ------------------------------------------------------------------------------------------- into a model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.to_sparse(), r"file torch\.sparse_coo, model float32"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "file quantized, model float32"),
        (lambda w: w.to("meta"), "file on the meta device, model float32"),
        (lambda w: w.mul(10).to(torch.int8), "file int8, model float32"),
        (lambda w: w.to(torch.complex64), "file complex64, model float32"),
        (lambda w: torch.nested.nested_tensor([w, w]), "file nested, model float32"),
        (lambda w: w.double() + 1e300, "file float64 with numbers that float32 cannot hold"),
    ],
    ids=["sparse", "quantized", "meta", "integer", "complex", "nested", "large"],
)
@pytest.mark.filterwarnings("ignore")
def test_numbers_of_another_kind_are_refused(plain, change, words):
    weights = dict(plain) | {name: change(plain[name]) for name in ("patch_embed.0.weight", "classifier.norm.bias")}
    target = model(3, in_chans=1)
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    with pytest.raises(UserError, match=rf"w\.pth' .*of another kind: classifier\.norm\.bias: {words}"):
        load_pretrained(target, Checkpoint(Path("w.pth"), "", weights, {}, {}))
    assert same(target.state_dict(), before)


def test_timm_takes_no_numbers_that_become_infinite(plain):
    for name in ("classifier.head.weight", "layers.0.blocks.0.norm.bias", "patch_embed.0.weight"):
        weights = dict(plain) | {name: plain[name].double() + 1e300}
        overlay = dict(state_dict=weights, num_classes=5)
        with pytest.raises(UserError, match=f"{name}: file float64 with numbers that float32 cannot hold"):
            timm.create_model("vmamba_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)


@pytest.mark.filterwarnings("ignore")
def test_other_widths_are_taken_and_a_model_without_numbers_is_not_filled(plain):
    half = {name: weight.half() for name, weight in plain.items()}
    target = model(3)
    load_pretrained(target, Checkpoint(Path("w.pth"), "", half, {}, {}))
    assert all(torch.equal(weight, half[name].float()) for name, weight in target.state_dict().items())
    with pytest.raises(UserError, match="the model is on the meta device, which holds no numbers"):
        load_pretrained(model(3).to("meta"), Checkpoint(Path("w.pth"), "", plain, {}, {}))


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_another_number_of_channels_is_adapted_as_timm_does(released, averaged, said, channels):
    target = model(3, in_chans=channels)
    load_pretrained(target, vmamba.load_checkpoint(released))
    timms = timm.create_model(
        "vmamba_tiny",
        pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=averaged, num_classes=5),
        **SMALL | dict(in_chans=channels),
    )
    assert same(target.state_dict(), timms.state_dict())
    assert f"adapted the first convolution from 3 channels of the images to {channels}" in said()
    backbone = vmamba.Backbone(model(3, in_chans=channels), (0, 1))
    load_pretrained(backbone, vmamba.load_checkpoint(released))
    assert torch.equal(backbone.model.patch_embed[0].weight, target.patch_embed[0].weight)
    gray = Checkpoint(Path("gray.pth"), "", target.state_dict(), {}, {})
    with pytest.raises(UserError, match=rf"patch_embed\.0\.weight: file \(8, {channels}, 4, 4\), model \(8, 2, 4, 4\)"):
        load_pretrained(model(in_chans=2), gray)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channels_of_a_model_of_timm_are_as_timm_adapts_them(channels, tmp_path):
    """As a classifier and as a backbone; `convnext_atto`'s first convolution is not called as ours."""
    torch.save(timm.create_model("convnext_atto", num_classes=5).state_dict(), tmp_path / "rgb.pth")
    peer = timm.create_model(
        "convnext_atto",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "rgb.pth"), num_classes=5),
        num_classes=5,
        in_chans=channels,
    )
    config = get_config(None, ["MODEL.NAME", "timm/convnext_atto", "MODEL.NUM_CLASSES", 5, "MODEL.IN_CHANS", channels])
    ours = build_model(config)
    load_pretrained(ours, open_checkpoint(tmp_path / "rgb.pth"))
    assert same(ours.state_dict(), peer.state_dict())
    backbone = create_backbone("timm/convnext_atto", in_chans=channels, num_classes=5)
    backbone.start_from(open_checkpoint(tmp_path / "rgb.pth"))
    assert torch.equal(backbone.model.model.state_dict()["stem.0.weight"], peer.state_dict()["stem.0.weight"])


def test_a_mismatch_is_listed_in_groups_and_loads_nothing(released):
    target = model(2, d_state=1, mlp_ratio=4.0)
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    with pytest.raises(UserError, match=r"released\.pth' is of another architecture") as error:
        load_pretrained(target, vmamba.load_checkpoint(released))
    for part in (
        "18 missing: layers.*.blocks.*.mlp.fc1.bias (3 keys), ",
        "layers.1.blocks.*.op.A_logs (2 keys): file (128, 16), model (128, 1)",
        "layers.0.blocks.0.op.A_logs: file (64, 16), model (64, 1)",
    ):
        assert part in str(error.value)
    assert same(target.state_dict(), before)


def test_a_head_is_dropped_only_when_asked_for(released, averaged, said):
    checkpoint = vmamba.load_checkpoint(released)
    target = model(2, num_classes=7)
    with pytest.raises(UserError, match=r"head\.weight: file \(5, 16\), model \(7, 16\); for a new.*7.*5.*--drop-head"):
        load_pretrained(target, checkpoint)
    load_pretrained(target, checkpoint, drop_head=True)
    assert "dropped the head of 5 classes; the model's head of 7 classes starts at random" in said()
    fresh = {name: weight for name, weight in model(2, num_classes=7).state_dict().items() if ".head." in name}
    assert same(target.state_dict(), averaged | fresh)
    with pytest.raises(UserError, match="of another architecture"):  # the head, and nothing else
        load_pretrained(model(2, num_classes=7, dims=16), checkpoint, drop_head=True)


def test_a_position_map_is_resized(tmp_path, said):
    small = model(pos_embed=True)
    torch.save({"model": small.state_dict()}, tmp_path / "small.pth")
    large = model(1, pos_embed=True, img_size=(48, 64))
    load_pretrained(large, vmamba.load_checkpoint(tmp_path / "small.pth"))
    assert torch.equal(large.pos_embed, resize_pos_embed(small.pos_embed, (12, 16)))
    assert "resized the position map from (8, 8) to (12, 16)" in said()


# ------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch hub."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


class Server(ThreadingHTTPServer):
    """Serves `content` at /w.pth, at most `most` bytes an answer; notes the first byte of each."""

    content, most, validator, starts = b"", 2**40, '"one"', ()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/w.pth"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server: Server = self.server
        if self.path != "/w.pth":
            return self.send_error(404)
        asked = self.headers.get("Range", "bytes=0-")
        changed = self.headers.get("If-Range", server.validator) != server.validator
        start = 0 if changed else int(asked.removeprefix("bytes=").removesuffix("-"))
        server.starts += (start,)
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("ETag", server.validator)
        self.send_header("Content-Length", str(len(server.content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        self.wfile.write(server.content[start : start + server.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(released):
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content = released.read_bytes()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture
def variant(monkeypatch, server):
    """ "vmamba_tiny", its weights at the server's."""
    entry = replace(variants.VARIANTS["vmamba_tiny"], weights=server.url, sha256=digest(server.content))
    monkeypatch.setitem(variants.VARIANTS, "vmamba_tiny", entry)


def digest(content):
    return hashlib.sha256(content).hexdigest()


def test_a_name_with_its_weights(hub, server, variant, averaged, said):
    for _ in range(2):  # the second time from the cache
        target = vmamba.create_model("vmamba_tiny", pretrained=True, **SMALL)
        assert not same(target.state_dict(), averaged)  # another number of classes than 1000: a new head
        kept = {name for name in averaged if ".head." not in name}
        assert all(torch.equal(target.state_dict()[name], averaged[name]) for name in kept)
    assert server.starts == (0,)
    for part in (
        f"downloading {server.url}",
        "has the SHA-256 expected",
        "downloaded earlier",
        "dropped the head of 5",
    ):
        assert part in said()


def test_names_with_weights():
    names = vmamba.list_models(pretrained=True)
    assert vmamba.list_models("*tiny*") == ["vmamba_tiny", "vmamba_tiny_m2", "vmamba_tiny_s1l8", "vmamba_tiny_s2l5"]
    assert vmamba.list_models() == timm.list_models("vmamba_*")
    assert vmamba.list_models("*base*", exclude_filters=["*s2*", "*m2"]) == ["vmamba_base", "vmamba_base_s1l20"]
    without = timm.list_models("vmamba_*", exclude_filters="*_s*")
    assert vmamba.list_models(exclude_filters="*_s*") == without
    assert vmamba.list_models("*tiny*", pretrained=True) == vmamba.list_models("*tiny*", exclude_filters="*_m2")
    assert vmamba.list_models(["*_s1l8", "*digits"]) == ["vmamba_digits", "vmamba_tiny_s1l8"]
    assert vmamba.list_models("nothing") == []
    for wrong in (True, 3, [True]):
        with pytest.raises(UserError, match="; give a pattern such as"):
            vmamba.list_models(wrong)
        with pytest.raises(UserError, match="exclude_filters is .*; give a pattern such as"):
            vmamba.list_models(exclude_filters=wrong)
    assert names == [name for name in vmamba.list_models() if not name.endswith(("_m2", "_digits", "_nano"))]
    for name in names:
        assert variants.VARIANTS[name].weights.startswith("https://github.com/MzeroMiko/VMamba/releases/download/%23v")
    with pytest.raises(UserError, match="'vmamba_digits' has no released weights; these have: vmamba_base, "):
        vmamba.create_model("vmamba_digits", pretrained=True)


def test_an_address_is_read_like_a_file(hub, server, averaged):
    assert same(vmamba.load_checkpoint(server.url).state_dict, averaged)
    assert (hub / "w.pth").read_bytes() == server.content


def test_a_broken_download_goes_on_where_it_broke_off(hub, server):
    server.most = len(server.content) // 3
    assert download(server.url, digest(server.content)).read_bytes() == server.content
    third = server.most
    assert server.starts[:3] == (0, third, 2 * third)


def test_a_part_of_an_earlier_call_is_completed_or_replaced_when_the_file_changed(hub, server):
    server.most, whole = 1000, server.content
    server.content = whole[:1000]
    download(server.url)
    (hub / "w.pth").rename(hub / "w.pth.part")
    server.content, server.most, server.starts = whole, 2**40, ()
    assert download(server.url).read_bytes() == whole
    assert server.starts == (1000,)
    (hub / "w.pth").rename(hub / "w.pth.part")
    os.truncate(hub / "w.pth.part", 1000)
    server.content, server.validator, server.starts = whole[::-1], '"two"', ()
    assert download(server.url).read_bytes() == whole[::-1]
    assert server.starts == (0,)


def test_a_download_that_was_complete_but_for_its_name(hub, server):
    download(server.url)
    (hub / "w.pth").rename(hub / "w.pth.part")
    assert download(server.url).read_bytes() == server.content


def test_a_download_that_brings_nothing_more_ends_with_a_sentence(hub, server, monkeypatch):
    monkeypatch.setattr(Server, "most", 0)
    with pytest.raises(UserError, match=rf"broke off after 0 of {len(server.content)} bytes; try again.*hub/checkp"):
        download(server.url)
    assert not (hub / "w.pth").exists()


def test_a_wrong_hash_is_never_loaded(hub, server, variant, monkeypatch):
    server.content = server.content[::-1]
    for _ in range(2):
        with pytest.raises(UserError, match=r"w\.pth.*' has SHA-256 \w+ and not \w+, .*delete it"):
            vmamba.create_model("vmamba_tiny", pretrained=True, **SMALL)
    assert not (hub / "w.pth").exists()


def test_a_missing_file_and_no_network_say_what_to_put_where(hub, server):
    place = rf"put it at '{hub}/"
    with pytest.raises(UserError, match=rf"/gone\.pth answers 404 .*{place}gone\.pth'"):
        download(server.url.replace("w.pth", "gone.pth"))
    closed = Server(("127.0.0.1", 0), Handler)
    closed.server_close()
    with pytest.raises(UserError, match=rf"cannot be downloaded \(.*refused.*{place}w\.pth'"):
        download(closed.url)
    assert [path.name for path in Path(hub).iterdir()] == []


def test_a_cache_that_is_no_folder_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write '.*w\.pth': Not a directory; set TORCH_HOME to another folder"):
        download("http://127.0.0.1:9/w.pth")


def test_two_addresses_do_not_share_a_file(hub, server):
    download(server.url)
    with pytest.raises(UserError, match="was downloaded from"):
        download(server.url.replace("127.0.0.1", "localhost"))
    (hub / "hand.pth").write_bytes(b"put there by hand")
    assert download("http://127.0.0.1:9/hand.pth").read_bytes() == b"put there by hand"
