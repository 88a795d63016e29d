"""VSSM as the backbone of detectors and segmenters: the normed outputs of chosen stages."""

from collections.abc import Sequence
from operator import index

from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.models.layers import norm_layer, on_channels_last
from vmamba.models.vssm import VSSM
from vmamba.models.weights import unwrapped


class Backbone(nn.Module):
    """The outputs of chosen stages, before their downsampling, each behind a norm of its own (`outnorm0`, ...).

    Every part has a use: what lies behind the last chosen stage is dropped.

    Args:
        model: whose stem and stages are taken.  It is the backbone's from then on, without its classifier.
        out_indices: stages, each once, in the order wanted of the outputs; counted from 0, or from -1 backwards.

    Raises UserError for other indices, for another model, and for one that a backbone has taken already.
    """

    def __init__(self, model: VSSM, out_indices: Sequence[int] = (0, 1, 2, 3)):
        super().__init__()
        if not isinstance(model, VSSM):
            inside = isinstance(model, nn.Module) and isinstance(unwrapped(model), VSSM)
            remedy = "give the VSSM inside of it" if inside else "give what vmamba.create_model(name) gives"
            raise UserError(f"a Backbone takes a VSSM, and this is a {type(model).__name__}; {remedy}")
        if model.classifier is None:
            raise UserError("a Backbone has taken this model already; create a model for each")
        self.stages = len(model.layers)  # before those behind the last chosen one go
        self.out_indices = _chosen(out_indices, self.stages)
        self.channels = [model.dims[stage] for stage in self.out_indices]
        self.strides = [model.patch_size * 2**stage for stage in self.out_indices]
        model.prune_intermediate_layers(list(self.out_indices))
        model.classifier = None
        self.model = model
        for stage in self.out_indices:
            self.add_module(f"outnorm{stage}", norm_layer(model.norm_layer)(model.dims[stage], keep_float32=True))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> for each chosen stage (B, dim, H', W')."""
        outputs = self.model.forward_intermediates(
            images, list(self.out_indices), stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        output_of = dict(zip(sorted(self.out_indices), outputs, strict=True))
        return [
            on_channels_last(getattr(self, f"outnorm{stage}"), output_of[stage]).permute(0, 3, 1, 2)
            for stage in self.out_indices
        ]


def _chosen(out_indices: Sequence[int], stages: int) -> tuple[int, ...]:
    """`out_indices` counted from 0."""
    try:
        given = [index(stage) for stage in out_indices]
    except TypeError:
        raise UserError(f"out_indices is {out_indices!r}; expected a list of stages such as [0, 1, 2, 3]") from None
    for stage in given:
        if not -stages <= stage < stages:
            raise UserError(f"stage {stage} does not exist; the model's stages are 0 to {stages - 1}")
    chosen = tuple(stage % stages for stage in given)
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"out_indices is {given}; name at least one stage, and each only once")
    return chosen
