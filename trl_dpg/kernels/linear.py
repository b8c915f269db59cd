"""
The linear layer in the reverse sweep.

In the reverse sweep, the gradient g_t is known already and only its graph is needed. So the values of weight gradients
are not computed. This saves a third of the work of a backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Linear(Function):
    """Y = X Wᵀ + b"""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, y_bar):
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        x_bar = y_bar @ weight if needs_x else None
        bias_bar = y_bar.flatten(0, -2).sum(0) if needs_bias else None
        if torch.is_grad_enabled():  # a graph is being built, so this is the first derivative g_t
            weight_bar = _WeightGradient.apply(y_bar, x, weight)
        else:
            weight_bar = y_bar.flatten(0, -2).mT @ x.flatten(0, -2)
        return x_bar, weight_bar, bias_bar


class _WeightGradient(Function):
    """W̄ = Ȳᵀ X. Its value is not computed: the result is zeros, which can be differentiated."""

    @staticmethod
    def forward(ctx, y_bar, x, weight):
        ctx.save_for_backward(y_bar, x)
        return weight.new_zeros(()).expand_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        y_bar, x = ctx.saved_tensors
        to_x = y_bar @ cotangent if ctx.needs_input_grad[1] else None
        return x @ cotangent.mT, to_x, None


def is_parameter(weight: Tensor) -> bool:
    """Whether a weight is a trained parameter, or the cast of one. Other functions of parameters do not count."""
    if weight.grad_fn is None:
        return weight.requires_grad
    (source, _), *others = weight.grad_fn.next_functions
    return "ToCopy" in weight.grad_fn.name() and not others and source is not None and "Accumulate" in source.name()
