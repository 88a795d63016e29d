"""VSSM as the backbone of detectors and segmenters: the normed outputs of chosen stages."""

from collections.abc import Sequence

from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.models.vssm import VSSM


class Backbone(nn.Module):
    """The outputs of chosen stages, before their downsampling, each behind a norm of its own (`outnorm0`, ...).

    Args:
        model: whose stem and stages are taken; its classifier is dropped.
        out_indices: stages, counted from 0.
    """

    def __init__(self, model: VSSM, out_indices: Sequence[int] = (0, 1, 2, 3)):
        super().__init__()
        stages = len(model.layers)
        for index in out_indices:
            if not 0 <= index < stages:
                raise UserError(f"stage {index} does not exist; the model's stages are 0 to {stages - 1}")
        norm = type(model.classifier.norm)
        self.out_indices = tuple(out_indices)
        self.channels = [model.dims[index] for index in self.out_indices]
        self.strides = [model.patch_size * 2**index for index in self.out_indices]
        model.classifier = nn.Identity()
        self.model = model
        for index in self.out_indices:
            self.add_module(f"outnorm{index}", norm(model.dims[index], keep_float32=True))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> for each chosen stage (B, dim, H', W')."""
        outputs = self.model.forward_intermediates(
            images, list(self.out_indices), stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        return [
            getattr(self, f"outnorm{index}")(output).permute(0, 3, 1, 2)
            for index, output in zip(self.out_indices, outputs, strict=True)
        ]
