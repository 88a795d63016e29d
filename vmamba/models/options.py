"""What can be chosen of a model, an option a line: its default, its meaning, what it takes, what the original calls it.

`ss2d` reads `ScanOptions`, `vssm.Block` `BlockOptions` and `vssm.VSSM` `ModelOptions`, each adding to the one before.
A config sets them as MODEL.OPTIONS.<name>, but for the few that have a key of their own.  The original has most of them
as options of its constructor (`released`), some as postfixes of its forward_type (`postfixes`); the defaults are those
of its constructor.  Every value is checked here, wherever it comes from.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

from vmamba.errors import UserError, unknown
from vmamba.models.layers import ACTIVATIONS, DOWNSAMPLES, NORMS, OUT_NORMS, PATCH_EMBEDS
from vmamba.text import counted
from vmamba.values import Takes, kinds_of
from vmamba_kernels import ROUTES, backends

Options = TypeVar("Options", bound="ScanOptions")


def option(
    default: Any,
    meaning: str,
    kinds: tuple = (),
    *,
    released: str = "",
    postfixes: Mapping[str, Any] | None = None,
    **bounds: Any,
) -> Any:
    """A field of the options: its default, what it means, and what it takes (the default's type, or one of `kinds`).

    Args:
        released: its name in the original's constructor.
        postfixes: of the original's forward_type, each with the value it stands for.
        bounds: see `vmamba.values.Takes`.
    """
    takes = Takes(kinds or kinds_of(default), **bounds)
    metadata = dict(meaning=meaning, takes=takes, released=released, postfixes=postfixes or {})
    return field(default=default, metadata=metadata)


def _backends() -> tuple[str, ...]:
    return ("auto", *backends())


# The upper bounds are far beyond what is trained; behind them a slip of the keyboard asks for all memory there is.
_RANK = dict(kinds=(int, str), choices=("auto",), at_least=1, at_most=4096)
_ROUTES = dict(kinds=([str], str), choices=ROUTES)
_SHARE = dict(at_least=0, at_most=1)  # of what is dropped at random
_SIZE = dict(kinds=(int, [int]), at_least=1)
_OUT_NORMS = {"onnone": "none", "onsoftmax": "softmax", "onsigmoid": "sigmoid", "ondwconv3": "dwconv3"}
_OUT_NORMS |= {"oncnorm": "ln_dwconv3"}


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """Of a block's core, `ss2d.SS2D` or `ss2d.SSD2D`.  Raises UserError for a value that an option does not take.

    dt_rank "auto" is a 16th of the block's channels, rounded up.  The scan's state is float32 in any case;
    scan_float32 is about what the scan reads and writes.
    """

    d_state: int = option(16, "states of a channel", at_least=1, at_most=4096, released="ssm_d_state")
    ssm_ratio: float = option(
        2.0, "channels of the scan in units of the block's", above=0, released="ssm_ratio", at_most=64
    )
    dt_rank: int | str = option("auto", "rank of the step sizes; SSD: heads", released="ssm_dt_rank", **_RANK)
    routes: tuple[str, ...] | str = option(ROUTES, "ways through the image; repeats allowed", **_ROUTES)
    pool: str = option(
        "none",
        "scan the means of the image's columns, or rows; turns: block by block (arXiv 2502.00594)",
        choices=("none", "columns", "rows", "turns"),
    )
    gate: bool = option(True, "multiply by a second half of the input projection", postfixes={"noz": False})
    gate_act: bool = option(True, "the activation on the gate too", postfixes={"nozact": False})
    ssm_act: str = option("silu", "activation behind the convolution", choices=ACTIVATIONS, released="ssm_act_layer")
    ssm_conv: int = option(
        3, "side of the depthwise convolution, odd; below 2 there is none", at_most=255, released="ssm_conv"
    )
    ssm_conv_bias: bool = option(True, "whether that convolution has a bias", released="ssm_conv_bias")
    ssm_drop_rate: float = option(0.0, "dropout on the result", released="ssm_drop_rate", **_SHARE)
    ssm_init: str = option("v0", "of the scan; v0 is Mamba's", choices=("v0", "v1", "v2"), released="ssm_init")
    out_norm: str = option("ln", "what follows the scan", choices=OUT_NORMS, postfixes=_OUT_NORMS)
    out_act: bool = option(False, "GELU behind the out-norm", postfixes={"oact": True})
    scan_float32: bool = option(False, "give the scan float32 under autocast too", postfixes={"no32": False})
    backend: str = option("auto", "of the scan; auto: the fastest that can serve", choices=_backends)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = each.metadata["takes"].check(each.name, getattr(self, each.name))
            object.__setattr__(self, each.name, tuple(value) if isinstance(value, list) else value)

    def changed(self: Options, **changes: Any) -> Options:
        """These options with others' values.  Raises UserError for a name that is none of them, with the nearest."""
        known = [each.name for each in fields(self)]
        for name in changes:
            if name not in known:
                raise unknown("model option", name, known)
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class BlockOptions(ScanOptions):
    """Of a block, `vssm.Block`.  Raises UserError for a value that an option does not take."""

    scan: str = option("selective", "SS2D, or ssd, Mamba-2's (forward_type m0)", choices=("selective", "ssd"))
    mlp_ratio: float = option(
        4.0, "width of the MLP in units of dims; 0: none", at_least=0, released="mlp_ratio", at_most=64
    )
    mlp_act: str = option("gelu", "activation of the MLP", choices=ACTIVATIONS, released="mlp_act_layer")
    mlp_drop_rate: float = option(0.0, "dropout in the MLP", released="mlp_drop_rate", **_SHARE)
    gated_mlp: bool = option(False, "multiply the MLP's hidden layer by a gate", released="gmlp")
    norm_layer: str = option("ln", "of blocks, stem, downsampling and head", choices=NORMS, released="norm_layer")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BlockOptions):
    """Of a whole model, `vssm.VSSM`.  Raises UserError for a value that an option does not take.

    Stochastic depth grows from 0 at the first block.  The versions of the stem and of the downsampling are those of
    `layers.patch_embed` and `layers.downsample`.  A position map is resized where an image's size is another.
    """

    num_classes: int = option(1000, "of the head; 0 leaves it out", at_least=0, at_most=10**6, released="num_classes")
    in_chans: int = option(3, "channels of the images", at_least=1, at_most=10**4, released="in_chans")
    img_size: int | tuple[int, int] = option(
        224, "that pos_embed is made for", length=2, at_most=2**16, released="imgsize", **_SIZE
    )
    global_pool: str = option("avg", "in front of the head; '': none", choices=("avg", ""))
    depths: tuple[int, ...] = option((2, 2, 9, 2), "blocks of each stage", at_least=0, at_most=1000, released="depths")
    dims: int | tuple[int, ...] = option(
        96, "channels of each stage; d: d, 2d, 4d, ...", at_most=2**14, released="dims", **_SIZE
    )
    patch_size: int = option(4, "stride of the stem; 4 with v2", at_least=1, at_most=1024, released="patch_size")
    route_turns: int = option(
        1, "parts of the routes that blocks take in turn; 2: there and back (arXiv 2506.15976)", at_least=1, at_most=64
    )
    drop_rate: float = option(0.0, "dropout in front of the head", **_SHARE)
    drop_path_rate: float = option(0.1, "stochastic depth of the last block", released="drop_path_rate", **_SHARE)
    patch_norm: bool = option(True, "norms in the stem", released="patch_norm")
    patch_embed: str = option("v1", "the stem", choices=PATCH_EMBEDS, released="patchembed_version")
    downsample: str = option("v2", "between stages", choices=DOWNSAMPLES, released="downsample_version")
    pos_embed: bool = option(False, "add a learned position map behind the stem", released="posembed")


def of_block(options: ModelOptions, number: int) -> ModelOptions:
    """What a model's block has of `options` that blocks have in turn, counted from 0 through all stages.

    Raises UserError for routes that do not part.
    """
    routes = (options.routes,) if isinstance(options.routes, str) else options.routes
    turns = options.route_turns
    if len(routes) % turns:
        raise UserError(
            f"route_turns is {turns}, which does not divide {counted(len(routes), 'route')}; choose a divisor"
        )
    share, turn = len(routes) // turns, number % turns
    pool = ("columns", "rows")[number % 2] if options.pool == "turns" else options.pool
    return options.changed(routes=routes[turn * share : (turn + 1) * share], pool=pool)


# Options that a config sets by a key of their own; a classifier that is trained always pools.
_OTHER_KEYS = {
    "num_classes": "MODEL.NUM_CLASSES",
    "in_chans": "MODEL.IN_CHANS",
    "img_size": "DATA.IMG_SIZE",
    "drop_path_rate": "MODEL.DROP_PATH_RATE",
    "backend": "MODEL.BACKEND",
}


class Option(NamedTuple):
    """What a table of options says of one."""

    default: Any
    meaning: str
    takes: Takes


CONFIGURABLE = {  # as MODEL.OPTIONS.<name>
    each.name: Option(each.default, each.metadata["meaning"], each.metadata["takes"])
    for each in fields(ModelOptions)
    if each.name not in {*_OTHER_KEYS, "global_pool"}
}


def check_configured(name: str, value: Any) -> Any:
    """The value of MODEL.OPTIONS.<name> as the model takes it.  Raises UserError as a config should say it."""
    if name in _OTHER_KEYS:
        raise UserError(f"MODEL.OPTIONS.{name} has a key of its own; set {_OTHER_KEYS[name]}")
    if name not in CONFIGURABLE:
        raise unknown("model option", name, CONFIGURABLE)
    return CONFIGURABLE[name].takes.check(f"MODEL.OPTIONS.{name}", value)


def signed_by(options: type[ScanOptions]) -> Callable[[Callable], Callable]:
    """Decorates a constructor that ends in **options: its signature, for `inspect` and `help`, lists them."""

    def decorate(constructor: Callable) -> Callable:
        *own, _ = inspect.signature(constructor).parameters.values()
        names = {parameter.name for parameter in own}
        rest = [each for name, each in inspect.signature(options).parameters.items() if name not in names]
        constructor.__signature__ = inspect.Signature([*own, *rest])
        return constructor

    return decorate
