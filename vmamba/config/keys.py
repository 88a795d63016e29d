"""What a key of the config is, and the keys that every task has.

A key's truth stands on its line, here or in the `keys.py` of its task: default, meaning, what it takes, its flag.  The
schema, the command line with its help, and docs/config.md are made from these lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vmamba.models.compilation import COMPILE_MODES
from vmamba.values import Takes, kinds_of

TASKS = ("classification", "detection", "segmentation")  # each a room vmamba/<name>/ with keys.py and task.py
LARGEST_SEED = 2**32 - 1  # what NumPy's generators take


@dataclass(frozen=True)
class Key:
    name: str
    default: Any
    meaning: str
    takes: Takes
    flag: str | None  # of the command line, without its dashes
    also: str  # words that people look for it under

    def check(self, value: Any) -> Any:
        """`value` as the key takes it; one number, or name, serves as a list of one.  Raises UserError."""
        if self.takes.kinds == ([float],) and isinstance(value, (int, float)):
            value = [value]
        if self.takes.kinds == ([str],) and isinstance(value, str):
            value = [value]
        return self.takes.check(self.name, value)


def key(name: str, default: Any, meaning: str, *, kinds: tuple = (), flag: str = "", also: str = "", **bounds) -> Key:
    """A key that takes what its default is, or `kinds`; `bounds` are those of `Takes`."""
    return Key(name, default, meaning, Takes(kinds or kinds_of(default), **bounds), flag or None, also)


def switch(name: str, meaning: str, *, default: bool = False, flag: str = "") -> Key:
    return key(name, default, meaning, flag=flag)


def share(name: str, default: Any, meaning: str, *, kinds: tuple = (), flag: str = "", **bounds) -> Key:
    """A number from 0 to 1."""
    return key(name, default, meaning, kinds=kinds, flag=flag, at_least=0, at_most=1, **bounds)


COMMON = (
    key("TASK", "classification", "what is trained", choices=TASKS),
    key("BASE", [], "files this one builds on, relative to it; empty once they are merged", kinds=(str, [str])),
    key("IMPORT", [], "modules of your own to import first: docs/extending.md", kinds=([str],), flag="import"),
    key("NAME", "", "name of the run; empty: the config file's stem"),
    key("OUTPUT", "output", "the run's folder is OUTPUT/NAME/TAG", flag="output", also="output_dir work_dir"),
    key("TAG", "default", "tells runs of one config apart", flag="tag"),
    key("SEED", 0, "everything drawn is a function of it", at_least=0, at_most=LARGEST_SEED, flag="seed"),
    key("DEVICE", "auto", "auto: the GPU where there is one", choices=("auto", "cpu", "cuda"), flag="device"),
    key(
        "TIMEOUT",
        1800,
        "seconds that a process waits for the others, which may be saving",
        at_least=1,
        also="ddp_timeout",
    ),
    key("GRACE", 120, "seconds before its end at which SLURM shall warn a job, to save in", at_least=10),
    switch("TF32", "let float32 matrix products and convolutions run in TF32"),
    key("SAVE_FREQ", 1, "rounds (epochs, or EVAL_STEPS) between checkpoints; the last is saved", at_least=1),
    key("KEEP_LAST", 2, "of the states saved: last.pth, the one before as last.2.pth, ...", at_least=1),
    key("KEEP_BEST", 1, "of the states evaluated: best.pth, the second best as best.2.pth, ...", at_least=1),
    key("PRINT_FREQ", 10, "steps between log lines", at_least=1, also="log_interval"),
    key("EVAL_FREQ", 1, "rounds between evaluations; the last is evaluated", at_least=1),
    key("EVAL_STEPS", 0, "optimiser steps a round; 0: a round is an epoch", at_least=0),
    key(
        "EVAL_WEIGHTS",
        "both",
        "what training evaluates where there is an EMA; --eval: MODEL.WEIGHTS",
        choices=("both", "model", "ema"),
    ),
    key(
        "PROFILE", 0, "steps, behind the first ten, that PyTorch's profiler records; 0: none", at_least=0, at_most=1000
    ),
    key("WANDB", "", "project of Weights & Biases that the numbers go to as well; empty: none", also="wandb"),
    switch("EVAL_MODE", "evaluate only", flag="eval"),
    switch("THROUGHPUT_MODE", "measure throughput only", flag="throughput"),
    switch(
        "DRY_RUN", "try all of it: two steps, an evaluation of two batches, a save; nothing is kept", flag="dry-run"
    ),
    #
    key("DATA.DATASET", "", "what a task reads, each its own", also="dataset_type"),
    key("DATA.DATA_PATH", "", "folder of the data set", flag="data-path", also="data_root data_dir"),
    key(
        "DATA.BATCH_SIZE",
        128,
        "images a process and micro-batch; where their sizes differ they are evaluated one by one",
        at_least=1,
        flag="batch-size",
    ),
    key("DATA.MEAN", [0.485, 0.456, 0.406], "a channel, of values in 0..1; one number serves every channel"),
    key("DATA.STD", [0.229, 0.224, 0.225], "likewise", above=0),
    switch("DATA.SKIP_BAD_IMAGES", "count unreadable images instead of stopping: replaced in training, else left out"),
    key(
        "DATA.NUM_WORKERS",
        8,
        "loading processes beside each training process; 0 loads in it",
        at_least=0,
        flag="workers",
    ),
    key("DATA.PREFETCH_FACTOR", 2, "batches that each loading process is ahead by", at_least=1),
    key("DATA.RETRY_SECONDS", 60, "that reading is tried again for where a disk or a network fails", at_least=0),
    key("DATA.TIMEOUT", 900, "seconds without a loaded batch that end the run; 0: none", at_least=0),
    switch("DATA.PERSISTENT_WORKERS", "keep loading processes from one pass to the next", default=True),
    switch("DATA.PIN_MEMORY", "page-locked batches, for a GPU", default=True),
    #
    key("MODEL.NAME", "vmamba_tiny", "see vmamba.list_models()", also="arch architecture model.type"),
    key(
        "MODEL.NUM_CLASSES",
        1000,
        "of the data set; 0: no head",
        at_least=0,
        at_most=10**6,
        also="nb_classes",
        flag="num-classes",
    ),
    key("MODEL.IN_CHANS", 3, "3, 1 for grayscale, or others", at_least=1, at_most=10**4, also="in_channels"),
    share("MODEL.DROP_PATH_RATE", None, "stochastic depth; null: the variant's own", kinds=(None, float)),
    switch("MODEL.SYNC_BN", "batch norms over the processes of several GPUs"),
    key("MODEL.BACKEND", "auto", "of the scan; see vmamba_kernels.backends()"),
    key("MODEL.PRETRAINED", "", "weights to start from: a file or an address", flag="pretrained"),
    key("MODEL.WEIGHTS", "auto", "auto: the better, EMA where unknown", choices=("auto", "ema", "model")),
    switch("MODEL.DROP_HEAD", "start with a new head instead of that of the weights", flag="drop-head"),
    key("MODEL.RESUME", "", "checkpoint of a run, or its folder, to go on with", flag="resume"),
    #
    key(
        "TRAIN.EPOCHS", 300, "passes over the training images", at_least=0, also="max_epochs num_epochs", flag="epochs"
    ),
    key("TRAIN.STEPS", 0, "optimiser steps of the run, in the place of EPOCHS; 0: EPOCHS count", at_least=0),
    key("TRAIN.START_EPOCH", 0, "epochs that count as done at the start", at_least=0),
    key("TRAIN.WARMUP_EPOCHS", 20, "of linear warm-up", at_least=0),
    key("TRAIN.WARMUP_STEPS", 0, "optimiser steps of warm-up, in the place of WARMUP_EPOCHS", at_least=0),
    key(
        "TRAIN.BASE_LR",
        5e-4,
        "for LR_REFERENCE_BATCH images, as the next two",
        above=0,
        also="learning_rate lr",
        flag="lr",
    ),
    key("TRAIN.WARMUP_LR", 5e-7, "the warm-up starts here", at_least=0),
    key("TRAIN.MIN_LR", 5e-6, "the schedule ends here", at_least=0),
    key("TRAIN.LR_REFERENCE_BATCH", 512, "rates scale with the global batch over this; 0: they do not", at_least=0),
    key("TRAIN.WEIGHT_DECAY", 0.05, "not of norms and biases", at_least=0, also="wd"),
    switch("TRAIN.DECAY_SSM", "decay A_log (and SSD's D) as the released runs; false: as Mamba asks", default=True),
    key("TRAIN.CLIP_GRAD", 5.0, "the gradient's largest norm; 0: no clipping", at_least=0, also="grad_clip max_norm"),
    key("TRAIN.ACCUMULATION_STEPS", 1, "micro-batches an optimiser step", at_least=1, flag="accumulation-steps"),
    key("TRAIN.SAVE_STEPS", 0, "optimiser steps between checkpoints inside an epoch; 0: none", at_least=0),
    key("TRAIN.MAX_BAD_STEPS", 10, "steps in a row without finite loss and gradient that end the run", at_least=1),
    key(
        "TRAIN.PATIENCE",
        0,
        "evaluations in a row without a better result that end the training; 0: none do",
        at_least=0,
        also="early_stopping",
    ),
    switch("TRAIN.AUTO_RESUME", "go on from the newest checkpoint in the run's folder", default=True),
    key(
        "TRAIN.FREEZE",
        [],
        "parts that stay as they are, such as backbone, or layers.0; all_but_head: a linear probe",
        kinds=([str],),
        also="frozen_stages linear_probe",
    ),
    key(
        "TRAIN.LAYER_DECAY",
        1.0,
        "a layer's rate is that of the next one times this; 1: all have BASE_LR",
        above=0,
        at_most=1,
        also="layer_decay llrd",
    ),
    key(
        "TRAIN.PARALLEL",
        "ddp",
        "of several processes: ddp, each has the whole state; fsdp, a share of it (docs/parallel.md)",
        choices=("ddp", "fsdp"),
        also="fsdp2 zero deepspeed sharding",
    ),
    switch("TRAIN.USE_CHECKPOINT", "gradient checkpointing: less memory, more time", flag="use-checkpoint"),
    key("TRAIN.COMPILE", "", "modes of torch.compile, or CUDA graphs", choices=("", *COMPILE_MODES), flag="compile"),
    #
    key("TRAIN.OPTIMIZER.NAME", "adamw", "adamw, sgd, or any optimiser timm names", flag="optim"),
    key("TRAIN.OPTIMIZER.EPS", 1e-8, "where the optimiser has one", at_least=0),
    key("TRAIN.OPTIMIZER.BETAS", None, "null: the optimiser's own", kinds=(None, [float]), at_least=0, below=1),
    key("TRAIN.OPTIMIZER.MOMENTUM", 0.9, "of sgd and its kin", at_least=0, below=1),
    key("TRAIN.LR_SCHEDULER.NAME", "cosine", "after the warm-up", choices=("cosine", "linear", "step", "multistep")),
    key("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 30, "of step", at_least=1),
    key("TRAIN.LR_SCHEDULER.DECAY_RATE", 0.1, "of step and multistep", at_least=0),
    key("TRAIN.LR_SCHEDULER.MULTISTEPS", [], "epochs, of multistep", kinds=([int],), at_least=0),
    switch("TRAIN.EMA.ENABLE", "average the weights over the steps", flag="model-ema"),
    share("TRAIN.EMA.DECAY", 0.9999, "of that average", flag="model-ema-decay"),
    switch("TRAIN.EMA.WARMUP", "a smaller decay at first, so that short runs average their end", default=True),
    key(
        "TRAIN.EMA.KIND",
        "exponential",
        "mean: of the ends of the last LAST_EPOCHS epochs, arXiv 1803.05407",
        choices=("exponential", "mean"),
        also="swa stochastic_weight_averaging",
    ),
    key("TRAIN.EMA.LAST_EPOCHS", 5, "that the mean is of", at_least=1),
    switch("TRAIN.EMA.SWITCH", "after each epoch the average takes the place of the weights, arXiv 2402.09240"),
    #
    switch("AMP.ENABLE", "compute in half precision where that is safe", default=True),
    key("AMP.DTYPE", "bfloat16", "float16 has a loss scaler", choices=("bfloat16", "float16")),
)


def keys_of(task: str) -> dict[str, Key]:
    """Every key of a task's configs by name: the common ones, and its own, which may have other defaults for them."""
    own: Sequence[Key] = import_module(f"vmamba.{task}.keys").KEYS
    return {each.name: each for each in (*COMMON, *own)}
