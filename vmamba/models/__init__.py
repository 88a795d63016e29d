from vmamba.models.mamba1d import Mamba1D

__all__ = ["Mamba1D"]
