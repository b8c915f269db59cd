"""Old import path of `trl_dpg.kernels`."""

from ..kernels import TwiceDifferentiable
from ..kernels.blocks import BLOCK


__all__ = ["BLOCK", "TwiceDifferentiable"]
