"""One run after another: what training leaves, what evaluation counts, what is refused."""

import gc
import math
import multiprocessing
import re
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from tensorboardX.proto.event_pb2 import Event
from torch.nn import functional as F

import vmamba
from vmamba.classification.data import build_eval_loader
from vmamba.classification.task import Accuracy
from vmamba.config import get_config, output_folder
from vmamba.data.loaders import Examples
from vmamba.errors import UserError
from vmamba.runtime import records, report
from vmamba.runtime.distributed import World
from vmamba.runtime.state import TrainState
from vmamba.runtime.step import OptimizerStep, parallelise
from vmamba.runtime.trainer import run
from vmamba_kernels import BackendError

from .tiny import CLASSES, HELD_OUT, log, metrics, saved, tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, results) of two epochs."""
    config = tiny_config(tmp_path_factory.mktemp("trained"))
    return config, run(config)


def load(config, key):
    model = vmamba.create_model("vmamba_digits", num_classes=CLASSES, depths=(1, 1), dims=8).eval()
    model.load_state_dict(saved(config)[key])
    return model


def test_a_run_leaves_one_folder(trained):
    config, results = trained
    folder = output_folder(config)
    names = {re.sub(r"tfevents.*", "tfevents", path.name) for path in folder.iterdir()}
    names -= {"changes.1.diff"}  # of a repository that is worked on
    assert names == {
        *("config.yaml", "log.txt", "metrics.jsonl", "events.out.tfevents", "last.pth", "best.pth", "curves.png"),
        *("run.json", "last.2.pth"),
    }
    assert get_config(folder / "config.yaml") == config
    assert saved(config)["config"] == yaml.safe_load(config.dump())
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = metrics(config)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    assert {key: lines[-1][key] for key in results} == results


def test_the_log_says_what_runs_and_how_it_goes(trained):
    config, results = trained
    steps = [line for line in log(config).splitlines() if "train [" in line]
    for part in (
        *(
            "vmamba_digits with depths [1, 1], dims 8: ",
            " parameters, ",
            "16 x 16 pixels",
            "1 process on CPU, 1 thread;",
        ),
        *(
            "float32",
            "scan backend cpu",
            "seed 3",
            f"folder {output_folder(config)}",
            f"on {socket.gethostname()}",
        ),
        *(
            f"torch {torch.__version__}".split("+")[0],
            "timm ",
            "commit ",
            "30 images to train on, 12 held out, 6 classes",
        ),
        *("3 steps an epoch of 10 images, 6 steps in all, 3 of warm-up", "adamw at rate 0.00195 (0.1 x 10 / 512)"),
    ):
        assert part in log(config)
    assert len(steps) == 6
    names = "eta lr wd time data loss grad_norm loss_scale mem"
    assert [re.search(rf" {name} (\S+)", steps[-1]) is not None for name in names.split()] == [True] * 9
    said = re.search(
        r"takes ([\d.]+) ms of a core to load.* train ([\d,]+) images/s: that needs ([\d.]+) c", log(config)
    )
    core, rate, cores = (float(number.replace(",", "")) for number in said.groups())
    assert cores == pytest.approx(core / 1000 * rate, abs=0.06)
    assert f"; held-out loss {results['val_loss']:.4f}, top-1 {results['acc1']:.2f}%" in log(config)
    assert f"EMA held-out loss {results['ema_val_loss']:.4f}, top-1 {results['ema_acc1']:.2f}%" in log(config)


def test_evaluation_counts_every_image_once(trained):
    config, results = trained
    loader = build_eval_loader(config, rank=0, world_size=1)
    images, targets = map(torch.cat, zip(*map(loader.finish, loader), strict=True))
    assert len(images) == HELD_OUT
    for prefix, key in (("", "model"), ("ema_", "model_ema")):
        with torch.no_grad():
            logits = load(config, key)(images)
        order = logits.argsort(dim=1, descending=True)
        assert results[f"{prefix}val_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
        assert results[f"{prefix}acc1"] == pytest.approx(100 * (order[:, 0] == targets).float().mean().item())
        hits = (order[:, :5] == targets[:, None]).any(dim=1)
        assert results[f"{prefix}acc5"] == pytest.approx(100 * hits.float().mean().item())


def test_events_hold_every_logged_step_and_evaluation(trained):
    config, results = trained
    (path,) = output_folder(config).glob("events.out.tfevents*")
    content, at, events = path.read_bytes(), 0, {}
    while at < len(content):  # length, its checksum, an event, its checksum
        (length,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16
        for value in event.summary.value:
            events.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert [step for step, _ in events["train/loss"]] == [1, 2, 3, 4, 5, 6]
    names = {"train/grad_norm", "train/lr", "speed/images_per_second", "speed/memory_mb", "eval/ema_acc1"}
    assert names <= events.keys()
    assert events["eval/val_loss"][-1] == (6, pytest.approx(results["val_loss"]))


def test_the_first_step_in_which_kernels_compile_tells_nothing_of_the_cores(tmp_path, monkeypatch):
    def slow(self, state, *args, **options):
        if state.step == 0:
            clock[0] += 1000
        return whole_step(self, state, *args, **options)

    def told(seconds_an_image, images, seconds, waited):
        return f"{images} images in {seconds < 1000}, waited {waited < 1000}"

    clock, whole_step, counter = [0.0], OptimizerStep.__call__, time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: counter() + clock[0])
    monkeypatch.setattr(OptimizerStep, "__call__", slow)
    monkeypatch.setattr(report, "describe_loading", told)
    config = tiny_config(tmp_path)
    run(config)
    assert "50.0 images in True, waited True" in log(config)


def test_best_is_the_epoch_with_the_highest_accuracy(trained):
    config, _ = trained
    scores = [max(line["acc1"], line["ema_acc1"]) for line in metrics(config)]
    assert saved(config, "best.pth")["epoch"] == scores.index(max(scores)) + 1
    assert max(saved(config)["best"].values()) == max(scores)


def test_training_learns(tmp_path):
    digits = get_config("configs/vmamba_digits.yaml")
    options = ("DATA.DATASET", "digits", "DATA.MEAN", digits.DATA.MEAN, "DATA.STD", digits.DATA.STD)
    options += ("MODEL.IN_CHANS", 1, "MODEL.NUM_CLASSES", 10, "MODEL.DROP_PATH_RATE", 0, "DATA.BATCH_SIZE", 50)
    options += ("AUG.MIXUP", 0, "AUG.CUTMIX", 0, "AUG.REPROB", 0, "AUG.HFLIP", 0)
    results = run(tiny_config(tmp_path, *options))
    assert results["acc1"] > 35  # of ten classes
    assert results["ema_acc1"] > 35


def test_evaluating_a_file_gives_the_numbers_of_the_training(trained, tmp_path):
    config, results = trained
    checkpoint = output_folder(config) / "last.pth"
    before = (output_folder(config) / "config.yaml").read_text()
    assert run(tiny_config(config.OUTPUT, "EVAL_MODE", True)) == results  # the newest in the folder
    assert (output_folder(config) / "config.yaml").read_text() == before
    assert run(tiny_config(tmp_path, "EVAL_MODE", True, "MODEL.RESUME", checkpoint)) == results
    torch.save(saved(config)["model"], tmp_path / "weights.pth")
    plain = run(tiny_config(tmp_path, "EVAL_MODE", True, "MODEL.PRETRAINED", tmp_path / "weights.pth"))
    assert plain == {key: value for key, value in results.items() if not key.startswith("ema")}


def test_a_run_from_weights_is_evaluated_by_what_it_came_to(trained, tmp_path):
    began, other = output_folder(trained[0]) / "last.pth", tmp_path / "other.pth"
    options = ("MODEL.PRETRAINED", began, "TRAIN.EPOCHS", 1)
    results = run(config := tiny_config(tmp_path, *options))
    last = output_folder(config) / "last.pth"
    assert run(tiny_config(tmp_path, *options, "EVAL_MODE", True)) == results != trained[1]
    assert f"evaluating {last}, what this run came to from {began}\n" in log(config)
    torch.save(saved(trained[0]), other)
    for asked in (("MODEL.PRETRAINED", other), (*options, "MODEL.RESUME", other)):  # by another file than it began with
        assert run(tiny_config(tmp_path, *asked, "EVAL_MODE", True)) == trained[1]
    assert f"evaluating {other}\n" in log(config)


def test_an_evaluation_is_compiled_where_training_would_be(trained, monkeypatch):
    config, results = trained
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **options: compiled.append(options))
    assert run(tiny_config(config.OUTPUT, "EVAL_MODE", True, "TRAIN.COMPILE", "default")) == results
    assert len(compiled) == 1


@pytest.mark.parametrize("weights", ["auto", "ema", "model"])
def test_training_starts_from_pretrained_weights(trained, tmp_path, weights):
    config, results = trained
    kind = saved(config)["best_weights"] if weights == "auto" else weights
    loss = "ema_val_loss" if kind == "ema" else "val_loss"
    checkpoint = output_folder(config) / "last.pth"
    options = ("MODEL.PRETRAINED", checkpoint, "MODEL.WEIGHTS", weights, "TRAIN.EPOCHS", 0)
    started = run(tiny_config(tmp_path, *options))
    assert started["val_loss"] == started["ema_val_loss"] == results[loss]


def test_a_finished_run_is_evaluated_and_its_folder_claims_nothing_new(trained):
    config, results = trained
    before = (output_folder(config) / "config.yaml").read_text()
    assert run(tiny_config(config.OUTPUT, "TRAIN.BASE_LR", 7)) == results
    assert len(metrics(config)) == 2
    assert "nothing is left to train, 6 of 6 steps are done" in log(config)
    assert (output_folder(config) / "config.yaml").read_text() == before


def test_by_steps_a_run_pauses_anywhere_in_an_epoch(tmp_path, trained):
    by_steps = ("TRAIN.STEPS", 6, "TRAIN.EPOCHS", 0, "TRAIN.WARMUP_STEPS", 3, "TRAIN.WARMUP_EPOCHS", 0)
    config = tiny_config(tmp_path, *by_steps, "EVAL_STEPS", 4)
    run(config)
    assert [(line["step"], line["epoch"]) for line in metrics(config)] == [(4, pytest.approx(4 / 3)), (6, 2)]
    for name, weight in saved(trained[0])["model"].items():  # the same steps as by epochs
        assert torch.equal(saved(config)["model"][name], weight)


def test_evaluations_every_two_epochs_of_the_average_alone(tmp_path):
    config = tiny_config(tmp_path, "TRAIN.EPOCHS", 3, "EVAL_FREQ", 2, "EVAL_WEIGHTS", "ema")
    results = run(config)
    assert results.keys() == {"ema_val_loss", "ema_acc1", "ema_acc5"}
    assert [("ema_acc1" in line, "acc1" in line) for line in metrics(config)] == [
        (False, False), (True, False), (True, False)
    ]  # fmt: skip


def test_a_number_that_is_not_finite_is_no_best(tmp_path, monkeypatch):
    given = iter([{"val_loss": math.nan, "acc1": 99.0, "acc5": 99.0}, {"val_loss": 1.0, "acc1": 20.0, "acc5": 60.0}])
    monkeypatch.setattr(Accuracy, "results", lambda self: next(given))
    config = tiny_config(tmp_path, "TRAIN.EMA.ENABLE", False)
    run(config)
    assert "this evaluation does not count: val_loss nan" in log(config)
    assert saved(config, "best.pth")["step"] == 6
    assert saved(config)["best"] == {"acc1": 20.0}


def test_what_is_read_of_the_best_is_what_was_best(tmp_path, monkeypatch):
    given = iter([{"val_loss": 1.0, "acc1": accuracy, "acc5": 99.0} for accuracy in (50.0, 40.0, 30.0, 45.0)])
    monkeypatch.setattr(Accuracy, "results", lambda self: next(given))  # plain, EMA, plain, EMA
    config = tiny_config(tmp_path)
    run(config)
    best = output_folder(config) / "best.pth"
    assert saved(config, "best.pth")["step"] == 3
    assert vmamba.load_checkpoint(best).source == "model"
    assert vmamba.load_checkpoint(output_folder(config) / "last.pth").source == "model_ema"


def test_a_record_that_cannot_be_made_does_not_end_the_run(tmp_path, monkeypatch, trained):
    def failing(*args):
        raise RuntimeError("no fonts here")

    monkeypatch.setattr("vmamba.runtime.records.draw_curves", failing)
    monkeypatch.setattr("vmamba.runtime.records.SummaryWriter", failing)
    write = records.write_metrics
    monkeypatch.setattr("vmamba.runtime.records.write_metrics", failing)
    finish = TrainState.finish_round

    def the_disk_has_room_again(self):
        monkeypatch.setattr("vmamba.runtime.records.write_metrics", write if self.recorded else failing)
        finish(self)

    monkeypatch.setattr(TrainState, "finish_round", the_disk_has_room_again)
    config = tiny_config(tmp_path)
    run(config)
    assert "cannot record curves.png" in log(config) and "no fonts here; the run goes on" in log(config)
    assert metrics(config) == metrics(trained[0])  # the line of the first epoch was written with the second's


def test_what_ends_a_run_stands_in_its_log(tmp_path, monkeypatch):
    with pytest.raises(UserError):
        run(tiny_config(tmp_path, "DATA.DATA_PATH", "nowhere"))
    assert "the run ends: data path 'nowhere' does not exist" in log(tiny_config(tmp_path))
    monkeypatch.setattr(Accuracy, "results", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tiny_config(tmp_path))
    assert "ZeroDivisionError: division by zero" in log(tiny_config(tmp_path))


def test_a_warm_up_that_never_ends_is_said(tmp_path):
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 5))
    assert "the warm-up takes 15 steps and the run has 3: the rate never reaches" in log(tiny_config(tmp_path))
    steps = ("TRAIN.STEPS", 2, "TRAIN.WARMUP_STEPS", 4, "TAG", "steps")
    run(tiny_config(tmp_path, *steps))
    assert "lower TRAIN.WARMUP_STEPS, which is 4" in log(tiny_config(tmp_path, *steps))


def test_a_head_is_dropped_from_some_weights_only(tmp_path):
    with pytest.raises(UserError, match="--drop-head keeps the head of no weights, and none are given"):
        run(tiny_config(tmp_path, "MODEL.DROP_HEAD", True))


def test_loading_processes_end_with_their_run(tmp_path):
    gc.collect()
    before = {*multiprocessing.active_children()}
    gc.disable()
    try:
        run(tiny_config(tmp_path, "DATA.NUM_WORKERS", 1, "TRAIN.EPOCHS", 1))
        assert {*multiprocessing.active_children()} <= before
    finally:
        gc.enable()


def test_in_a_thread_and_never_two_at_a_time(tmp_path, trained, monkeypatch):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, tiny_config(tmp_path)).result() == trained[1]
        whole, refused = Accuracy.results, []

        def meanwhile(self):
            with pytest.raises(UserError, match="another run goes on in this process") as error:
                run(tiny_config(tmp_path, "TAG", "second"))
            refused.append(error)
            return whole(self)

        monkeypatch.setattr(Accuracy, "results", meanwhile)
        assert pool.submit(run, tiny_config(tmp_path, "TAG", "first")).result() == trained[1]
        assert refused and not output_folder(tiny_config(tmp_path, "TAG", "second")).exists()


def test_the_device_is_waited_for_once_a_step_and_once_an_evaluation(tmp_path, monkeypatch):
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        whole = getattr(torch.Tensor, name)

        def counting(self, *args, whole=whole):
            waits.append(sys._getframe(1).f_code.co_filename)
            return whole(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counting)
    run(tiny_config(tmp_path, "TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", 6, "AUG.MIXUP", 0, "AUG.CUTMIX", 0))
    ours = [Path(name).name for name in waits if "vmamba/runtime" in name or "vmamba/classification" in name]
    assert ours.count("step.py") == 5  # of five steps
    assert ours.count("task.py") == 2 and ours.count("stop.py") == 1  # of the two evaluations, plain and EMA, in one


def test_an_evaluation_of_both_weights_loads_each_image_once(tmp_path, monkeypatch):
    loaded, load = [], Examples.__getitems__

    def counting(self, keys):
        loaded.extend(keys if not self.training else ())
        return load(self, keys)

    monkeypatch.setattr(Examples, "__getitems__", counting)
    results = run(tiny_config(tmp_path, "TRAIN.EPOCHS", 1))
    assert len(loaded) == HELD_OUT and results["val_loss"] != results["ema_val_loss"]


def test_throughput_is_measured_without_data_or_folder(tmp_path, capsys):
    options = ("THROUGHPUT_MODE", True, "DATA.DATASET", "imagenet", "DATA.DATA_PATH", "nowhere", "DATA.BATCH_SIZE", 2)
    measured = run(tiny_config(tmp_path, *options))
    assert measured["images_per_second"] > 0
    assert measured["peak_memory_mb"] > 0
    assert re.search(r"throughput [\d.]+ images/s.*peak memory \d+MB", capsys.readouterr().out)
    assert not output_folder(tiny_config(tmp_path)).exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains(tmp_path, dtype):
    results = run(tiny_config(tmp_path, "AMP.ENABLE", True, "AMP.DTYPE", dtype, "TRAIN.EPOCHS", 1))
    assert results["val_loss"] < 2.5
    assert f"{dtype} autocast" in log(tiny_config(tmp_path))


def test_accumulation_gives_the_curve_of_the_large_batch(tmp_path):
    free_of_chance = ("MODEL.DROP_PATH_RATE", 0, "AUG.MIXUP", 0, "AUG.CUTMIX", 0)
    curves = []
    for batch, accumulation in ((10, 1), (5, 2)):
        options = ("TAG", accumulation, "DATA.BATCH_SIZE", batch, "TRAIN.ACCUMULATION_STEPS", accumulation)
        config = tiny_config(tmp_path, *free_of_chance, *options)
        run(config)
        curves.append([line["train_loss"] for line in metrics(config)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (("EVAL_MODE", True), UserError, "nothing to evaluate.*--resume"),
        (("MODEL.RESUME", "nowhere.pth"), UserError, r"no checkpoint 'nowhere\.pth'"),
        (("MODEL.PRETRAINED", "nowhere.pth"), UserError, r"no checkpoint 'nowhere\.pth'"),
        (("MODEL.BACKEND", "cuda"), BackendError, "'cuda' cannot serve"),
        (("MODEL.NUM_CLASSES", 7), UserError, "MODEL.NUM_CLASSES"),
        (("TRAIN.START_EPOCH", 2), UserError, r"TRAIN\.START_EPOCH is 2, 6 steps, and the run has 6"),
        (("TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.MOMENTUM", 0), UserError, "sgd does not take.*Nesterov"),
        (("TRAIN.MAX_BAD_STEPS", 2, "TRAIN.BASE_LR", 1e30, "TRAIN.WARMUP_LR", 1e30), UserError, "2 steps in a row"),
    ],
)
def test_what_cannot_run_is_one_sentence(tmp_path, options, error, sentence):
    with pytest.raises(error, match=sentence):
        run(tiny_config(tmp_path, *options))


def test_another_architecture_in_the_folder_is_neither_skipped_nor_overwritten(trained):
    config, _ = trained
    before = (output_folder(config) / "last.pth").read_bytes()
    with pytest.raises(UserError, match=r"last\.pth' is of another architecture: .*file .*, model "):
        run(tiny_config(config.OUTPUT, "MODEL.OPTIONS.dims", 16, "TRAIN.EPOCHS", 3))
    assert (output_folder(config) / "last.pth").read_bytes() == before


@pytest.mark.parametrize(
    "text", ["mine: 1", "TRAIN: {BASE_LR: 0.1}  # by hand", "MODEL: {TYPE: vssm, VSSM: {}}", "- 1"]
)
def test_a_config_of_somebody_else_is_not_overwritten(tmp_path, text):
    config = tiny_config(tmp_path)
    output_folder(config).mkdir(parents=True)
    (output_folder(config) / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml'"):
        run(config)
    assert (output_folder(config) / "config.yaml").read_text() == text


def test_starting_over_in_a_used_folder_is_refused(trained):
    config, _ = trained
    with pytest.raises(UserError, match=r"TRAIN\.AUTO_RESUME is off.*--tag"):
        run(tiny_config(config.OUTPUT, "TRAIN.AUTO_RESUME", False))
    assert len(metrics(config)) == 2


def test_an_output_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        run(tiny_config(tmp_path, "OUTPUT", tmp_path / "file"))


@pytest.mark.parametrize(("opts", "words"), [
    ((), "TRAIN.COMPILE is cudagraphs, which needs a GPU, and this runs on cpu; leave it empty"),
    (("DEVICE", "cuda", "TRAIN.ACCUMULATION_STEPS", 2), "CUDA graphs cannot accumulate gradients"),
    (("DEVICE", "cuda", "TRAIN.USE_CHECKPOINT", True), "regardless of SEED, so use TRAIN.COMPILE reduce-overhead"),
])  # fmt: skip
def test_cuda_graphs_are_refused_where_they_cannot_be(tmp_path, opts, words):
    config = tiny_config(tmp_path, "TRAIN.COMPILE", "cudagraphs", *opts)
    world = World(0, 1, 0, torch.device(config.DEVICE))
    with pytest.raises(UserError, match=words):
        parallelise(torch.nn.Linear(1, 1), config, world)


@pytest.mark.gpu
def test_cuda_graphs_change_no_number(tmp_path):
    """Two epochs with stochastic depth and EMA, evaluated in batches of two sizes, beside the same without graphs."""
    lines = []
    for mode in ("", "cudagraphs"):
        config = tiny_config(tmp_path, "DEVICE", "cuda", "TAG", f"graphs{mode}", "TRAIN.COMPILE", mode)
        run(config)
        lines.append(metrics(config))
    for plain, graphs in zip(*lines, strict=True):
        assert graphs == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(("opts", "sentence"), [
    (("TRAIN.LOSS", "BCE"), "unknown TRAIN.LOSS 'BCE'"),
    (("TRAIN.LOSS", "bce", "MODEL.LABEL_SMOOTHING", 1), "SMOOTHING is 1, which TRAIN.LOSS bce does not take"),
    (("TRAIN.MESA", 1, "TRAIN.EMA.ENABLE", False), "its teacher is the average of the weights"),
    (("TRAIN.CLASS_WEIGHTS", [1.0]), "TRAIN.CLASS_WEIGHTS has 1 number"),
    (("TRAIN.OPTIMIZER.NAME", "adamm"), "unknown optimiser 'adamm'; did you mean"),
    (("MODEL.NAME", "vmamba_tinny"), "unknown model 'vmamba_tinny'; did you mean 'vmamba_tiny'"),
    (("MODEL.NAME", "timm/resnet81"), "unknown model 'resnet81'; did you mean"),
    (("DATA.DATASET", "imagnet"), "unknown DATA.DATASET 'imagnet'; did you mean 'imagenet'"),
    (("DATA.DATASET", "digits", "DATA.VAL_FRACTION", 0.5), "comes with held-out images of its own"),
    (("AUG.AUTO_AUGMENT", "rnd-m9"), "AUG.AUTO_AUGMENT 'rnd-m9'"),
    (("DATA.BATCH_SIZE", 5), "mixup and cutmix pair the images of a batch"),
])  # fmt: skip
def test_a_value_that_does_not_fit_ends_a_run_before_anything_is_done(tmp_path, opts, sentence):
    with pytest.raises(UserError, match=sentence):
        run(tiny_config(tmp_path, *opts, "OUTPUT", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_so_does_a_backbone_that_there_is_not(tmp_path, task):
    with pytest.raises(UserError, match="unknown model 'resnet81'; did you mean"):
        run(get_config(None, ["TASK", task, "MODEL.NAME", "resnet81", "OUTPUT", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()
