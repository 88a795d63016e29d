"""The released YAML files: their keys in ours.

Keys that both have mean the same and pass.  The architecture, MODEL.VSSM there, becomes MODEL.NAME where it is one of
our variants, else the nearest variant's name and MODEL.OPTIONS.  What the keys of MODEL.VSSM leave out has the default
of their time: the format grew twice, and its files tell by their keys how old they are (`_GENERATIONS`).
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from vmamba.errors import UserError, unknown
from vmamba.models.options import ModelOptions
from vmamba.models.released import RELEASED, options_from_released
from vmamba.models.variants import VARIANTS

logger = logging.getLogger("vmamba")
Setting = tuple[str, Any, str]  # key, value, the file where it stands

# Keys of MODEL.VSSM -> options of the released constructor.
_VSSM = {
    "EMBED_DIM": "dims",
    "SSM_FORWARDTYPE": "forward_type",
    "DOWNSAMPLE": "downsample_version",
    "PATCHEMBED": "patchembed_version",
    "D_STATE": "ssm_d_state",
    "DT_RANK": "ssm_dt_rank",
    "SSM_SIMPLE_INIT": "ssm_simple_init",
} | {
    name.upper(): name
    for name in RELEASED
    if name not in ("dims", "downsample_version", "patchembed_version", "num_classes", "drop_path_rate", "imgsize")
}
_OFF = ("SHARED_SSM", "SOFTMAX")  # ablations of January, taken where they are off
_KINDS = {"SSM_FORWARDTYPE": str, "DEPTHS": list}  # those that are taken apart here; the model checks the others


@dataclass(frozen=True)
class _Generation:
    """The format of a time: the keys it had, None for any, and its defaults where the constructor has others."""

    time: str
    keys: set[str] | None
    defaults: dict[str, Any]
    unread: tuple[str, ...] = ()


# The first that has all keys of a file wrote it.  The first of all built the one model that there was: no MLP, whatever
# its MLP_RATIO, and nothing else to choose.
_FIRST_KEYS = {"PATCH_SIZE", "IN_CHANS", "EMBED_DIM", "DEPTHS", "PATCH_NORM", "MLP_RATIO"}
_SECOND_KEYS = {"D_STATE", "DT_RANK", "SSM_D_STATE", "SSM_DT_RANK", "SSM_RATIO", "DOWNSAMPLE", *_OFF}
_GENERATIONS = (
    _Generation(
        "of its first weeks, January 2024",
        _FIRST_KEYS,
        dict(dims=96, forward_type="v0", mlp_ratio=0.0, downsample_version="v1", patchembed_version="v1"),
        unread=("MLP_RATIO",),
    ),
    _Generation("of late January 2024", _FIRST_KEYS | _SECOND_KEYS, dict(dims=96, patchembed_version="v1")),
    _Generation("of February 2024 or later", None, dict(dims=96, patchembed_version="v2")),
)
_NOT_ARCHITECTURE = ("num_classes", "in_chans", "img_size", "drop_path_rate")  # keys of their own in our config
_RENAMED = {
    "MODEL.NAME": "NAME",  # the run's there
    "AMP_ENABLE": "AMP.ENABLE",
    "MODEL_EMA": "TRAIN.EMA.ENABLE",
    "MODEL_EMA_DECAY": "TRAIN.EMA.DECAY",
    "MODEL.PRETRAIN_CKPT": "MODEL.PRETRAINED",  # Mamba-UNet's
}
_MEANINGLESS = (  # leftovers of Swin's and SimMIM's configs, which the original does not read
    *("AMP_OPT_LEVEL", "ENABLE_AMP", "FUSED_LAYERNORM", "TRAINCOST_MODE", "DATA.MASK_PATCH_SIZE", "DATA.MASK_RATIO"),
    *("MODEL.DROP_RATE", "MODEL.MMCKPT", "MODEL.VSSM.SSM_RANK_RATIO", "TEST.SEQUENTIAL", "TEST.SHUFFLE", "TRAIN.MOE"),
    *("TRAIN.LAYER_DECAY", "TRAIN.LR_SCHEDULER.GAMMA", "TRAIN.LR_SCHEDULER.WARMUP_PREFIX"),
)


def from_released_config(settings: Iterable[Setting]) -> Iterator[Setting]:
    """The settings of a config file in our keys; those of a file of ours as they are.

    What the result is, and which keys say nothing here, is logged.
    Raises UserError, naming the file, for a model or an option that is unknown or not supported.
    """
    settings = list(settings)
    if not any(key.startswith(("MODEL.TYPE", "MODEL.VSSM")) for key, _, _ in settings):
        return iter(settings)
    return iter(_translate(settings))


def _translate(settings: list[Setting]) -> list[Setting]:
    given, ours, ignored = {}, {}, []
    for key, value, source in settings:
        if key == "MODEL.TYPE":
            if value != "vssm":
                raise UserError(f"{source}: MODEL.TYPE is '{value}'; of the released models this program has 'vssm'")
        elif key == "MODEL.VSSM":
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: MODEL.VSSM is {value!r}; expected a section of keys")
            for name, option in value.items():
                if f"{key}.{name}" in _MEANINGLESS:
                    ignored.append(f"{key}.{name}")
                elif name in _OFF:
                    if option:
                        raise UserError(f"{source}: {key}.{name} is an ablation of the original that is not here")
                elif name not in _VSSM:
                    raise UserError(f"{source}: {unknown('key of MODEL.VSSM', str(name), _VSSM)}")
                elif not isinstance(option, _KINDS.get(name, object)):
                    raise UserError(f"{source}: {key}.{name} is {option!r}; expected a {_KINDS[name].__name__}")
                given[name] = option
        elif key in _MEANINGLESS:
            ignored.append(key)
        else:
            ours[_RENAMED.get(key, key)] = (value, source)
    source = settings[-1][2]
    generation = next(each for each in _GENERATIONS if each.keys is None or given.keys() <= each.keys)
    ignored += [f"MODEL.VSSM.{name}" for name in generation.unread if name in given]
    vssm = {_VSSM[name]: value for name, value in given.items() if name in _VSSM and name not in generation.unread}
    try:
        options = options_from_released(generation.defaults | vssm)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    name, changes = _nearest_variant(options)
    kept_none = name == "vmamba_tiny" and changes.keys() <= {"scan_float32"}  # the run of that very model
    ours.setdefault("TRAIN.EMA.ENABLE", (not kept_none, source))  # there it is on unless the command says otherwise
    ours.setdefault("MODEL.DROP_PATH_RATE", (0.1, source))
    architecture = {"MODEL.NAME": name} | {f"MODEL.OPTIONS.{option}": value for option, value in changes.items()}
    if "in_chans" in vssm:
        architecture["MODEL.IN_CHANS"] = options["in_chans"]
    translated = [(key, value, source) for key, value in architecture.items()]
    translated += [(key, value, source) for key, (value, source) in ours.items()]
    # A warning, because a config is read before there is a log, and only warnings show then.
    logger.warning(
        f"{source} is a config of the original {generation.time}; in the keys of this program it is\n"
        + yaml.safe_dump(_tree(translated), sort_keys=False, default_flow_style=None)
        + (f"and these of its keys say nothing here: {', '.join(ignored)}" if ignored else "").rstrip()
    )
    return translated


def _nearest_variant(options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The variant that differs from `options` in the fewest, and those of `options` that differ."""
    defaults = vars(ModelOptions())
    stages = len(options["depths"])
    given = {name: _comparable(name, value, stages) for name, value in options.items() if name not in _NOT_ARCHITECTURE}
    differing = {}
    for variant, known in VARIANTS.items():
        full = defaults | dict(known.options)
        differing[variant] = {
            name: value for name, value in given.items() if value != _comparable(name, full[name], len(full["depths"]))
        }
    name = min(differing, key=lambda name: len(differing[name]))
    return name, differing[name]


def _comparable(name: str, value: Any, stages: int) -> Any:
    if name == "dims" and isinstance(value, int):
        return [value * 2**i for i in range(stages)]
    return list(value) if isinstance(value, (list, tuple)) else value


def _tree(settings: Iterable[Setting]) -> dict:
    tree: dict = {}
    for key, value, _ in settings:
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree
