"""Old import path of `trl_dpg.kernels.layers`."""

from ..kernels.layers import lean_layers


__all__ = ["lean_layers"]
