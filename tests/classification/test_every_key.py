"""Every key of the config has an effect that can be seen: something of a run differs where the key does."""

import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from vmamba.config import output_folder
from vmamba.config.keys import keys_of
from vmamba.errors import UserError
from vmamba.models import vssm
from vmamba.runtime.records import Records
from vmamba.runtime.run import Run
from vmamba.runtime.trainer import run
from vmamba_kernels import BackendError

from .tiny import ROOT, log, metrics, saved, tiny_config

STEPS = ("TRAIN.LR_SCHEDULER.NAME", "step", "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.EPOCHS", 2)
KINDS = ("model", "model_ema")
OF_TIMM = ("DATA.DATASET", "torch/image_folder", "DATA.VAL_SPLIT", "val")

# key -> another value than TINY's, and what else has to be set for it to count
CHANGED = {
    "TASK": ("painting",),
    "NAME": ("other",),
    "OUTPUT": ("other",),
    "TAG": ("other",),
    "SEED": (4,),
    "DEVICE": ("cuda",),
    "TF32": (True,),
    "SAVE_FREQ": (2, "TRAIN.EPOCHS", 3),
    "PRINT_FREQ": (2,),
    "KEEP_LAST": (1, "TRAIN.EPOCHS", 2),
    "EVAL_FREQ": (2, "TRAIN.EPOCHS", 2),
    "EVAL_STEPS": (2,),
    "EVAL_WEIGHTS": ("ema",),
    "EVAL_MODE": (True,),
    "THROUGHPUT_MODE": (True,),
    "DRY_RUN": (True,),
    "DATA.DATA_PATH": ("nowhere",),
    "DATA.BATCH_SIZE": (6,),
    "DATA.MEAN": (0.1,),
    "DATA.STD": (0.1,),
    "DATA.NUM_WORKERS": (1,),
    "DATA.PREFETCH_FACTOR": (3, "DATA.NUM_WORKERS", 1),
    "DATA.PERSISTENT_WORKERS": (False, "DATA.NUM_WORKERS", 1),
    "DATA.DATASET": ("cifar10",),
    "DATA.IMG_SIZE": (20,),
    "DATA.DECODE": ("torchvision",),
    "DATA.INTERPOLATION": ("bilinear",),
    "DATA.ZIP_MODE": (True,),
    "DATA.SAMPLER": ("balanced",),
    "DATA.TRAIN_SPLIT": ("val", *OF_TIMM),
    "DATA.VAL_SPLIT": ("train", *OF_TIMM),
    "MODEL.NAME": ("vmamba_tiny",),
    "MODEL.NUM_CLASSES": (7,),
    "MODEL.IN_CHANS": (1, "DATA.MEAN", 0.5, "DATA.STD", 0.2),
    "MODEL.DROP_PATH_RATE": (0.5,),
    "MODEL.LABEL_SMOOTHING": (0.3,),
    "TRAIN.LOSS": ("bce",),
    "TRAIN.CLASS_WEIGHTS": ([1, 2, 3, 4, 5, 6],),
    "TRAIN.MESA": (1.0,),
    "TRAIN.MESA_START": (0.5, "TRAIN.MESA", 1.0),
    "DISTILL.TEACHER": ("nowhere.pth",),
    "AUG.SIZES": ([8, 12],),
    "AUG.SIZE_SCHEDULE": ("constant", "AUG.SIZES", [8, 12, 16]),
    "AUG.SIZE_SPREAD": (3.0, "AUG.SIZES", [8, 12, 16]),
    "AUG.SIZE_MIX": (1.0, "AUG.SIZES", [8, 12, 16]),
    "TRAIN.LAYER_DECAY": (0.5,),
    "MODEL.BACKEND": ("triton",),
    "MODEL.PRETRAINED": ("nowhere.pth",),
    "MODEL.DROP_HEAD": (True,),
    "MODEL.RESUME": ("nowhere.pth",),
    "TRAIN.EPOCHS": (2,),
    "TRAIN.STEPS": (2,),
    "TRAIN.START_EPOCH": (1, "TRAIN.EPOCHS", 2),
    "TRAIN.WARMUP_EPOCHS": (0,),
    "TRAIN.WARMUP_STEPS": (2,),
    "TRAIN.BASE_LR": (0.2,),
    "TRAIN.WARMUP_LR": (0.01,),
    "TRAIN.MIN_LR": (0.05, "TRAIN.WARMUP_EPOCHS", 0),
    "TRAIN.LR_REFERENCE_BATCH": (0,),
    "TRAIN.WEIGHT_DECAY": (0.5,),
    "TRAIN.DECAY_SSM": (False,),
    "TRAIN.CLIP_GRAD": (0.01,),
    "TRAIN.ACCUMULATION_STEPS": (3,),
    "TRAIN.SAVE_STEPS": (1,),
    "TRAIN.MAX_BAD_STEPS": (2, "TRAIN.WARMUP_LR", 1e38, "TRAIN.BASE_LR", 1e38),
    "TRAIN.FREEZE": (["layers.0"],),
    "TRAIN.USE_CHECKPOINT": (True,),
    "TRAIN.COMPILE": ("default",),
    "TRAIN.OPTIMIZER.NAME": ("sgd",),
    "TRAIN.OPTIMIZER.EPS": (0.1,),
    "TRAIN.OPTIMIZER.BETAS": ([0.5, 0.5],),
    "TRAIN.OPTIMIZER.MOMENTUM": (0.1, "TRAIN.OPTIMIZER.NAME", "sgd"),
    "TRAIN.LR_SCHEDULER.NAME": ("linear", "TRAIN.WARMUP_EPOCHS", 0),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": (1, *STEPS),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": (0.5, *STEPS, "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 1),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": ([1], *STEPS, "TRAIN.LR_SCHEDULER.NAME", "multistep"),
    "TRAIN.EMA.ENABLE": (False,),
    "TRAIN.EMA.DECAY": (0.1,),
    "TRAIN.EMA.WARMUP": (False,),
    "TRAIN.EMA.KIND": ("mean",),
    "TRAIN.EMA.LAST_EPOCHS": (1, "TRAIN.EMA.KIND", "mean", "TRAIN.EPOCHS", 2),
    "TRAIN.EMA.SWITCH": (True,),
    "AMP.ENABLE": (True,),
    "AMP.DTYPE": ("float16", "AMP.ENABLE", True),
    "AUG.SCALE": ([0.5, 1.0], "DATA.IMG_SIZE", 40),
    "AUG.RATIO": ([1.0, 1.0], "DATA.IMG_SIZE", 40),
    "AUG.REPEATS": (3,),
    "AUG.HFLIP": (1.0,),
    "AUG.VFLIP": (1.0,),
    "AUG.COLOR_JITTER": (0.8,),
    "AUG.AUTO_AUGMENT": ("rand-m9",),
    "AUG.REPROB": (1.0,),
    "AUG.REMODE": ("const", "AUG.REPROB", 1.0),
    "AUG.RECOUNT": (3, "AUG.REPROB", 1.0),
    "AUG.MIXUP": (5.0,),
    "AUG.CUTMIX": (5.0,),
    "AUG.CUTMIX_MINMAX": ([0.4, 0.5],),
    "AUG.MIXUP_PROB": (0.0,),
    "AUG.MIXUP_SWITCH_PROB": (1.0,),
    "AUG.MIXUP_MODE": ("elem",),
    "TEST.CROP": (False,),
    "TEST.CROP_PCT": (1.0, "DATA.IMG_SIZE", 40),
}
ELSEWHERE = {  # keys whose effect another test shows
    "KEEP_BEST": "test_the_best_of_several_evaluations_are_kept_in_their_order",
    "GRACE": "test_the_batch_file_says_what_was_asked",
    "TIMEOUT": "test_others_that_cannot_be_reached_are_a_sentence",
    "IMPORT": "test_the_example_of_the_page",
    "BASE": "test_base_files_merge_in_order_and_the_file_itself_wins",
    "DATA.CACHE_MODE": "test_the_cache_mode_decides_what_becomes_of_an_archive",
    "DATA.RETRY_SECONDS": "test_a_disk_that_fails_for_good_ends_the_run_and_skips_nothing",
    "DATA.TIMEOUT": "test_a_loading_process_that_hangs_is_a_sentence_with_its_file",
    "DATA.PIN_MEMORY": "test_batches_are_pinned_for_a_gpu",
    "DATA.TRAIN_LABELS": "test_a_file_of_labels_is_what_the_folders_are",
    "DATA.VAL_LABELS": "test_a_file_of_labels_is_what_the_folders_are",
    "PROFILE": "test_a_profile_of_some_steps",
    "WANDB": "test_numbers_go_to_weights_and_biases_too",
    "DATA.CLASS_MAP": "test_folders_of_other_data_sets_by_a_map",
    "DATA.VAL_FRACTION": "test_a_share_of_each_class_is_held_out",
    "DATA.SKIP_BAD_IMAGES": "test_unreadable_images_are_replaced_in_training_and_counted",
    "MODEL.WEIGHTS": "test_training_starts_from_pretrained_weights",
    "DISTILL.KIND": "test_distillation_by_hand",
    "DISTILL.WEIGHT": "test_distillation_by_hand",
    "DISTILL.TEMPERATURE": "test_distillation_by_hand",
    "MODEL.SYNC_BN": "test_batch_norms_are_over_all_processes_of_gpus",
    "TRAIN.PARALLEL": "test_in_shares_two_processes_give_the_curve_of_one",
    "TRAIN.PATIENCE": "test_early_stopping_is_exact_on_resume",
    "TRAIN.AUTO_RESUME": "test_starting_over_in_a_used_folder_is_refused",
}


def test_no_key_is_left_out():
    keys = keys_of("classification").keys()
    assert CHANGED.keys() | ELSEWHERE.keys() == keys and not CHANGED.keys() & ELSEWHERE.keys()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in ELSEWHERE.values() if f"def {name}(" not in tests] == []


@pytest.fixture
def seen(monkeypatch):
    """What a run does that leaves no number behind."""
    seen = []

    def watch(owner, name, told=(), call=True):
        whole = getattr(owner, name)

        def watching(*args, **options):
            seen.append((name, *[options.get(key) for key in told]))
            return whole(*args, **options) if call else None

        monkeypatch.setattr(owner, name, watching)

    watch(DataLoader, "__init__", ("num_workers", "prefetch_factor", "persistent_workers"))
    watch(nn.Module, "compile", call=False)
    watch(vssm, "checkpoint")
    watch(Records, "draw", call=False)  # which takes half a second
    save = Run.save

    def noted(self, state, *names):
        seen.append((names, state.step))
        save(self, state, *names)

    monkeypatch.setattr(Run, "save", noted)
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


def traces(folder, output, seen, *opts):
    """What can be seen of a run with `opts` in the folder `output`."""
    seen.clear()
    try:
        config = tiny_config(folder, "TRAIN.EPOCHS", 1, "OUTPUT", folder / output, *opts)
        results = run(config)
    except (UserError, BackendError) as error:
        return str(error).replace(output, "")
    place = os.path.relpath(output_folder(config), folder / output)
    files = sorted(path.name for path in output_folder(config).glob("*.pth"))
    flags = (torch.get_float32_matmul_precision(), place, files, [*seen])
    if config.THROUGHPUT_MODE or config.EVAL_MODE or config.DRY_RUN:
        return results.keys(), flags
    weights = {key: [weight.sum().item() for weight in (saved(config)[key] or {}).values()] for key in KINDS}
    return results, flags, metrics(config), log(config).count("train ["), weights


@pytest.fixture(scope="module")
def before(folder):
    """The traces without the change, made once for all that share a start."""
    known = {}

    def look(seen, both):
        if str(both) not in known:
            known[str(both)] = traces(folder, f"before{len(known)}", seen, *both)
        return known[str(both)]

    return look


@pytest.mark.parametrize("key", CHANGED)
def test_a_key_has_an_effect(key, folder, before, seen):
    value, *both = CHANGED[key]
    value = folder / value if key == "OUTPUT" else value
    unchanged = before(seen, both)
    assert traces(folder, key, seen, *both, key, value) != unchanged


def test_without_a_change_nothing_differs(folder, before, seen):
    assert traces(folder, "again", seen) == before(seen, [])
