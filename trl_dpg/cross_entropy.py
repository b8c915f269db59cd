"""Old import path of `trl_dpg.kernels.cross_entropy`."""

from .kernels.cross_entropy import chunk_elements, linear_cross_entropy


__all__ = ["chunk_elements", "linear_cross_entropy"]
