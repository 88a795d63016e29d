"""VMamba: visual state-space models, their training and their pictures.

model = vmamba.create_model("vmamba_tiny", num_classes=10)
"""

import vmamba.models.timm_models  # noqa: F401  (registers every variant with timm)
from vmamba.errors import UserError
from vmamba.models.backbone import Backbone
from vmamba.models.pretrained import load_checkpoint
from vmamba.models.released import from_released, to_released
from vmamba.models.variants import create_model, list_models
from vmamba.models.vssm import VSSM

__all__ = [
    "VSSM",
    "Backbone",
    "UserError",
    "create_model",
    "from_released",
    "list_models",
    "load_checkpoint",
    "to_released",
]
