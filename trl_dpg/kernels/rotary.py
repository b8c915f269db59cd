"""
Rotary position embeddings of queries and keys, as one operation.

Every family of models in transformers has its own `apply_rotary_pos_emb`, in which the derivative of each slice is a
tensor of zeros with a copy in it. The embedding is linear, so all of its derivatives are embeddings again, or their
transposes.
"""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn
from torch.autograd import Function


class Rotary(Function):
    """
    y = x ∘ cos + R(x) ∘ sin with R(x₁, x₂) = (-x₂, x₁) for the halves of the last dimension, or its transpose
    x ∘ cos - R(x ∘ sin).
    """

    @staticmethod
    def forward(ctx, x, cos, sin, transposed):
        ctx.save_for_backward(cos, sin)
        ctx.transposed = transposed
        (x1, x2), (sin1, sin2) = x.chunk(2, -1), sin.chunk(2, -1)
        y = x * cos
        y1, y2 = y.chunk(2, -1)
        y1.addcmul_(x2, sin2 if transposed else sin1, value=1 if transposed else -1)
        y2.addcmul_(x1, sin1 if transposed else sin2, value=-1 if transposed else 1)
        return y

    @staticmethod
    def backward(ctx, y_bar):
        cos, sin = ctx.saved_tensors
        return Rotary.apply(y_bar, cos, sin, not ctx.transposed), None, None, None


def lean_rotary(model: nn.Module) -> dict[ModuleType, Callable]:
    """The code of the model's layers, where it has the usual `apply_rotary_pos_emb`; and another function for it."""
    found = {}
    names = {type(layer).__module__ for layer in model.modules()}
    for module in {sys.modules[name] for name in names if name in sys.modules}:
        function = vars(module).get("apply_rotary_pos_emb")
        if function is not None and _is_usual(function):
            found[module] = _replacement(function)
    return found


@torch.no_grad()
def _is_usual(function: Callable) -> bool:
    if list(inspect.signature(function).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    x, cos, sin = torch.linspace(-1, 2, 24).view(3, 1, 2, 4)
    query, key = function(x[None], 2 * x[None], cos, sin)
    expected = Rotary.apply(x[None], cos[None], sin[None], False)
    return torch.allclose(query, expected) and torch.allclose(key, 2 * expected)


def _replacement(function: Callable) -> Callable:
    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        # of a part of the dimensions, in another precision, or learned
        if cos.size(-1) != q.size(-1) or cos.dtype != q.dtype or cos.requires_grad:
            return function(q, k, cos, sin, unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return Rotary.apply(q, cos, sin, False), Rotary.apply(k, cos, sin, False)

    return apply_rotary_pos_emb
