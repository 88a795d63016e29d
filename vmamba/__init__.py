"""VMamba: visual state-space models, their training and their pictures.

model = vmamba.create_model("vmamba_tiny", num_classes=10)
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import vmamba.models.timm_models
import vmamba.models.vim  # noqa: F401  (registers Vim with timm)
from vmamba.detection.models import create_detector, detector_from_released, load_detector
from vmamba.errors import UserError
from vmamba.exporting import export
from vmamba.extensions import register_dataset, register_loss
from vmamba.models.backbone import Backbone
from vmamba.models.flops import flops
from vmamba.models.pretrained import load_checkpoint
from vmamba.models.released import from_released, to_released
from vmamba.models.ss2d import SS2D
from vmamba.models.variants import create_model, list_models
from vmamba.models.vssm import VSSM, Block
from vmamba.segmentation.models import create_segmenter, load_segmenter, segmenter_from_released

try:
    __version__ = version("vmamba")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"

_LAZY = {  # imported when first asked for, with the libraries of the pictures: name -> where, what
    "build_transform": ("vmamba.analysis.prediction", "image_transform"),
    "load_program": ("vmamba.exporting.loading", "load_program"),
    "load_model": ("vmamba.analysis.prediction", "load_model"),
    "predict": ("vmamba.analysis.prediction", "predict_images"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = _LAZY[name]
    return getattr(import_module(module), function)


__all__ = [
    "SS2D",
    "VSSM",
    "Backbone",
    "Block",
    "UserError",
    "build_transform",
    "create_detector",
    "create_model",
    "create_segmenter",
    "detector_from_released",
    "export",
    "flops",
    "from_released",
    "list_models",
    "load_checkpoint",
    "load_detector",
    "load_model",
    "load_program",
    "load_segmenter",
    "predict",
    "register_dataset",
    "register_loss",
    "segmenter_from_released",
    "to_released",
]
