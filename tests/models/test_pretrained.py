"""Files of weights of every origin: what is read of them, and what they are instead."""

import argparse
import collections
import datetime
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from yacs.config import CfgNode

import vmamba
from vmamba.errors import UserError
from vmamba.models.formats import Ignored, read_file
from vmamba.models.pretrained import load_pretrained
from vmamba.models.released import to_released

from .small import model, same


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
