"""The configuration: defaults, YAML files with inheritance, command line.  The only place that reads YAML.

`get_config` starts from the defaults below, merges the files a config is based on, the config itself, and
`KEY VALUE` pairs.  Every key and every type is checked against the defaults; what does not fit is a UserError.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yacs.config import CfgNode

from vmamba.errors import UserError, unknown
from vmamba.models.compilation import COMPILE_MODES
from vmamba.models.released_yaml import from_released_config
from vmamba.values import convert, describe, from_text

_C = CfgNode()
_C.BASE = []  # files this one builds on: a path or a list, relative to this file; empty once they are merged
_C.NAME = ""  # name of the run; the config file's stem unless set
_C.OUTPUT = "output"  # the run's folder is OUTPUT/NAME/TAG
_C.TAG = "default"
_C.SEED = 0
_C.DEVICE = "auto"  # auto (the GPU where there is one), cpu, cuda
_C.TF32 = False  # let float32 matrix products and convolutions run in TF32
_C.SAVE_FREQ = 1  # epochs between checkpoints
_C.PRINT_FREQ = 10  # steps between log lines
_C.EVAL_MODE = False  # evaluate only
_C.THROUGHPUT_MODE = False  # measure throughput only

_C.DATA = CfgNode()
_C.DATA.DATASET = "imagenet"  # digits, imagenet, cifar10, cifar100, or a name with a prefix of timm's (torch/, hfds/)
_C.DATA.DATA_PATH = ""
_C.DATA.BATCH_SIZE = 128  # images a process and micro-batch
_C.DATA.IMG_SIZE = 224  # pixels, or [height, width]; up to 32 the training crop pads instead of zooming
_C.DATA.INTERPOLATION = "bicubic"
_C.DATA.MEAN = [0.485, 0.456, 0.406]  # a channel, of values in 0..1; one number serves every channel
_C.DATA.STD = [0.229, 0.224, 0.225]
_C.DATA.ZIP_MODE = False  # imagenet as train.zip, train_map.txt, val.zip, val_map.txt instead of folders
_C.DATA.CACHE_MODE = "part"  # files of an archive kept in memory: no; part (1/processes in each); full (all in each)
_C.DATA.TRAIN_SPLIT = "train"  # the splits' names, for datasets opened by timm
_C.DATA.VAL_SPLIT = "validation"
_C.DATA.SKIP_BAD_IMAGES = False  # count unreadable images instead of stopping: replaced in training, left out in val
_C.DATA.NUM_WORKERS = 8  # loading processes beside each training process; 0 loads in it
_C.DATA.PIN_MEMORY = True  # page-locked batches, for a GPU

_C.MODEL = CfgNode()
_C.MODEL.NAME = "vmamba_tiny"  # see vmamba.list_models()
_C.MODEL.OPTIONS = CfgNode(new_allowed=True)  # options of the model's constructor that differ from the variant's
_C.MODEL.NUM_CLASSES = 1000
_C.MODEL.IN_CHANS = 3  # 3, or 1 for grayscale
_C.MODEL.DROP_PATH_RATE = 0.1
_C.MODEL.LABEL_SMOOTHING = 0.1
_C.MODEL.BACKEND = "auto"  # of the scan; see vmamba_kernels.backends()
_C.MODEL.PRETRAINED = ""  # weights to start from: a file (see vmamba.load_checkpoint) or an address
_C.MODEL.WEIGHTS = "auto"  # of such a file: ema, model (the plain ones), auto (ema where there are)
_C.MODEL.DROP_HEAD = False  # start with a new head instead of theirs
_C.MODEL.RESUME = ""  # checkpoint of a run to go on with

_C.TRAIN = CfgNode()
_C.TRAIN.EPOCHS = 300
_C.TRAIN.START_EPOCH = 0
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.BASE_LR = 5e-4  # the three rates are for LR_REFERENCE_BATCH images and scale with the global batch
_C.TRAIN.WARMUP_LR = 5e-7  # the warm-up starts here
_C.TRAIN.MIN_LR = 5e-6  # the schedule ends here
_C.TRAIN.LR_REFERENCE_BATCH = 512  # 0: do not scale
_C.TRAIN.WEIGHT_DECAY = 0.05
_C.TRAIN.DECAY_SSM = True  # decay A_log (and SSD's D) as the released runs did; False: as Mamba asks
_C.TRAIN.CLIP_GRAD = 5.0  # norm; 0: no clipping
_C.TRAIN.ACCUMULATION_STEPS = 1  # micro-batches an optimiser step
_C.TRAIN.SAVE_STEPS = 0  # optimiser steps between checkpoints inside an epoch; 0: none
_C.TRAIN.MAX_BAD_STEPS = 10  # steps in a row without a finite loss and gradient that end the run
_C.TRAIN.AUTO_RESUME = True  # go on from the newest checkpoint in the run's folder
_C.TRAIN.USE_CHECKPOINT = False  # gradient checkpointing: less memory, more time
_C.TRAIN.COMPILE = ""  # torch.compile's default, reduce-overhead or max-autotune; cudagraphs; empty: off

_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = "adamw"  # adamw, sgd, or any optimiser timm names
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # of sgd

_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine, linear, step, multistep
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # of step
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # of step and multistep
_C.TRAIN.LR_SCHEDULER.MULTISTEPS = []  # epochs, of multistep

_C.TRAIN.EMA = CfgNode()
_C.TRAIN.EMA.ENABLE = False
_C.TRAIN.EMA.DECAY = 0.9999
_C.TRAIN.EMA.WARMUP = True  # a smaller decay in the first steps, so that short runs average their end

_C.AMP = CfgNode()
_C.AMP.ENABLE = True
_C.AMP.DTYPE = "bfloat16"  # bfloat16, or float16 (with a loss scaler)

_C.AUG = CfgNode()
_C.AUG.HFLIP = 0.5  # probability of a horizontal flip
_C.AUG.COLOR_JITTER = 0.4  # applies where AUTO_AUGMENT is off
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # timm's notation; null: off
_C.AUG.REPROB = 0.25  # random erasing: probability, fill (const, rand, pixel), regions
_C.AUG.REMODE = "pixel"
_C.AUG.RECOUNT = 1
_C.AUG.MIXUP = 0.8  # alpha; 0: off
_C.AUG.CUTMIX = 1.0  # alpha; 0: off
_C.AUG.CUTMIX_MINMAX = None  # [smallest, largest] side of the cut as a share of the image's, instead of alpha
_C.AUG.MIXUP_PROB = 1.0
_C.AUG.MIXUP_SWITCH_PROB = 0.5  # of cutmix where both are on
_C.AUG.MIXUP_MODE = "batch"  # batch, pair, elem

_C.TEST = CfgNode()
_C.TEST.CROP = True  # resize to 256/224 of IMG_SIZE and crop the centre; False: resize to IMG_SIZE

# What a key takes where its default does not say it.  [t] is a list of t.
_TYPES: dict[str, tuple] = {
    "BASE": (str, [str]),
    "DATA.IMG_SIZE": (int, [int]),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": ([int],),
    "AUG.AUTO_AUGMENT": (None, str),
    "AUG.CUTMIX_MINMAX": (None, [float]),
}
_CHOICES = {
    "DEVICE": ("auto", "cpu", "cuda"),
    "DATA.INTERPOLATION": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "MODEL.WEIGHTS": ("auto", "ema", "model"),
    "DATA.CACHE_MODE": ("no", "part", "full"),
    "TRAIN.COMPILE": ("", *COMPILE_MODES),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step", "multistep"),
    "AMP.DTYPE": ("bfloat16", "float16"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
}
_LOWEST = {
    0: "SEED DATA.NUM_WORKERS TRAIN.EPOCHS TRAIN.START_EPOCH TRAIN.WARMUP_EPOCHS TRAIN.LR_REFERENCE_BATCH "
    "TRAIN.BASE_LR TRAIN.WARMUP_LR TRAIN.MIN_LR TRAIN.WEIGHT_DECAY TRAIN.CLIP_GRAD TRAIN.SAVE_STEPS AUG.COLOR_JITTER "
    "AUG.MIXUP AUG.CUTMIX",
    1: "SAVE_FREQ PRINT_FREQ DATA.BATCH_SIZE DATA.IMG_SIZE MODEL.NUM_CLASSES MODEL.IN_CHANS TRAIN.ACCUMULATION_STEPS "
    "TRAIN.MAX_BAD_STEPS TRAIN.LR_SCHEDULER.DECAY_EPOCHS AUG.RECOUNT",
}
_PROBABILITIES = (
    "MODEL.DROP_PATH_RATE MODEL.LABEL_SMOOTHING TRAIN.EMA.DECAY AUG.HFLIP AUG.REPROB AUG.MIXUP_PROB "
    "AUG.MIXUP_SWITCH_PROB"
)
_Setting = tuple[str, Any, str]  # key, value, where it stands
_ROOT = Path(__file__).resolve().parents[1]  # the repository, where configs/ lies


def get_config(cfg_file: str | Path | None = None, opts: Sequence[str] = ()) -> CfgNode:
    """The frozen config of a file (None: the defaults) with `opts` = [key, value, ...] set on top.

    A relative path is looked for in the working directory, then in the repository.
    Raises UserError for a missing file, an unknown key, a value that does not fit.
    """
    return _merge(cfg_file, _pairs(opts))


def config_from_args(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line parsed by `argument_parser`: file, then --opts, then the other flags."""
    settings = _pairs(args.opts)
    for flag, (key, _) in _FLAGS.items():
        value = getattr(args, flag.replace("-", "_"))
        if value is not None:
            settings.append((key, value, f"--{flag}"))
    if args.amp_opt_level is not None:
        settings.append(("AMP.ENABLE", args.amp_opt_level != "O0", "--amp-opt-level"))
    if args.disable_amp is not None:
        disable = from_text(args.disable_amp, (bool,))
        settings.append(("AMP.ENABLE", disable if isinstance(disable, str) else not disable, "--disable-amp"))
    return _merge(args.cfg, settings)


def save_config(config: CfgNode, path: str | Path) -> None:
    """Write the whole config as YAML; `get_config(path)` gives the same one back."""
    try:
        Path(path).write_text(config.dump(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the config to '{path}': {error.strerror}") from error


def output_folder(config: CfgNode) -> Path:
    """The run's folder, OUTPUT/NAME/TAG."""
    return Path(config.OUTPUT, config.NAME, config.TAG)


def image_size(config: CfgNode) -> tuple[int, int]:
    """DATA.IMG_SIZE as (height, width)."""
    size = config.DATA.IMG_SIZE
    return (size, size) if isinstance(size, int) else tuple(size)


# ------------------------------------------------------------------------------------------------ command line

_FLAGS = {  # flags that set one key
    "batch-size": ("DATA.BATCH_SIZE", "images a process and micro-batch"),
    "data-path": ("DATA.DATA_PATH", "folder of the data set"),
    "zip": ("DATA.ZIP_MODE", "the data set is train.zip, train_map.txt, val.zip, val_map.txt"),
    "cache-mode": ("DATA.CACHE_MODE", "no, part or full: what of an archive is kept in memory"),
    "pretrained": ("MODEL.PRETRAINED", "weights to start from: a file or an address"),
    "drop-head": ("MODEL.DROP_HEAD", "start with a new head instead of that of --pretrained"),
    "resume": ("MODEL.RESUME", "checkpoint of a run to go on with"),
    "accumulation-steps": ("TRAIN.ACCUMULATION_STEPS", "micro-batches an optimiser step"),
    "use-checkpoint": ("TRAIN.USE_CHECKPOINT", "gradient checkpointing: less memory, more time"),
    "compile": ("TRAIN.COMPILE", "default, reduce-overhead, max-autotune (torch.compile's modes) or cudagraphs"),
    "output": ("OUTPUT", "the run's folder is OUTPUT/<name of the config>/TAG"),
    "tag": ("TAG", "tells runs of one config apart"),
    "eval": ("EVAL_MODE", "evaluate only"),
    "throughput": ("THROUGHPUT_MODE", "measure throughput only"),
    "optim": ("TRAIN.OPTIMIZER.NAME", "adamw, sgd, or any optimiser timm names"),
    "model-ema": ("TRAIN.EMA.ENABLE", "average the weights over the steps"),
    "model-ema-decay": ("TRAIN.EMA.DECAY", "decay of that average"),
}


def argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Swin's flags.  Underscores serve as hyphens; a flag that turns something on takes true or false or nothing.

    What is wrong on the command line ends the program with one sentence and status 2.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("--cfg", metavar="FILE", help="config file (required)")
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar=("KEY", "VALUE"), help="set any key")
    for flag, (key, text) in _FLAGS.items():
        if _KEYS[key] == (bool,):
            _add_switch(parser, flag, text)
        else:
            parser.add_argument(f"--{flag}", help=text)
    _add_switch(parser, "disable-amp", "compute in float32")
    parser.add_argument("--amp-opt-level", choices=["O0", "O1"], help="apex's names: O0 is --disable-amp, O1 autocast")
    parser.add_argument("--local-rank", type=int, help="passed by torch.distributed.launch; LOCAL_RANK is what counts")
    return parser


def _add_switch(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(f"--{flag}", nargs="?", const="true", metavar="true|false", help=text)


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args=None, namespace=None):
        args = [self._hyphenated(arg) for arg in (sys.argv[1:] if args is None else args)]
        parsed, extra = self.parse_known_args(args, namespace)
        flag = next((arg.partition("=")[0] for arg in extra if arg.startswith("-")), None)
        if flag is not None:
            self.error(str(unknown("flag", flag, self._option_string_actions)))
        if extra:
            self.error(f"unexpected argument '{extra[0]}'; every argument belongs to a flag")
        if parsed.cfg is None:
            self.error("--cfg FILE is required, for instance --cfg configs/vmamba_digits.yaml")
        return parsed

    def _hyphenated(self, arg: str) -> str:
        flag, equals, value = arg.partition("=")
        hyphenated = flag.replace("_", "-")
        return hyphenated + equals + value if hyphenated in self._option_string_actions else arg

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


# ------------------------------------------------------------------------------------------------ files and values


def _merge(cfg_file: str | Path | None, settings: Sequence[_Setting]) -> CfgNode:
    config = _C.clone()
    if cfg_file is not None:
        path = _find(Path(cfg_file))
        for key, value, source in from_released_config(_settings(path, ())):
            _set(config, key, value, source)
        config.NAME = config.NAME or path.stem
    for key, value, source in settings:
        if key == "BASE":
            raise UserError(f"{source}: BASE works in a config file only; name another file with --cfg")
        _set(config, key, from_text(value, _KEYS.get(key, ())) if isinstance(value, str) else value, source)
    config.NAME = config.NAME or config.MODEL.NAME
    config.freeze()
    return config


def _pairs(opts: Sequence[Any]) -> list[_Setting]:
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs of KEY VALUE, but '{opts[-1]}' stands alone")
    return [(key, value, "--opts") for key, value in zip(opts[::2], opts[1::2], strict=True)]


def _find(path: Path) -> Path:
    """`path`, in the working directory or in the repository."""
    for candidate in (path, _ROOT / path):
        if candidate.is_file():
            return candidate
    folder = path.parent if path.parent.is_dir() else _ROOT / "configs"
    nearest = get_close_matches(path.name, [file.name for file in folder.glob("*.y*ml")], n=1, cutoff=0.4)
    hint = f"did you mean '{path.parent / nearest[0]}'?" if nearest else "give an existing YAML file with --cfg"
    raise UserError(f"config file '{path}' does not exist; {hint}")


def _settings(path: Path, chain: tuple[Path, ...]) -> Iterator[_Setting]:
    """(key, value, file) of the files `path` builds on, then of `path`.  `chain`: the files that led here."""
    if path.resolve() in chain:
        raise UserError(f"config file '{chain[-1]}' builds on '{path.resolve()}', which builds on it; break the cycle")
    tree = _read(path)
    bases = tree.pop("BASE", [])
    if bases is None or not isinstance(bases, (str, list)) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: BASE is {bases!r}; expected {describe(_KEYS['BASE'])}")
    for base in filter(None, [bases] if isinstance(bases, str) else bases):  # released files have an empty one
        file = path.parent / base
        if not file.is_file():
            raise UserError(f"{path}: its BASE '{base}' does not exist; the path is relative to that file")
        for key, value, source in _settings(file, (*chain, path.resolve())):
            if key != "NAME":  # a run's name is its own
                yield key, value, source
    for key, value in _flatten(tree, "", path):
        yield key, value, str(path)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would drop the first."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{name}' stands twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}, line {error.problem_mark.line + 1}: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read config file '{path}': {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"config file '{path}' holds {tree!r:.60}; expected sections of keys such as TRAIN")
    return tree or {}


def _flatten(tree: dict, prefix: str, path: Path) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in _SECTIONS:
            yield key, value
        elif isinstance(value, dict):
            yield from _flatten(value, f"{key}.", path)
        elif value is not None:
            raise UserError(f"{path}: {key} is {value!r}; expected a section of keys")


def _set(config: CfgNode, key: str, value: Any, source: str) -> None:
    """Set one key, its value converted to the key's type.  `source` says where it stands, for the error."""
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node.get(section, CfgNode()) if isinstance(node, CfgNode) else CfgNode()
    if sections == ["MODEL", "OPTIONS"]:
        kinds = (bool, int, float, str, None, [int], [float], [str])  # build_model knows what each option takes
    elif key in _SECTIONS:
        raise UserError(f"{source}: {key} is a section; set one of its keys")
    elif key not in _KEYS:
        namesakes = [known for known in _KEYS if known.split(".")[-1] == name.upper()]
        nearest = get_close_matches(key.upper(), namesakes or [*_KEYS, *_SECTIONS], n=1, cutoff=0.0)[0]
        raise UserError(f"{source}: unknown config key '{key}'; did you mean '{nearest}'?")
    else:
        kinds = _KEYS[key]
    try:
        node[name] = convert(value, kinds)
    except TypeError:
        kind = type(value).__name__
        raise UserError(f"{source}: {key} is {value!r} ({kind}); expected {describe(kinds)}") from None
    _check(key, node[name], source)


def _check(key: str, value: Any, source: str) -> None:
    """Raise UserError for a value of the right type that its key does not take."""
    if key in _CHOICES and value not in _CHOICES[key]:
        raise UserError(f"{source}: {unknown(key, value, _CHOICES[key])}")
    smallest = min(value, default=0) if isinstance(value, list) else value
    for lowest, keys in _LOWEST.items():
        if key in keys.split() and smallest < lowest:
            raise UserError(f"{source}: {key} is {value}; it must be at least {lowest}")
    if key in _PROBABILITIES.split() and not 0 <= value <= 1:
        raise UserError(f"{source}: {key} is {value}; it must be between 0 and 1")
    if key == "DATA.IMG_SIZE" and isinstance(value, list) and len(value) != 2:
        raise UserError(f"{source}: DATA.IMG_SIZE is {value}; expected one side or [height, width]")


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, tuple]]:
    """(key, what it takes) of every default."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, _TYPES.get(key) or (([type(value[0])],) if isinstance(value, list) else (type(value),))


_KEYS = dict(_leaves(_C))  # key -> the kinds of value it takes
_SECTIONS = {".".join(key.split(".")[:depth]) for key in _KEYS for depth in range(1, key.count(".") + 1)}
_SECTIONS.add("MODEL.OPTIONS")
