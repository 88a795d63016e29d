"""The backbone for those who stay with mmdetection and mmsegmentation: `custom_imports = dict(imports=[
"vmamba.models.mm_vssm"])` in a config registers MM_VSSM, under the name and with the options of the released code, with
mmengine, or with its living fork, which has the same name.  It reads and writes the released files' own names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from vmamba.errors import UserError, unknown
from vmamba.models.backbone import Backbone
from vmamba.models.pretrained import load_pretrained, open_checkpoint
from vmamba.models.released import options_from_released
from vmamba.models.vssm import VSSM
from vmamba.values import Takes

_OURS = ("backbone.model.", "backbone.")  # in front of our names: of stem and stages, of the norms of the outputs


@MODELS.register_module()
class MM_VSSM(nn.Module):
    """The released backbone of the detectors and segmenters.

    Args:
        out_indices: stages whose normed outputs it gives.
        pretrained: file or address of weights to start from.
        init_cfg: the same in mmengine's words: dict(type="Pretrained", checkpoint=file or address), and prefix="..."
            of the weights in it where that is not `backbone`.
        use_checkpoint: recompute blocks in the backward pass instead of keeping them.
        options: of the released constructor, under its names; absent ones have its defaults.

    Raises UserError for unknown options and other kinds of init_cfg, and, when they are loaded, for weights that do not
    fit.
    """

    def __init__(
        self,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | None = None,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        use_checkpoint: bool = False,
        **options: Any,
    ):
        super().__init__()
        model = VSSM(**options_from_released(options))
        model.pos_embed = None  # which the released backbone leaves out, also where its files hold one
        self.backbone = Backbone(model, out_indices)
        self.backbone.model.set_grad_checkpointing(Takes((bool,)).check("use_checkpoint", use_checkpoint))
        self.pretrained, self.prefix = pretrained, ""
        if init_cfg:
            if pretrained:
                raise UserError("MM_VSSM has both pretrained and init_cfg; give one of them")
            self.pretrained, self.prefix = _read(init_cfg)
        self.register_state_dict_post_hook(_to_released)
        self.register_load_state_dict_pre_hook(_from_released)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> for each chosen stage (B, dim, H', W')."""
        return self.backbone(images)

    def init_weights(self) -> None:
        """Called by mmengine's runner before training."""
        if not self.pretrained:
            return
        checkpoint = open_checkpoint(self.pretrained)
        if self.prefix:
            start = f"{self.prefix.removesuffix('.')}."
            weights = {
                name.removeprefix(start): weight for name, weight in checkpoint.whole.items() if name.startswith(start)
            }
            if not weights:
                raise UserError(f"'{self.pretrained}' has no weights under the prefix '{self.prefix}' of init_cfg")
            checkpoint = replace(checkpoint, whole=weights)
        load_pretrained(self.backbone, checkpoint)


def _read(init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The file or address in it, and the prefix, "" where there is none."""
    (each, *others) = [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg
    if others or each.get("type") != "Pretrained" or not each.get("checkpoint"):
        raise UserError(
            f"MM_VSSM has init_cfg {init_cfg!r:.80}; its weights start as the original's do, or with "
            f"dict(type='Pretrained', checkpoint=...) from a file"
        )
    for name in each:
        if name not in ("type", "checkpoint", "prefix", "map_location"):  # weights are read on the CPU in any case
            raise unknown("option of init_cfg", name, ("checkpoint", "prefix"))
    return each["checkpoint"], each.get("prefix") or ""


def _to_released(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        released = name.removeprefix(prefix)
        for ours in _OURS:
            released = released.removeprefix(ours)
        state_dict[prefix + released] = state_dict.pop(name)


def _from_released(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        released = name.removeprefix(prefix)
        if released == "pos_embed":
            del state_dict[name]
            continue
        ours = _OURS[1] if released.startswith("outnorm") else _OURS[0]
        state_dict[f"{prefix}{ours}{released}"] = state_dict.pop(name)
