"""The released VMamba and ours: constructor options, state-dict keys, both ways.

Released options are those of the original's `VSSM`; its `forward_type` is a base and postfixes in one string, which
here are separate options of `vmamba.VSSM`.  Its files spell their keys in two ways: as of January 2024, and later; ours
are the later ones.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from vmamba.errors import UserError, unknown
from vmamba.models.backbone import Backbone
from vmamba.models.options import ModelOptions
from vmamba.models.vssm import VSSM, resize_pos_embed
from vmamba.models.weights import load_weights
from vmamba_kernels import ROUTES

# Released option -> ours.
RELEASED = {each.metadata["released"]: each for each in fields(ModelOptions) if each.metadata["released"]}
_NORM_LAYERS = {"ln": "ln", "ln2d": "ln", "bn": "bn"}  # channels-last and -first LayerNorm are one computation

# forward_type: bases that are the selective scan along the four routes; those of v0's time force float32 on it.
_FORCED_FLOAT32 = ("v0", "v0seq", "v01", "v2", "v3")
_BASES: dict[str, dict[str, Any]] = {
    **{base: {} for base in (*_FORCED_FLOAT32, "v02", "v03", "v04", "v05")},
    "v051d": {"routes": ("row",) * 4},
    "v052d": {"routes": ("row", "row", "row_rev", "row_rev")},
    "m0": {"scan": "ssd"},
}
_POSTFIXES = {
    postfix: {each.name: value}
    for each in fields(ModelOptions)
    for postfix, value in each.metadata["postfixes"].items()
}
_V0 = {"ssm_conv": 3, "ssm_conv_bias": True, "ssm_act": "silu", "ssm_init": "v0"}  # v0 ignores what is given for these


def options_from_released(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `vmamba.VSSM` for those of the released constructor; what is absent has the released default.

    Raises UserError for an option or value that is unknown, or a forward type that is not supported.
    """
    given = dict(options)
    forward_type = given.pop("forward_type", "v2")
    for name in given:
        if name not in RELEASED:
            raise unknown("released option", name, [*RELEASED, "forward_type"])
    if "norm_layer" in given:
        norm = str(given["norm_layer"]).lower()
        if norm not in _NORM_LAYERS:
            raise unknown("released norm_layer", norm, _NORM_LAYERS)
        given["norm_layer"] = _NORM_LAYERS[norm]
    for name in ("ssm_act_layer", "mlp_act_layer"):
        if name in given:
            given[name] = str(given[name]).lower()
    ours = {}
    for released, each in RELEASED.items():
        value = each.metadata["takes"].check(released, given.get(released, each.default))
        ours[each.name] = tuple(value) if isinstance(value, list) else value
    return ours | _options_of_forward_type(forward_type)


def _options_of_forward_type(forward_type: str) -> dict[str, Any]:
    if not isinstance(forward_type, str):
        raise UserError(f"forward_type is {forward_type!r}; expected a string such as 'v05_noz'")
    base, *postfixes = forward_type.split("_")
    if base == "v052dc" or base.startswith("xv"):
        raise UserError(f"forward_type '{forward_type}' is an ablation of the original that is not supported here")
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
_LATER = (
    (r"^patch_embed\.0\.", "patch_embed.proj."),
    (r"^patch_embed\.2\.", "patch_embed.norm."),
    (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
    (r"\.op\.", ".self_attention."),
    (r"^classifier\.", ""),
)
_LINEAR = re.compile(r"\.(in_proj|out_proj|fc1|fc2|reduction|head)\.weight$")


def keys_from_released(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released weights under our names, from either spelling; linear weights of (out, in, 1, 1) become (out, in)."""
    ours = {}
    for name, weight in state_dict.items():
        for pattern, replacement in _JANUARY:
            name = re.sub(pattern, replacement, name)
        linear = weight.dim() == 4 and _LINEAR.search(name)
        ours[name] = weight.flatten(1) if linear else weight
    return ours


def to_released(model: nn.Module, *, january: bool = False) -> dict[str, Tensor]:
    """The state dict of a `VSSM` or `Backbone` as the original writes and loads it.

    Args:
        january: in the spelling of January 2024, which exists for models of that time (`vmamba_tiny`, ...) only.

    Raises UserError when `january` is asked for and the model has parts that time had no name for.
    """
    weights = {name.removeprefix("model."): weight for name, weight in model.state_dict().items()}
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
        options: of the released `VSSM`, under its names; absent ones have its defaults.
        state_dict: released weights in either spelling, such as `vmamba.load_checkpoint(path).state_dict`; for a
            backbone a classifier may be there or not.
        features: None for a classifier, `model(x)` -> logits; stages counted from 0 for a backbone, whose call gives
            the list of their normed outputs, (batch, channels, height, width).  The `outnorm*` weights of these
            stages are used where the state dict has any; else the norms are as initialised.

    Raises UserError for unknown options, and for weights that do not fit, listing how.
    """
    for name, given in (("options", options), ("state_dict", state_dict)):
        if not isinstance(given, Mapping):
            raise UserError(f"{name} is {given!r:.60}; expected a mapping (vmamba.load_checkpoint(path) reads a file)")
    for name, weight in state_dict.items():
        if not isinstance(weight, Tensor):
            kind = type(weight).__name__
            raise UserError(
                f"state_dict holds '{name}', a {kind} and no tensor; vmamba.load_checkpoint(path) reads a file"
            )
    model = VSSM(**options_from_released(options))
    weights = keys_from_released(state_dict)
    if model.pos_embed is not None and "pos_embed" in weights:
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], model.pos_embed.shape[2:])
    if features is None:
        load_weights(model, weights, "the state dict")
        return model.eval()
    model.pos_embed = None  # the released backbone leaves the position map out, also where its files hold one
    backbone = Backbone(model, features)
    load_weights(backbone, backbone_weights(backbone, weights), "the state dict")
    return backbone.eval()


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
