"""Optimizers as pure functions, each with its vector-Jacobian product in closed form.

An optimizer step is a function `U` of the gradient, the optimizer's state and the parameters,

    (θ', s') = U(g, s, θ),

and the reverse sweep needs its VJP: from the cotangents of `(θ', s')` to those of `(g, s, θ)`. Both are elementwise,
so they are written out here and no autograd graph is ever built over an optimizer state. Parameters, gradients and
moments are flat tensors of shape `[P]`, one for all trainable parameters.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Optimizer(NamedTuple):
    """
    An optimizer as three pure functions over flat tensors of shape `[P]`.

    Attributes:
        init (`Callable`):
            `init(theta) -> state`.
        update (`Callable`):
            `update(gradient, state, theta, lr) -> (theta, state)`: one step.
        vjp (`Callable`):
            `vjp(gradient, state, next_state, lr, theta_bar, state_bar) -> (gradient_bar, theta_bar, state_bar)`: pulls
            the cotangents of a step's results back to its inputs. `state` and `next_state` are the state before and
            after the step; `state_bar` has the type of the state.
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

    With `eps_root = 0` Adam's first step is close to `sign(g)`, whose derivative is zero nearly everywhere; `eps_root`
    is what makes a training run smooth in its data weights (Engstrom et al., arXiv 2503.13751, sec. 4).
    """
    beta1, beta2 = betas

    def init(theta):
        return AdamWState(0, torch.zeros_like(theta), torch.zeros_like(theta))

    def moments(state):
        """`m̂`, `√(v̂ + eps_root)` and the two bias corrections of a state after its step."""
        correction1, correction2 = 1 - beta1**state.step, 1 - beta2**state.step
        return (
            state.exp_avg / correction1,
            (state.exp_avg_sq / correction2 + eps_root).sqrt_(),
            correction1,
            correction2,
        )

    def update(gradient, state, theta, lr):
        exp_avg = (beta1 * state.exp_avg).add_(gradient, alpha=1 - beta1)
        exp_avg_sq = (beta2 * state.exp_avg_sq).addcmul_(gradient, gradient, value=1 - beta2)
        state = AdamWState(state.step + 1, exp_avg, exp_avg_sq)
        m_hat, root, _, _ = moments(state)
        return (theta * (1 - lr * weight_decay)).addcdiv_(m_hat, root.add_(eps), value=-lr), state

    def vjp(gradient, state, next_state, lr, theta_bar, state_bar):
        m_hat, root, correction1, correction2 = moments(next_state)
        step_bar = theta_bar * -lr / (root + eps)  # cotangent of m̂
        exp_avg_bar = state_bar.exp_avg + step_bar / correction1
        # ∂(m̂ / (√x + eps)) / ∂x = -m̂ / (√x + eps)² / 2√x. Where √x = 0 every gradient so far was zero, and the
        # factor 2g below makes the product zero whatever stands here; 0 / 0 must not.
        root_bar = -step_bar * m_hat / (root + eps)
        exp_avg_sq_bar = state_bar.exp_avg_sq + torch.where(root > 0, root_bar / (2 * correction2 * root), 0.0)
        gradient_bar = (1 - beta1) * exp_avg_bar + 2 * (1 - beta2) * gradient * exp_avg_sq_bar
        state_bar = AdamWState(state.step, beta1 * exp_avg_bar, beta2 * exp_avg_sq_bar)
        return gradient_bar, theta_bar * (1 - lr * weight_decay), state_bar

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
        buffer = momentum * state.momentum_buffer + gradient + weight_decay * theta
        return theta - lr * buffer, SGDState(buffer)

    def vjp(gradient, state, next_state, lr, theta_bar, state_bar):
        buffer_bar = state_bar.momentum_buffer - lr * theta_bar
        return buffer_bar, theta_bar + weight_decay * buffer_bar, SGDState(momentum * buffer_bar)

    return Optimizer(init, update, vjp)


def clip(gradient: Tensor, max_norm: float) -> Tensor:
    """Scale a gradient of shape `[P]` to at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does."""
    return gradient * (max_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)


def clip_vjp(gradient: Tensor, max_norm: float, clipped_bar: Tensor) -> Tensor:
    """Pull the cotangent of `clip(gradient, max_norm)` back to `gradient`; all shapes `[P]`."""
    norm = gradient.norm()
    scale = max_norm / (norm + 1e-6)
    through_norm = torch.dot(clipped_bar, gradient) * scale / ((norm + 1e-6) * norm)
    return torch.where(scale < 1, scale * clipped_bar - through_norm * gradient, clipped_bar)
