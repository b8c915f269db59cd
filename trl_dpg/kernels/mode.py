"""The mode in which a student runs in the sweeps. It replaces some operations by the kernels of this folder."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .activations import RMSNorm, SiLU
from .attention import attention
from .linear import Linear, is_parameter


class TwiceDifferentiable(TorchFunctionMode):
    """
    Runs `silu`, `rms_norm`, `scaled_dot_product_attention` and (with `skip_values`) `linear` and `addmm` by the
    kernels of this folder. Dropout must be off.

    Args:
        through_theta (`bool`):
            Whether the gradient will be differentiated in the parameters as well as in the token weights.
        skip_values (`bool`):
            Do not compute the values of weight gradients. These gradients can then only be differentiated.
    """

    def __init__(self, through_theta: bool, skip_values: bool):
        super().__init__()
        self.through_theta = through_theta
        self.skip_values = skip_values

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.silu:
            return SiLU.apply(args[0], self.through_theta)
        if function is F.rms_norm and _over_last_dimension(kwargs["weight"], kwargs["eps"]):
            return RMSNorm.apply(args[0], kwargs["weight"], kwargs["eps"], self.through_theta)
        if function is F.scaled_dot_product_attention and args[0].dim() == 4:
            return attention(self.through_theta, *args, **kwargs)
        if self.skip_values and function is F.linear and not kwargs and is_parameter(args[1]):
            return Linear.apply(*args, *[None] * (3 - len(args)))
        if (
            self.skip_values
            and function is torch.addmm
            and not kwargs
            and args[0].dim() == 1
            and is_parameter(args[2])
        ):
            return Linear.apply(args[1], args[2].mT, args[0])  # the linear layer of GPT-2
        return function(*args, **kwargs)


def _over_last_dimension(weight: Tensor | None, eps: float | None) -> bool:
    return weight is not None and weight.dim() == 1 and eps is not None
