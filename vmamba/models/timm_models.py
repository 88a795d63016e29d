"""Every variant as a model of timm: `timm.create_model("vmamba_tiny", ...)` after `import vmamba`.

Released weights pass through `checkpoint_filter_fn`, which refuses what does not fit: timm itself loads without
complaint whatever it finds once the number of classes differs.
"""

import inspect
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor

from vmamba.errors import UserError, unknown
from vmamba.models.download import download
from vmamba.models.formats import PICKLED
from vmamba.models.options import ModelOptions
from vmamba.models.pretrained import adapted, weights_in
from vmamba.models.variants import VARIANTS, Variant, create_model
from vmamba.models.vssm import VSSM
from vmamba.models.weights import difference, load_weights

logger = logging.getLogger("vmamba")
FIRST_CONV, CLASSIFIER = "patch_embed.0", "classifier.head"
# What timm's builder takes beside the options of the model.
TIMM_OPTIONS = {"features_only", "out_indices", "feature_cls"} | {
    name
    for name, parameter in inspect.signature(build_model_with_cfg).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
} - {"model_cls", "variant", "model_cfg", "feature_cfg", "pretrained_filter_fn"}


def _cfg(variant: Variant) -> dict[str, Any]:
    """The data and the weights that a variant was trained with, under timm's names."""
    stages = len(variant.options["depths"])
    return dict(
        url=variant.weights or "",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(224 // 4 // 2 ** (stages - 1),) * 2,
        crop_pct=224 / 256,
        interpolation="bicubic",
        first_conv=FIRST_CONV,
        classifier=CLASSIFIER,
        paper_ids="arXiv:2401.10166",
        paper_name="VMamba: Visual State Space Model",
        origin_url="https://github.com/MzeroMiko/VMamba",
    )


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k" if variant.weights else name: _cfg(variant) for name, variant in VARIANTS.items()}
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: VSSM) -> dict[str, Tensor]:
    """Weights of `model` from those of a file: a released one, in either spelling, or one of ours.

    The averaged weights where there are any; a position map is resized.  The first convolution and the classifier may
    have other shapes: timm adapts them afterwards.  Raises UserError, listing how, if anything else does not fit.
    """
    source, weights = next(iter(weights_in(state_dict, "checkpoint").values()))
    if source:
        logger.info(f"taking the weights '{source}'")
    own, by_timm = model.state_dict(), {f"{FIRST_CONV}.weight", f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"}
    weights = adapted(weights, {name: weight for name, weight in own.items() if name not in by_timm})
    fixed = {name: weight for name, weight in weights.items() if name not in by_timm}
    left = {name: weight for name, weight in own.items() if name in by_timm}
    wrong = {name: weights[name] for name in left.keys() & weights.keys() if difference(weights[name], left[name])}
    load_weights(model, fixed | left | wrong, "checkpoint")
    return weights


def _build(variant: str, pretrained: bool, output_stride: int | None = None, **options: Any) -> VSSM:
    if output_stride is not None:  # which decoders such as DeepLab's ask of an encoder
        given = VARIANTS[variant].options | options
        o = ModelOptions(**{name: given[name] for name in ("depths", "patch_size") if name in given})
        stride = o.patch_size * 2 ** (len(o.depths) - 1)
        if output_stride != stride:
            raise UserError(
                f"output_stride is {output_stride!r}; {variant} has no dilated stages, so its stride is {stride}"
            )
    known = inspect.signature(VSSM).parameters.keys() | TIMM_OPTIONS
    for option in options:
        if option not in known:
            raise unknown("model option", option, known)
    if pretrained and not options.get("cache_dir"):
        cfg = resolve_pretrained_cfg(variant, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay"))
        if cfg.url and not (cfg.file or cfg.state_dict or cfg.hf_hub_id or cfg.source):
            # To where timm looks before it would fetch the file without resuming or verifying.
            download(cfg.url, VARIANTS[variant].sha256 if cfg.url == VARIANTS[variant].weights else None)
    with torch.serialization.safe_globals(PICKLED):
        return build_model_with_cfg(
            partial(create_model, variant),
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=tuple(range(len(VARIANTS[variant].options["depths"]))), feature_cls="getter"),
            **options,
        )


# Each takes the options of `options.ModelOptions` and those of timm.
@register_model
def vmamba_tiny(pretrained: bool = False, **options: Any) -> VSSM:
    """VMamba-T (Vanilla-VMamba-T)."""
    return _build("vmamba_tiny", pretrained, **options)


@register_model
def vmamba_small(pretrained: bool = False, **options: Any) -> VSSM:
    """VMamba-S (Vanilla-VMamba-S)."""
    return _build("vmamba_small", pretrained, **options)


@register_model
def vmamba_base(pretrained: bool = False, **options: Any) -> VSSM:
    """VMamba-B (Vanilla-VMamba-B)."""
    return _build("vmamba_base", pretrained, **options)


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **options: Any) -> VSSM:
    """VMamba-T[s2l5]."""
    return _build("vmamba_tiny_s2l5", pretrained, **options)


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **options: Any) -> VSSM:
    """VMamba-S[s2l15]."""
    return _build("vmamba_small_s2l15", pretrained, **options)


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **options: Any) -> VSSM:
    """VMamba-B[s2l15]."""
    return _build("vmamba_base_s2l15", pretrained, **options)


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **options: Any) -> VSSM:
    """VMamba-T[s1l8]."""
    return _build("vmamba_tiny_s1l8", pretrained, **options)


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **options: Any) -> VSSM:
    """VMamba-S[s1l20]."""
    return _build("vmamba_small_s1l20", pretrained, **options)


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **options: Any) -> VSSM:
    """VMamba-B[s1l20]."""
    return _build("vmamba_base_s1l20", pretrained, **options)


@register_model
def vmamba_tiny_m2(pretrained: bool = False, **options: Any) -> VSSM:
    """Mamba2 tiny, not trained by its authors."""
    return _build("vmamba_tiny_m2", pretrained, **options)


@register_model
def vmamba_small_m2(pretrained: bool = False, **options: Any) -> VSSM:
    """Mamba2 small, not trained by its authors."""
    return _build("vmamba_small_m2", pretrained, **options)


@register_model
def vmamba_base_m2(pretrained: bool = False, **options: Any) -> VSSM:
    """Mamba2 base, not trained by its authors."""
    return _build("vmamba_base_m2", pretrained, **options)


@register_model
def vmamba_digits(pretrained: bool = False, **options: Any) -> VSSM:
    """The small model of configs/vmamba_digits.yaml."""
    return _build("vmamba_digits", pretrained, **options)
