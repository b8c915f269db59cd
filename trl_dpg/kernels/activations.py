"""SiLU and RMSNorm. Their second derivatives in autograd take about twenty elementwise passes; here they take few."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import blocks


class SiLU(Function):
    """y = x σ(x)"""

    @staticmethod
    def forward(ctx, x, through_theta):
        ctx.save_for_backward(x)
        ctx.through_theta = through_theta
        return F.silu(x)

    @staticmethod
    def backward(ctx, y_bar):
        (x,) = ctx.saved_tensors
        return _SiLUBackward.apply(y_bar, x, ctx.through_theta), None


class _SiLUBackward(Function):
    """x̄ = ȳ f'(x) with f'(x) = σ (1 + x (1 - σ))"""

    @staticmethod
    def forward(ctx, y_bar, x, through_theta):
        ctx.save_for_backward(y_bar, x)
        ctx.through_theta = through_theta
        return torch.ops.aten.silu_backward(y_bar, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        """f''(x) = σ (1 - σ) (2 + x (1 - 2σ))"""
        y_bar, x = ctx.saved_tensors
        to_y_bar = torch.ops.aten.silu_backward(cotangent, x)
        if not ctx.through_theta:
            return to_y_bar, None, None
        to_x = torch.empty_like(x, memory_format=torch.contiguous_format)  # written through flat views
        flat = (tensor.reshape(-1).split(blocks.BLOCK) for tensor in (x, y_bar, cotangent, to_x))
        for x, y_bar, cotangent, out in zip(*flat, strict=True):
            sigmoid = torch.sigmoid(x)
            torch.mul(sigmoid, -2, out=out).add_(1).mul_(x).add_(2).mul_(y_bar).mul_(cotangent).mul_(sigmoid)
            out.mul_(sigmoid.neg_().add_(1))
        return to_y_bar, to_x, None


class RMSNorm(Function):
    """y = w ∘ n with n = r x and r = (mean(x²) + eps)^(-1/2) over the last dimension; n in float32 or float64"""

    @staticmethod
    def forward(ctx, x, weight, eps, through_theta):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.through_theta = eps, through_theta
        return weight * _normalized(x, eps)[0].to(x.dtype)

    @staticmethod
    def backward(ctx, y_bar):
        return *_RMSNormBackward.apply(*ctx.saved_tensors, y_bar, ctx.eps, ctx.through_theta), None, None


def _normalized(x, eps):
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.linalg.vecdot(x, x).div_(x.size(-1)).add_(eps).rsqrt_().unsqueeze(-1)
    return x * r, r


def _mean(a, b):
    return torch.linalg.vecdot(a, b).div_(a.size(-1)).unsqueeze(-1)


class _RMSNormBackward(Function):
    """x̄ = r (c - n mean(n ∘ c)) with c = w ∘ ȳ, and w̄ = Σ ȳ ∘ n"""

    @staticmethod
    def forward(ctx, x, weight, y_bar, eps, through_theta):
        ctx.save_for_backward(x, weight, y_bar)
        ctx.eps, ctx.through_theta = eps, through_theta
        n, r = _normalized(x, eps)
        c = weight * y_bar
        x_bar = torch.addcmul(c, n, _mean(n, c.to(n.dtype)), value=-1).mul_(r)
        weight_bar = n.mul_(y_bar).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return x_bar.to(x.dtype), weight_bar

    @staticmethod
    @once_differentiable
    def backward(ctx, a, a_weight):
        """
        The derivative of n along a is ṅ = r (a - n mean(n ∘ a)). The cotangent of ȳ is w ∘ ṅ + a_w ∘ n. With
        m_c = mean(n ∘ c), m_a = mean(n ∘ a) and m_ca = mean(c ∘ a), the gradient of ⟨c, ṅ⟩ in x is
        r² (n (3 m_c m_a - m_ca) - m_a c - m_c a).
        """
        x, weight, y_bar = ctx.saved_tensors
        n, r = _normalized(x, ctx.eps)
        a = a.to(n.dtype)
        m_a = _mean(n, a)
        n_dot = torch.addcmul(a, n, m_a, value=-1).mul_(r)
        to_y_bar = weight * n_dot
        if ctx.needs_input_grad[1]:
            to_y_bar.addcmul_(n, a_weight)
        if not ctx.through_theta:
            return None, None, to_y_bar.to(y_bar.dtype), None, None
        c = (weight * y_bar).to(n.dtype)
        m_c = _mean(n, c)
        to_x = (n * (3 * m_c * m_a - _mean(c, a))).addcmul_(c, m_a, value=-1).addcmul_(a, m_c, value=-1).mul_(r * r)
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = n_dot.mul_(y_bar).flatten(0, -2).sum(0).to(weight.dtype)
            # ⟨a_w ∘ ȳ, n⟩ in x
            b = (a_weight * y_bar).to(n.dtype)
            to_x += b.addcmul_(n, _mean(n, b), value=-1).mul_(r)
        return to_x.to(x.dtype), to_weight, to_y_bar.to(y_bar.dtype), None, None
