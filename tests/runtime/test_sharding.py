"""Shares of a state: which blocks they are of, what is refused, and that a folder of others runs nothing."""

import os
import pickle
import shutil
import warnings

import pytest
import timm
import torch

import vmamba
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.runtime import shares, step
from vmamba.runtime.checkpoint import newest_checkpoint, read_checkpoint
from vmamba.runtime.distributed import World
from vmamba.runtime.sharding import blocks
from vmamba.runtime.shares import one_file, read_folder, save_folder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled.*intent is to save")


@pytest.mark.parametrize(("make", "name", "number"), [
    (lambda: vmamba.create_model("vmamba_digits"), "Block", 4),
    (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformerBlock", 12),
    (lambda: timm.create_model("convnext_tiny"), "ConvNeXtBlock", 18),
    (lambda: timm.create_model("resnet50"), "Bottleneck", 16),
])  # fmt: skip
def test_a_models_blocks_are_found(make, name, number):
    with torch.device("meta"):
        found = blocks(make())
    assert [type(block).__name__ for block in found] == [name] * number


@pytest.fixture
def saved(tiny, tmp_path):
    """A folder as one process writes it, and the state in it."""
    case = tiny("TRAIN.EMA.ENABLE", "True")
    case.train(3)
    case.state.gather_random_states()
    save_folder(case.state.state_dict(), tmp_path / "last.sharded", 2)
    return case, tmp_path / "last.sharded"


def test_a_folder_becomes_the_file_that_would_have_been(saved, same, tmp_path):
    case, folder = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's, of what is meant
        one_file(str(folder), str(tmp_path / "all.pth"))
        with pytest.raises(UserError, match="all.pth' is there already; remove it, or choose another file"):
            one_file(str(folder), str(tmp_path / "all.pth"))
    assert same(read_checkpoint(tmp_path / "all.pth"), read_folder(folder))
    torch.save(case.state.state_dict(), tmp_path / "then.pth")
    assert same(read_checkpoint(tmp_path / "all.pth"), read_checkpoint(tmp_path / "then.pth"))
    for other in (tmp_path, tmp_path / "all.pth", tmp_path / "none"):
        with pytest.raises(UserError, match="is no state in shares; name a folder such as last.sharded of a run"):
            one_file(str(other), str(tmp_path / "none.pth"))
    sentence = "last.sharded' is a state in shares; make it a file first: python analyze/one_file.py"
    for read in (read_checkpoint, vmamba.load_model):
        with pytest.raises(UserError, match=sentence):
            read(folder)
    with pytest.raises(UserError, match=sentence):
        vmamba.load_model(tmp_path)


def test_the_one_before_is_kept_and_what_broke_off_is_no_state(saved, tmp_path):
    case, folder = saved
    case.train(1)
    save_folder(case.state.state_dict(), folder, 2)
    steps = [torch.load(path / "plain.pth")["step"] for path in (folder, tmp_path / "last.2.sharded")]
    assert steps == [4, 3] and newest_checkpoint(tmp_path)[0] == folder
    (folder / "plain.pth").unlink()  # which is written last
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "last.2.sharded"
    save_folder(case.state.state_dict(), tmp_path / "best.sharded", 1)
    save_folder(case.state.state_dict(), tmp_path / "best.sharded", 1)
    assert sorted(os.listdir(tmp_path)) == ["best.sharded", "last.2.sharded", "last.sharded"]


@pytest.mark.parametrize("sums", [True, False])  # a folder of before 2026-11-27 has none
@pytest.mark.parametrize("damage", ["no metadata", "truncated", "foreign"])
def test_a_damaged_folder_is_a_sentence(saved, damage, sums):
    _, folder = saved
    (part,) = folder.glob("*.distcp")
    if not sums:
        plain = torch.load(folder / "plain.pth")
        del plain["sums"]
        torch.save(plain, folder / "plain.pth")
    if damage == "no metadata":
        (folder / ".metadata").unlink()
    elif damage == "truncated":
        os.truncate(part, 100)
    else:
        (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"last\.sharded") as told:
        read_folder(folder)
    assert "\n" not in str(told.value) and "Traceback" not in str(told.value)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_run_goes_on_from_the_folder_before_where_a_bit_has_flipped(saved, name, tmp_path):
    case, folder = saved
    case.train(1)
    save_folder(case.state.state_dict(), folder, 2)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    found, passed_over = newest_checkpoint(tmp_path)
    assert found == tmp_path / "last.2.sharded" and name in passed_over[folder]
    with pytest.raises(UserError, match=f"{name}' is damaged: its sum is another than when it was written"):
        read_folder(folder)


@pytest.mark.parametrize(
    "name", ["os.system", "posix.system", "builtins.eval", "torch.distributed.checkpoint.metadata"]
)
def test_pickled_code_in_a_folder_is_refused_and_does_not_run(saved, name, tmp_path):
    _, folder = saved
    module, _, function = name.rpartition(".")
    if function == "metadata":  # a name with dots reaches what the module imports
        module, function = name, "os.mkdir"
    made = str(tmp_path / "attacked")
    said = f"mkdir {made}" if "system" in name else made if "mkdir" in function else f"__import__('os').mkdir({made!r})"
    code = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, function)) + b"\x93"
    code += b"X" + len(said).to_bytes(4, "little") + said.encode() + b"\x85R."
    pickle.loads(code)
    assert (tmp_path / "attacked").exists()  # it is an attack
    (tmp_path / "attacked").rmdir()
    (folder / ".metadata").write_bytes(code)
    plain = torch.load(folder / "plain.pth")
    plain["sums"][".metadata"] = shares.checksum(folder / ".metadata")  # who changes one file can change another
    torch.save(plain, folder / "plain.pth")
    with pytest.raises(UserError, match=r"and loading that could run code"):
        read_folder(folder)
    assert not (tmp_path / "attacked").exists()


def test_a_disk_that_fails_is_a_sentence_and_the_state_before_stays(saved, monkeypatch, tmp_path):
    case, folder = saved

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", full)
    with pytest.raises(UserError, match="cannot write '.*last.sharded': No space left on device"):
        save_folder(case.state.state_dict(), folder, 2)
    monkeypatch.undo()
    monkeypatch.setattr(shares.torch, "save", full)
    with pytest.raises(UserError, match="cannot write '.*last.sharded': No space left on device"):
        save_folder(case.state.state_dict(), folder, 2)
    assert os.listdir(tmp_path) == ["last.sharded"]
    assert read_folder(folder)["step"] == 3
    shutil.rmtree(folder)


def test_compiled_are_the_blocks_and_cuda_graphs_are_refused(monkeypatch):
    monkeypatch.setattr(step, "is_sharded", lambda model: True)
    monkeypatch.setattr(step, "compile_options", lambda model, mode: {"backend": "eager"})
    config = get_config(None, ["TRAIN.PARALLEL", "fsdp", "TRAIN.COMPILE", "reduce-overhead"])
    model, gpus = vmamba.create_model("vmamba_digits"), World(0, 2, 0, torch.device("cuda"))
    with pytest.raises(UserError, match="TRAIN.COMPILE is reduce-overhead and TRAIN.PARALLEL fsdp; CUDA graphs need"):
        step.parallelise(model, config, gpus)
    config.defrost()
    config.TRAIN.COMPILE = "default"
    assert step.parallelise(model, config, gpus) is model
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    assert len(compiled) == len(blocks(model)) and "" not in compiled
