"""One run after another: what training leaves, what evaluation counts, what is refused."""

import re

import pytest
import torch
import yaml
from torch.nn import functional as F

import vmamba
from vmamba.classification.data import build_eval_loader
from vmamba.config import get_config, output_folder
from vmamba.errors import UserError
from vmamba.runtime.distributed import World
from vmamba.runtime.step import parallelise
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
    assert names == {
        *("config.yaml", "log.txt", "metrics.jsonl", "events.out.tfevents", "last.pth", "best.pth", "curves.png")
    }
    assert get_config(folder / "config.yaml") == config
    assert saved(config)["config"] == yaml.safe_load(config.dump())
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = metrics(config)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    assert {key: lines[-1][key] for key in results} == results


def test_the_log_says_what_runs_and_how_it_goes(trained):
    config, results = trained
    start, *steps = [line for line in log(config).splitlines() if "parameters" in line or "train [" in line]
    for part in ("vmamba_digits", "16 x 16 pixels", "1 process on CPU", "float32", "scan backend reference"):
        assert part in start
    assert len(steps) == 6
    names = "eta lr wd time data loss grad_norm loss_scale mem"
    assert [re.search(rf" {name} (\S+)", steps[-1]) is not None for name in names.split()] == [True] * 9
    assert f"EMA loss {results['ema_val_loss']:.4f}, top-1 {results['ema_acc1']:.2f}%" in log(config)


def test_evaluation_counts_every_image_once(trained):
    config, results = trained
    images, targets = zip(*build_eval_loader(config, rank=0, world_size=1), strict=True)
    images, targets = torch.cat(images), torch.cat(targets)
    assert len(images) == HELD_OUT
    for prefix, key in (("", "model"), ("ema_", "model_ema")):
        with torch.no_grad():
            logits = load(config, key)(images)
        order = logits.argsort(dim=1, descending=True)
        assert results[f"{prefix}val_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
        assert results[f"{prefix}acc1"] == pytest.approx(100 * (order[:, 0] == targets).float().mean().item())
        hits = (order[:, :5] == targets[:, None]).any(dim=1)
        assert results[f"{prefix}acc5"] == pytest.approx(100 * hits.float().mean().item())


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


@pytest.mark.parametrize(
    ("weights", "loss"), [("auto", "ema_val_loss"), ("ema", "ema_val_loss"), ("model", "val_loss")]
)
def test_training_starts_from_pretrained_weights(trained, tmp_path, weights, loss):
    config, results = trained
    checkpoint = output_folder(config) / "last.pth"
    options = ("MODEL.PRETRAINED", checkpoint, "MODEL.WEIGHTS", weights, "TRAIN.EPOCHS", 0)
    started = run(tiny_config(tmp_path, *options))
    assert started["val_loss"] == started["ema_val_loss"] == results[loss]


def test_a_finished_run_is_evaluated_not_trained_again(trained):
    config, results = trained
    assert run(config) == results
    assert len(metrics(config)) == 2


def test_throughput_is_measured_without_data_or_folder(tmp_path, capsys):
    options = ("THROUGHPUT_MODE", True, "DATA.DATASET", "imagenet", "DATA.DATA_PATH", "nowhere", "DATA.BATCH_SIZE", 2)
    measured = run(tiny_config(tmp_path, *options))
    assert measured["images_per_second"] > 0
    assert measured["peak_memory_mb"] > 0
    assert re.search(r"throughput [\d.]+ images/s.*peak memory \d+ MB", capsys.readouterr().out)
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
