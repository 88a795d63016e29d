"""The models by name: the one place with architecture numbers, and the one that turns a config into a model.

Names and numbers are those of the tables of VMamba (arXiv 2401.10166 and its later revision).  Since that revision
"VMamba-T" in papers means `vmamba_tiny_s1l8`; here `vmamba_tiny` is the model of January 2024.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn
from yacs.config import CfgNode

from vmamba.errors import UserError, nearest, unknown
from vmamba.extensions import not_imported
from vmamba.models.download import download
from vmamba.models.options import check_configured
from vmamba.models.pretrained import load_checkpoint, load_pretrained
from vmamba.models.vssm import VSSM
from vmamba.text import printable, some


@dataclass(frozen=True)
class Variant:
    """A named architecture: options of `VSSM` that differ from its defaults, and what its authors call it."""

    options: Mapping[str, Any]
    released_as: str = ""
    accuracy: float | None = None  # published top-1 on ImageNet-1K, percent
    parameters: int | None = None  # with the head of 1000 classes
    gflops: float | None = None  # multiply-adds at 224 x 224, as `flops` counts them
    weights: str | None = None  # address of the released file
    sha256: str | None = None  # of that file, where known


TIMM = "timm/"  # in front of the names of its models
_V0 = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/"  # the releases are called #v0cls and #v2cls
_V2 = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/"


def _vanilla(depth: int, dim: int, drop_path_rate: float) -> dict[str, Any]:
    """January 2024: 16 states, a gate, no MLP."""
    return dict(
        depths=(2, 2, depth, 2),
        dims=dim,
        d_state=16,
        mlp_ratio=0.0,
        downsample="v1",
        patch_embed="v1",
        drop_path_rate=drop_path_rate,
    )


def _one_state(depth: int, dim: int, ssm_ratio: float, drop_path_rate: float) -> dict[str, Any]:
    """The later models: one state, no gate, an MLP."""
    return dict(
        depths=(2, 2, depth, 2),
        dims=dim,
        d_state=1,
        ssm_ratio=ssm_ratio,
        gate=False,
        ssm_conv_bias=False,
        mlp_ratio=4.0,
        downsample="v3",
        patch_embed="v2",
        drop_path_rate=drop_path_rate,
    )


def _mamba2(depth: int, dim: int, drop_path_rate: float) -> dict[str, Any]:
    """The SSD models: 64 states."""
    return _one_state(depth, dim, 1.0, drop_path_rate) | dict(scan="ssd", d_state=64, ssm_act="gelu", ssm_init="v2")


VARIANTS: dict[str, Variant] = {
    "vmamba_tiny": Variant(
        _vanilla(9, 96, 0.2),
        "VMamba-T (Vanilla-VMamba-T)",
        82.2,
        22_893_448,
        5.627,
        _V0 + "vssmtiny_dp01_ckpt_epoch_292.pth",
    ),
    "vmamba_small": Variant(
        _vanilla(27, 96, 0.3),
        "VMamba-S (Vanilla-VMamba-S)",
        83.5,
        44_417_416,
        11.231,
        _V0 + "vssmsmall_dp03_ckpt_epoch_238.pth",
    ),
    "vmamba_base": Variant(
        _vanilla(27, 128, 0.6),
        "VMamba-B (Vanilla-VMamba-B)",
        84.0,
        76_254_056,
        18.02,
        _V0 + "vssmbase_dp06_ckpt_epoch_241.pth",
    ),
    "vmamba_tiny_s2l5": Variant(
        _one_state(5, 96, 2.0, 0.2),
        "VMamba-T[s2l5]",
        82.5,
        30_705_832,
        4.858,
        _V2 + "vssm_tiny_0230_ckpt_epoch_262.pth",
    ),
    "vmamba_small_s2l15": Variant(
        _one_state(15, 96, 2.0, 0.3),
        "VMamba-S[s2l15]",
        83.6,
        50_147_752,
        8.716,
        _V2 + "vssm_small_0229_ckpt_epoch_222.pth",
    ),
    "vmamba_base_s2l15": Variant(
        _one_state(15, 128, 2.0, 0.6),
        "VMamba-B[s2l15]",
        83.9,
        88_557_800,
        15.359,
        _V2 + "vssm_base_0229_ckpt_epoch_237.pth",
    ),
    "vmamba_tiny_s1l8": Variant(
        _one_state(8, 96, 1.0, 0.2),
        "VMamba-T[s1l8]",
        82.6,
        30_249_064,
        4.906,
        _V2 + "vssm1_tiny_0230s_ckpt_epoch_264.pth",
    ),
    "vmamba_small_s1l20": Variant(
        _one_state(20, 96, 1.0, 0.3),
        "VMamba-S[s1l20]",
        83.3,
        49_012_840,
        8.612,
        _V2 + "vssm1_small_0229s_ckpt_epoch_240.pth",
    ),
    "vmamba_base_s1l20": Variant(
        _one_state(20, 128, 1.0, 0.5),
        "VMamba-B[s1l20]",
        83.8,
        86_614_504,
        15.221,
        _V2 + "vssm1_base_0229s_ckpt_epoch_225.pth",
    ),
    "vmamba_tiny_m2": Variant(_mamba2(4, 96, 0.2), "mamba2 tiny, not trained by its authors", None, 25_340_296, 5.322),
    "vmamba_small_m2": Variant(
        _mamba2(12, 96, 0.3), "mamba2 small, not trained by its authors", None, 39_079_816, 8.505
    ),
    "vmamba_base_m2": Variant(
        _mamba2(12, 128, 0.3), "mamba2 base, not trained by its authors", None, 67_527_528, 13.885
    ),
    "vmamba_nano": Variant(_one_state(2, 32, 1.0, 0.1) | dict(depths=(1, 1, 2, 1))),
    "vmamba_digits": Variant(_one_state(2, 32, 1.0, 0.1) | dict(depths=(2, 2))),
}


def list_models(
    filter: str | Sequence[str] = "", pretrained: bool = False, exclude_filters: str | Sequence[str] = ()
) -> list[str]:
    """The names that `create_model` takes, in the order of `timm.list_models`.

    Args:
        filter: a pattern such as "*tiny*", or several, of which a name must match one; "" for all.
        pretrained: only those that have released weights.
        exclude_filters: a pattern, or several, of which a name must match none.

    Raises UserError for a filter that is no text.
    """
    wanted, unwanted = _patterns("filter", filter), _patterns("exclude_filters", exclude_filters)
    names = [name for name, variant in VARIANTS.items() if variant.weights or not pretrained]
    names = [name for name in names if any(fnmatchcase(name, pattern or "*") for pattern in wanted)]
    names = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in unwanted)]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _patterns(name: str, given: str | Sequence[str]) -> Sequence[str]:
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"{name} is {given!r}; give a pattern such as '*tiny*', or pretrained=True by its name")
    return patterns


def create_model(name: str, pretrained: bool = False, **options: Any) -> VSSM:
    """The model called `name`, any of `options.ModelOptions` changed by keyword: num_classes, drop_path_rate, ...

    Args:
        pretrained: load the released weights, downloaded into torch hub's cache; the head only where `num_classes` is
            not given or is the 1000 that it has.

    Raises:
        UserError: no such model or option (it names the nearest), or an impossible value; no released weights, they
            cannot be downloaded (it says what to put where), or do not fit the options.
    """
    if not isinstance(name, str) or name not in VARIANTS:
        raise unknown("model", name, VARIANTS)
    variant = VARIANTS[name]
    if "features_only" in options:
        raise UserError(
            f"features_only is timm's: timm.create_model('{name}', features_only=True) after import vmamba; or take "
            f"vmamba.Backbone(vmamba.create_model('{name}')), whose outputs have norms of their own"
        )
    if pretrained and not variant.weights:
        raise UserError(f"'{name}' has no released weights; these have: {', '.join(list_models(pretrained=True))}")
    model = VSSM(**variant.options | options)
    if pretrained:
        checkpoint = load_checkpoint(download(variant.weights, variant.sha256))
        load_pretrained(model, checkpoint, drop_head=model.num_classes != 1000)
    return model


def build_model(config: CfgNode) -> nn.Module:
    """The model of a config: MODEL.NAME with MODEL.OPTIONS on top, or one of timm's.

    Raises UserError as `create_model` does.

    Where MODEL.DROP_PATH_RATE is None the variant's own holds.
    """
    if config.MODEL.NAME.startswith(TIMM):
        return _timm_model(config)
    options = {name: check_configured(name, value) for name, value in config.MODEL.OPTIONS.items()}
    if config.MODEL.DROP_PATH_RATE is not None:
        options["drop_path_rate"] = config.MODEL.DROP_PATH_RATE
    model = create_model(
        config.MODEL.NAME,
        num_classes=config.MODEL.NUM_CLASSES,
        in_chans=config.MODEL.IN_CHANS,
        img_size=config.DATA.IMG_SIZE,
        backend=config.MODEL.BACKEND,
        **options,
    )
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    return model


def _timm_model(config: CfgNode) -> nn.Module:
    """The baselines of the tables: MODEL.NAME timm/swin_tiny_patch4_window7_224."""
    settings, name = config.MODEL, config.MODEL.NAME.removeprefix(TIMM)
    check_registered(config)
    fixed_size = timm_settings(name).fixed_input_size
    if settings.OPTIONS:
        raise UserError(f"MODEL.OPTIONS are of our models, and MODEL.NAME is {settings.NAME}; leave them out")
    options = {} if settings.DROP_PATH_RATE is None else {"drop_path_rate": settings.DROP_PATH_RATE}
    if fixed_size:
        options["img_size"] = config.DATA.IMG_SIZE
    try:
        model = timm.create_model(name, num_classes=settings.NUM_CLASSES, in_chans=settings.IN_CHANS, **options)
        if config.TRAIN.USE_CHECKPOINT:
            model.set_grad_checkpointing()
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"timm cannot build '{name}' with these settings: {error or type(error).__name__}") from error
    if not hasattr(model, "pretrained_cfg"):
        _tell_as_timm(name, model, settings.NUM_CLASSES)
    size = config.DATA.IMG_SIZE
    check_size(name, model, settings.IN_CHANS, (size, size) if isinstance(size, int) else tuple(size))
    return model


def _tell_as_timm(name: str, model: nn.Module, classes: int) -> None:
    """Let a model of a user's module, which need not tell what timm's do, tell its name, its classes, its first
    convolution, and as its classifier the last linear layer."""
    layers = list(model.named_modules())
    first = [each for each, layer in layers if isinstance(layer, nn.Conv2d)][:1]
    last = [each for each, layer in layers if isinstance(layer, nn.Linear)][-1:]
    model.num_classes = getattr(model, "num_classes", classes)
    model.pretrained_cfg = {"architecture": name, "first_conv": tuple(first), "classifier": tuple(last)}


def check_name(config: CfgNode, bare: bool = False) -> None:
    """Raises UserError where MODEL.NAME is no model; `bare`: timm's need no timm/ in front."""
    name = config.MODEL.NAME
    if name.startswith(TIMM):
        check_registered(config)
    elif name not in VARIANTS and not (bare and timm.is_model(name)):
        raise unknown("model", name, [*VARIANTS, *timm.list_models()] if bare else VARIANTS)


def check_registered(config: CfgNode) -> None:
    """Raises UserError where timm knows no model MODEL.NAME, as where the module that registers it is not imported:
    what a file names is not, unasked."""
    name, absent = config.MODEL.NAME.removeprefix(TIMM), not_imported(config.get("IMPORT", []))
    if timm.is_model(name):
        return
    if not absent and nearest(name, timm.list_models()):
        raise unknown("model", name, timm.list_models())
    if not absent:
        raise UserError(
            f"unknown model '{printable(name)}'; timm.list_models() names timm's, and --import takes the module that "
            f"registers your own"
        )
    raise UserError(
        f"timm knows no model '{printable(name)}', and the config names modules that nothing has imported: "
        f"{printable(some(absent))}; if you trust them, import them first (--import {printable(absent[0])})"
    )


def timm_settings(name: str) -> PretrainedCfg:
    """What timm knows of one of its models' weights.  Raises UserError for a tag, behind the dot, that there is not."""
    try:
        return timm.get_pretrained_cfg(name) or PretrainedCfg()  # of one that a user's module registered
    except RuntimeError as error:  # "resnet18.a1_in1k"
        architecture = name.partition(".")[0]
        raise unknown("model", name, [architecture, *timm.list_pretrained(f"{architecture}.*")]) from error


def as_shapes(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode that computes shapes alone, on the meta device.

    It raises ValueError where an image has no pixel left, of which PyTorch 2.6 says nothing there.
    """

    def check(conv: nn.Module, _: object, output: Tensor) -> None:
        if output.numel() == 0:
            raise ValueError(f"no pixel is left for a convolution of {' x '.join(map(str, conv.kernel_size))}")

    shapes = copy.deepcopy(model).to("meta").eval()
    for module in shapes.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(check)
    return shapes


def check_size(name: str, model: nn.Module, in_chans: int, size: tuple[int, int]) -> None:
    """Raises UserError where one of timm's models cannot be run on images of `size`.  Ours say so themselves."""
    shapes = as_shapes(model)
    try:
        shapes(torch.empty(1, in_chans, *size, device="meta"))
    except NotImplementedError:  # of shapes alone this model cannot be run
        return
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{name} does not take images of {size[0]} x {size[1]} pixels ({reason}); give another size"
        ) from error
