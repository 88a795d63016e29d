"""The backbone for those who stay with mmdetection and mmsegmentation: `custom_imports = dict(imports=[
"vmamba.models.mm_vssm"])` in a config registers MM_VSSM, under the name and with the options of the released code, with
mmengine, or with its living fork, which has the same name.  It reads and writes the released files' own names.
"""

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from vmamba.models.backbone import Backbone
from vmamba.models.pretrained import load_checkpoint, load_pretrained
from vmamba.models.released import options_from_released
from vmamba.models.vssm import VSSM

_OURS = ("backbone.model.", "backbone.")  # in front of our names: of stem and stages, of the norms of the outputs


@MODELS.register_module()
class MM_VSSM(nn.Module):
    """The released backbone of the detectors and segmenters.

    Args:
        out_indices: stages whose normed outputs it gives.
        pretrained: file or address of weights to start from.
        options: of the released constructor, under its names; absent ones have its defaults.

    Raises UserError for unknown options, and for weights that do not fit.
    """

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), pretrained: str | None = None, **options: Any):
        super().__init__()
        self.backbone = Backbone(VSSM(**options_from_released(options)), out_indices)
        self.pretrained = pretrained
        self.register_state_dict_post_hook(_to_released)
        self.register_load_state_dict_pre_hook(_from_released)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> for each chosen stage (B, dim, H', W')."""
        return self.backbone(images)

    def init_weights(self) -> None:
        """Called by mmengine's runner before training."""
        if self.pretrained:
            load_pretrained(self.backbone, load_checkpoint(self.pretrained))


def _to_released(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        released = name.removeprefix(prefix)
        for ours in _OURS:
            released = released.removeprefix(ours)
        state_dict[prefix + released] = state_dict.pop(name)


def _from_released(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        released = name.removeprefix(prefix)
        ours = _OURS[1] if released.startswith("outnorm") else _OURS[0]
        state_dict[f"{prefix}{ours}{released}"] = state_dict.pop(name)
