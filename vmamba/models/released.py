"""The released VMamba and ours: constructor options, state-dict keys, both ways.

Released options are those of the original's `VSSM`; its `forward_type` is a base and postfixes in one string, which
here are separate options of `vmamba.VSSM`.  Its files spell their keys in two ways: as of January 2024, and later; ours
are the later ones.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from vmamba.errors import UserError, unknown
from vmamba.models.backbone import Backbone
from vmamba.models.options import ModelOptions
from vmamba.models.vssm import VSSM, resize_pos_embed
from vmamba.models.weights import is_image, is_plain, load_weights, unwrapped, without_wrappers
from vmamba.values import Takes
from vmamba_kernels import ROUTES

logger = logging.getLogger("vmamba")

# Released option -> ours.
RELEASED = {each.metadata["released"]: each for each in fields(ModelOptions) if each.metadata["released"]}
# Channels-last and -first LayerNorm are one computation; the first constructors took classes.
_NORM_LAYERS = {"ln": "ln", "ln2d": "ln", "bn": "bn", "layernorm": "ln", "layernorm2d": "ln", "batchnorm2d": "bn"}
_OLDER = {"d_state": "ssm_d_state", "dt_rank": "ssm_dt_rank", "attn_drop_rate": "ssm_drop_rate"}  # names of January
# What the original's constructors take besides, mmdetection's among them, and what says nothing about the model.
_ELSEWHERE = ("use_checkpoint", "ssm_rank_ratio", "type", "pretrained", "init_cfg", "out_indices")
_ELSEWHERE += ("depths_decoder", "dims_decoder")  # of January's, which did not read them

# forward_type: bases that are the selective scan along the four routes; some force float32 on it.
_FORCED_FLOAT32 = ("v0", "v0seq", "v01", "v02", "v03", "v1", "v2")
_ONE_WAY, _TWO_WAYS = {"routes": ("row",) * 4}, {"routes": ("row", "row", "row_rev", "row_rev")}
_BASES: dict[str, dict[str, Any]] = {
    **{base: {} for base in (*_FORCED_FLOAT32, "v04", "v05", "v3", "v4")},
    **{"v051d": _ONE_WAY, "v31d": _ONE_WAY, "v052d": _TWO_WAYS, "v32d": _TWO_WAYS},
    "m0": {"scan": "ssd"},
}
_ABLATIONS = ("v052dc", "v052d3", "v32dc")
_POSTFIXES = {
    postfix: {each.name: value}
    for each in fields(ModelOptions)
    for postfix, value in each.metadata["postfixes"].items()
}
# Until spring 2024 postfixes had no underscore, and those of the out-norm no "on" (v3noz, v2nozact, v05dwconv3).
_OLD_POSTFIXES = {postfix.removeprefix("on"): postfix for postfix in _POSTFIXES}
_OLD_POSTFIX = "|".join(sorted(_OLD_POSTFIXES, key=len, reverse=True))
_GLUED = re.compile(f"({'|'.join(sorted(_BASES, key=len, reverse=True))})((?:{_OLD_POSTFIX})+)")
_V0 = {"ssm_conv": 3, "ssm_conv_bias": True, "ssm_act": "silu", "ssm_init": "v0"}  # v0 ignores what is given for these


def options_from_released(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `vmamba.VSSM` for those of the released constructor; what is absent has the released default.

    Raises UserError for an option or value that is unknown, or a forward type that is not supported.
    """
    given = {}
    for name, value in options.items():
        if not isinstance(name, str):
            raise UserError(f"released option {name!r} is no name but a {type(name).__name__}; give names of options")
        later = _OLDER.get(name, name)
        if later in given:
            older = next(older for older, each in _OLDER.items() if each == later)
            raise UserError(f"released options {older} and {later} are names of one; give one of them")
        if name not in _ELSEWHERE:
            given[later] = value
    forward_type = given.pop("forward_type", "v2")
    if given.pop("drop_rate", 0):
        raise UserError(f"released option drop_rate is {options['drop_rate']!r}; dropout behind the stem is not here")
    if given.pop("ssm_simple_init", False):
        given["ssm_init"] = "v1"
    for name in given:
        if name not in RELEASED:
            raise unknown("released option", name, [*RELEASED, "forward_type"])
    for name in ("norm_layer", "ssm_act_layer", "mlp_act_layer"):
        if name in given:
            given[name] = getattr(given[name], "__name__", str(given[name])).lower()
    if "norm_layer" in given:
        if given["norm_layer"] not in _NORM_LAYERS:
            raise unknown("released norm_layer", given["norm_layer"], _NORM_LAYERS)
        given["norm_layer"] = _NORM_LAYERS[given["norm_layer"]]
    if str(given.get("ssm_dt_rank", "")).isdigit():
        given["ssm_dt_rank"] = int(given["ssm_dt_rank"])
    ours = {}
    for released, each in RELEASED.items():
        value = each.metadata["takes"].check(released, given.get(released, each.default))
        ours[each.name] = tuple(value) if isinstance(value, list) else value
    return ours | _options_of_forward_type(forward_type)


def _options_of_forward_type(forward_type: str) -> dict[str, Any]:
    if not isinstance(forward_type, str):
        raise UserError(f"forward_type is {forward_type!r}; expected a string such as 'v05_noz'")
    base, *postfixes = forward_type.split("_")
    if base.startswith(("xv", *_ABLATIONS)):
        raise UserError(f"forward_type '{forward_type}' is an ablation of the original that is not supported here")
    if base not in _BASES and (glued := _GLUED.fullmatch(base)):
        base = glued[1]
        postfixes += [_OLD_POSTFIXES[name] for name in re.findall(_OLD_POSTFIX, glued[2])]
    if base not in _BASES:
        raise unknown("forward_type", forward_type, _BASES)
    ours = {"scan_float32": base in _FORCED_FLOAT32, "routes": ROUTES} | _BASES[base]
    if base in ("v0", "v0seq"):
        if postfixes:
            raise UserError(f"forward_type '{forward_type}': '{base}' takes no postfix; 'v05' takes them all")
        return ours | _V0
    for postfix in postfixes:
        if postfix not in _POSTFIXES:
            raise UserError(f"forward_type '{forward_type}': {unknown('postfix', postfix, _POSTFIXES)}")
    out_norms = [postfix for postfix in postfixes if "out_norm" in _POSTFIXES[postfix]]
    if len(out_norms) > 1:
        raise UserError(f"forward_type '{forward_type}' names {len(out_norms)} out-norms; give one")
    for postfix in postfixes:
        ours |= _POSTFIXES[postfix]
    return ours


# January 2024 -> later.  What is behind a stage or block keeps its name.
_JANUARY = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^(norm|head)\.", r"classifier.\1."),
)
_OUT_NORM_CONV = re.compile(r"\.out_norm\.weight$")  # of v05_ondwconv3 until spring 2024
_LATER = (
    (r"^patch_embed\.0\.", "patch_embed.proj."),
    (r"^patch_embed\.2\.", "patch_embed.norm."),
    (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
    (r"\.op\.", ".self_attention."),
    (r"^classifier\.", ""),
)
_LINEAR = re.compile(r"\.(in_proj|out_proj|fc1|fc2|reduction|head)\.weight$")


def keys_from_released(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released weights under our names, from either spelling, wrapped or not; linear weights of (out, in, 1, 1) become
    (out, in)."""
    ours = {}
    for name, weight in without_wrappers(state_dict).items():
        for pattern, replacement in _JANUARY:
            name = re.sub(pattern, replacement, name)
        if weight.dim() == 4 and (is_plain(weight) or weight.is_meta):
            name = _OUT_NORM_CONV.sub(".out_norm.1.weight", name)
            weight = weight.flatten(1) if _LINEAR.search(name) else weight
        ours[name] = weight
    return ours


def to_released(model: nn.Module, *, january: bool = False) -> dict[str, Tensor]:
    """The state dict of a `VSSM` or `Backbone`, wrapped or not, as the original writes and loads it.

    Args:
        january: in the spelling of January 2024, which exists for models of that time (`vmamba_tiny`, ...) only.

    Raises UserError for another model, and when `january` is asked for and the model has parts that time had no name
    for.
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(model, (VSSM, Backbone)):
        raise UserError(f"to_released takes a VSSM or a Backbone; this is a {type(model).__name__}")
    weights = {name.removeprefix("model."): weight for name, weight in without_wrappers(model.state_dict()).items()}
    if not january:
        return weights
    later = [name for name in weights if re.search(r"\.mlp\.|^patch_embed\.[3-9]|downsample\.\d|^pos_embed", name)]
    if later:
        raise UserError(f"'{later[0]}' has no name in files of January 2024; write the later spelling")
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in _LATER:
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    return renamed


def from_released(
    options: Mapping[str, Any], state_dict: Mapping[str, Tensor], features: Sequence[int] | None = None
) -> VSSM | Backbone:
    """A model with the released options and weights, in eval mode.

    Args:
        options: of the released `VSSM` or of its backbone for mmdetection, under its names of any time; absent ones
            have its defaults, or January's where the weights show its blocks without MLP or its downsampling.  What is
            no part of the model (`type`, `pretrained`, ...) says nothing.
        state_dict: released weights in either spelling, of a wrapped model or not, such as
            `vmamba.load_checkpoint(path).state_dict`; for a backbone a classifier may be there or not.
        features: None for a classifier, `model(x)` -> logits, unless the options have `out_indices`; stages counted
            from 0 for a backbone, whose call gives the list of their normed outputs, (batch, channels, height, width).
            The `outnorm*` weights of these stages are used where the state dict has any; else the norms are as
            initialised.

    Raises UserError for unknown options, and for weights that do not fit, listing how.
    """
    for name, given in (("options", options), ("state_dict", state_dict)):
        if not isinstance(given, Mapping):
            raise UserError(f"{name} is {given!r:.60}; expected a mapping (vmamba.load_checkpoint(path) reads a file)")
    for name, weight in state_dict.items():
        if not isinstance(name, str):
            raise UserError(f"state_dict holds the name {name!r}, a {type(name).__name__}; expected names of weights")
        if not isinstance(weight, Tensor):
            kind = type(weight).__name__
            raise UserError(
                f"state_dict holds '{name}', a {kind} and no tensor; vmamba.load_checkpoint(path) reads a file"
            )
    recompute = Takes((bool,)).check("use_checkpoint", options.get("use_checkpoint", False))
    weights = keys_from_released(state_dict)
    shown = {name: value for name, value in _januarys(weights).items() if name not in options}
    if shown:
        logger.info(f"the options leave out what the weights show to be as in January 2024: {shown}")
    model = VSSM(**options_from_released(shown | dict(options)))
    model.set_grad_checkpointing(recompute)
    features = options.get("out_indices") if features is None else features
    if model.pos_embed is not None and "pos_embed" in weights and is_image(weights["pos_embed"]):
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], model.pos_embed.shape[2:])
    if features is None:
        load_weights(model, weights, "the state dict")
        return model.eval()
    model.pos_embed = None  # the released backbone leaves the position map out, also where its files hold one
    backbone = Backbone(model, features)
    load_weights(backbone, backbone_weights(backbone, weights), "the state dict")
    return backbone.eval()


def _januarys(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the constructor of January 2024 had otherwise than the later ones, without an option for it, as far as
    weights under our names show it."""
    shown: dict[str, Any] = {}
    if any(".blocks." in name for name in weights) and not any(".mlp." in name for name in weights):
        shown["mlp_ratio"] = 0.0
    if any(name.endswith(".downsample.reduction.weight") for name in weights):
        shown["downsample_version"] = "v1"
    return shown


def backbone_weights(backbone: Backbone, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a whole model under our names, as a backbone's: without what it dropped, with the norms of its chosen
    stages, which stay as they are where `weights` has none at all."""
    norms = {name: weight for name, weight in backbone.state_dict().items() if name.startswith("outnorm")}
    given = {name: weight for name, weight in weights.items() if name.startswith("outnorm")}
    chosen = tuple(f"outnorm{stage}." for stage in backbone.out_indices)
    kept = {name: weight for name, weight in given.items() if name.startswith(chosen)}
    left_out = ("outnorm", "classifier.", *_pruned(backbone))
    left_out += ("pos_embed",) if backbone.model.pos_embed is None else ()
    rest = {f"model.{name}": weight for name, weight in weights.items() if not name.startswith(left_out)}
    return rest | (kept if given else norms)


def _pruned(backbone: Backbone) -> tuple[str, ...]:
    """How the names begin of what a backbone dropped behind its last chosen stage."""
    last = max(backbone.out_indices)
    behind = tuple(f"layers.{stage}." for stage in range(last + 1, backbone.stages))
    return (f"layers.{last}.downsample.", *behind) if behind else ()
