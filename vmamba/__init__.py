"""VMamba: visual state-space models, their training and their pictures.

import vmamba
model = vmamba.create_model("vmamba_tiny", num_classes=10)
"""

from vmamba.errors import UserError
from vmamba.models.variants import create_model, list_models
from vmamba.models.vssm import VSSM

__all__ = ["VSSM", "UserError", "create_model", "list_models"]
