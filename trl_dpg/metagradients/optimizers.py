"""Optimizers as pure functions, each with its vector-Jacobian product (VJP) in closed form.

An optimizer step is a function `U` of the gradient, the optimizer's state and the parameters,

    (θ', s') = U(g, s, θ),

and the reverse sweep needs its VJP, which maps the cotangents of `(θ', s')` to those of `(g, s, θ)`. Both are
elementwise and are written out here, so autograd builds no graph over an optimizer state. Parameters, gradients and
moments are flat tensors of shape `[P]`, one for all trainable parameters. Cotangents have a row for each of M metrics,
`[M, P]`, or the shape `[P]`. All are processed block by block: the intermediate results of a formula stay in the
cache, so that each step takes about the time of reading its inputs once.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors `[P]` and `[M, P]` along P into pieces that fit into a cache. The pieces are views."""
    rows = max(tensor.numel() // tensor.size(-1) for tensor in tensors)
    size = max(1, (1 << 24 if tensors[0].is_cuda else 1 << 19) // rows)
    return zip(*(tensor.split(size, dim=-1) for tensor in tensors), strict=True)


class Optimizer(NamedTuple):
    """
    An optimizer as three functions over flat tensors of shape `[P]` and, for cotangents, `[M, P]`.

    Attributes:
        init (`Callable`):
            `init(theta) -> state`.
        update (`Callable`):
            `update(gradient, state, theta, lr) -> (theta, state)`: one step. It does not change its inputs.
        vjp (`Callable`):
            `vjp(gradient, state, next_state, lr, theta_bar, state_bar, out) -> state_bar`: maps the cotangents of a
            step's results to those of its inputs. `state` and `next_state` are the states before and after the step;
            `state_bar` has the type of the state. The gradient's cotangent is written to `out`, which may be
            `gradient` itself if it has the same shape. The other cotangents replace `theta_bar` and `state_bar` in
            place. If only the gradient's is wanted, and `state_bar` is zero, it may be `None`; then `out` may also be
            `theta_bar`.
    """

    init: Callable
    update: Callable
    vjp: Callable


class AdamWState(NamedTuple):
    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor


def adamw(betas: tuple[float, float], eps: float, eps_root: float, weight_decay: float) -> Optimizer:
    """
    AdamW (Loshchilov & Hutter, arXiv 1711.05101) as in `torch.optim.AdamW`, with `eps_root` inside the square root.

        m' = β₁ m + (1 - β₁) g              m̂ = m' / (1 - β₁ᵗ)
        v' = β₂ v + (1 - β₂) g²             v̂ = v' / (1 - β₂ᵗ)
        θ' = θ - lr · (m̂ / (√(v̂ + eps_root) + eps) + weight_decay · θ)

    With `eps_root = 0` Adam's first step is close to `sign(g)`, whose derivative is zero nearly everywhere. `eps_root`
    makes training smooth in the data weights (Engstrom et al., arXiv 2503.13751, sec. 4).
    """
    beta1, beta2 = betas

    def init(theta):
        return AdamWState(0, torch.zeros_like(theta), torch.zeros_like(theta))

    def update(gradient, state, theta, lr):
        step = state.step + 1
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        next_theta, exp_avg, exp_avg_sq = (torch.empty_like(theta) for _ in range(3))
        pieces = blocks(gradient, state.exp_avg, state.exp_avg_sq, theta, exp_avg, exp_avg_sq, next_theta)
        for g, m, v, x, next_m, next_v, next_x in pieces:
            torch.mul(m, beta1, out=next_m).add_(g, alpha=1 - beta1)
            torch.mul(v, beta2, out=next_v).addcmul_(g, g, value=1 - beta2)
            root = (next_v / correction2).add_(eps_root).sqrt_()
            torch.mul(x, 1 - lr * weight_decay, out=next_x)
            next_x.addcdiv_(next_m, root.add_(eps), value=-lr / correction1)
        return next_theta, AdamWState(step, exp_avg, exp_avg_sq)

    def vjp(gradient, state, next_state, lr, theta_bar, state_bar, out):
        correction1, correction2 = 1 - beta1**next_state.step, 1 - beta2**next_state.step
        bars = [] if state_bar is None else [state_bar.exp_avg, state_bar.exp_avg_sq]
        pieces = blocks(gradient, next_state.exp_avg, next_state.exp_avg_sq, theta_bar, out, *bars)
        for g, m, v, x_bar, g_bar, *moments in pieces:
            root = (v / correction2).add_(eps_root).sqrt_()
            divisor = root + eps
            to_m = (-lr / correction1) / divisor  # ∂θ' / ∂m'
            # ∂(m̂ / (√x + eps)) / ∂x = -m̂ / (√x + eps)² / 2√x. Where √x = 0, all gradients so far were zero, and the
            # factor 2g below makes the product zero for every finite value. The nan of 0 / 0 must be replaced.
            to_v = (to_m * m).div_(divisor).div_(root).mul_(-0.5 / correction2)  # ∂θ' / ∂v'
            if eps_root == 0:
                to_v.masked_fill_(root == 0, 0.0)
            from_v = g * (2 * (1 - beta2))  # ∂v' / ∂g
            if state_bar is None:
                torch.mul(x_bar, to_m.mul_(1 - beta1) + to_v * from_v, out=g_bar)
                continue
            m_bar, v_bar = moments
            m_bar.addcmul_(x_bar, to_m)
            v_bar.addcmul_(x_bar, to_v)
            torch.mul(v_bar, from_v, out=g_bar).add_(m_bar, alpha=1 - beta1)
            m_bar.mul_(beta1)
            v_bar.mul_(beta2)
            if weight_decay:
                x_bar.mul_(1 - lr * weight_decay)
        return None if state_bar is None else state_bar._replace(step=state.step)

    return Optimizer(init, update, vjp)


class SGDState(NamedTuple):
    momentum_buffer: Tensor


def sgd(momentum: float, weight_decay: float) -> Optimizer:
    """
    SGD as in `torch.optim.SGD` (no dampening, not Nesterov; weight decay is L2, added to the gradient).

        b' = momentum · b + g + weight_decay · θ
        θ' = θ - lr · b'
    """

    def init(theta):
        return SGDState(torch.zeros_like(theta))

    def update(gradient, state, theta, lr):
        next_theta, buffer = torch.empty_like(theta), torch.empty_like(theta)
        for g, b, x, next_b, next_x in blocks(gradient, state.momentum_buffer, theta, buffer, next_theta):
            torch.mul(b, momentum, out=next_b).add_(g).add_(x, alpha=weight_decay)
            torch.add(x, next_b, alpha=-lr, out=next_x)
        return next_theta, SGDState(buffer)

    def vjp(gradient, state, next_state, lr, theta_bar, state_bar, out):
        if state_bar is None:
            torch.mul(theta_bar, -lr, out=out)
            return None
        for x_bar, b_bar, g_bar in blocks(theta_bar, state_bar.momentum_buffer, out):
            torch.add(b_bar, x_bar, alpha=-lr, out=g_bar)
            torch.mul(g_bar, momentum, out=b_bar)
            x_bar.add_(g_bar, alpha=weight_decay)
        return state_bar

    return Optimizer(init, update, vjp)


def clip(gradient: Tensor, max_norm: float, norm: Tensor) -> Tensor:
    """Scale a gradient `[P]` of this `norm` to at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does."""
    return gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clip_vjp(gradient: Tensor, max_norm: float, norm: Tensor, along: Tensor, clipped_bar: Tensor) -> None:
    """
    Turn cotangents `[M, P]` of `clip(gradient, max_norm, norm)` into those of `gradient`, in place.

    `along` `[M]` are their products with the gradient. Both `norm` and `along` belong to the whole vectors, the others
    may be parts of them.
    """
    scale = max_norm / (norm + 1e-6)
    through_norm = along * scale / ((norm + 1e-6) * norm)
    clipped = scale < 1
    clipped_bar.mul_(torch.where(clipped, scale, 1.0))
    clipped_bar.addr_(torch.where(clipped, through_norm, 0.0), gradient, alpha=-1)
