"""The reverse sweep: from the metric's gradient at the end of fine-tuning back to every sample's weight."""

import torch
from torch import Tensor

from ..student import Student
from .inner_loop import Gradient, InnerLoopConfig, MicroBatch, Trajectory, micro_batch_gradient
from .optimizers import clip, clip_vjp


def reverse_sweep(
    student: Student,
    trajectory: Trajectory,
    metric_gradient: Tensor,
    weights: Tensor,
    token_scores: Tensor,
    config: InnerLoopConfig,
) -> None:
    """
    Differentiate the metric through the whole fine-tuning (Engstrom et al., arXiv 2503.13751; Thrush et al., arXiv
    2604.08423), for t = T-1 ... 0, from λ_T = ∇Φ(θ_T) and σ_T = 0:

        1. (u, λ', σ_t) = VJP of the optimizer step U_t with cotangents (λ_{t+1}, σ_{t+1})
        2. τ_{i,k} += c_{i,k} ⟨u, ∇ℓ_{i,k}(θ_t)⟩                for the tokens of the step's batch
        3. λ_t = λ' + ∇_θ ⟨u, g_t(θ_t)⟩                          not needed at t = 0

    Steps 2 and 3 are one double backward: g_t is linear in the token weights, so differentiating ⟨u, g_t⟩ in them
    gives 2, and in θ gives 3.

    Args:
        student (`Student`): Runs the model.
        trajectory (`Trajectory`): The forward sweep.
        metric_gradient (`torch.Tensor` of shape `[P]`): ∇Φ(θ_T).
        weights (`torch.Tensor` of shape `[N]`): Data weights w, the same as in the forward sweep.
        token_scores (`torch.Tensor` of shape `[N, L]`): τ_{i,k} = ∂Φ/∂w_{i,k} is added to this.
        config (`InnerLoopConfig`): The same as in the forward sweep.
    """
    optimizer = config.make_optimizer()
    theta_bar, next_state = metric_gradient, trajectory.state
    state_bar = optimizer.init(metric_gradient)  # zeros
    for t in reversed(range(len(trajectory.steps))):
        step = trajectory.steps[t]
        gradient = step.gradient if config.max_grad_norm is None else clip(step.gradient, config.max_grad_norm)
        u, theta_bar, state_bar = optimizer.vjp(gradient, step.state, next_state, step.lr, theta_bar, state_bar)
        if config.max_grad_norm is not None:
            u = clip_vjp(step.gradient, config.max_grad_norm, u)
        for micro_batch in step.micro_batches:
            if config.hvp == "finite_difference":
                token_bar, hessian_product = _shifted(student, step.theta, micro_batch, weights, u)
            else:
                if step.retained:
                    part = step.retained.pop(0)
                else:
                    part = micro_batch_gradient(student, step.theta, micro_batch, weights, differentiable=True)
                token_bar, hessian_product = _pull_back(student, part, u, through_theta=t > 0)
                del part  # frees its graph
            token_scores[micro_batch.rows, : token_bar.size(1)] += token_bar
            if hessian_product is not None:
                theta_bar = theta_bar + hessian_product
        next_state = step.state


def _pull_back(student: Student, part: Gradient, u: Tensor, through_theta: bool) -> tuple[Tensor, Tensor | None]:
    """∇_w ⟨u, g⟩ of shape `[B, L]` and, if asked for, ∇_θ ⟨u, g⟩ of shape `[P]`, of one micro-batch's gradient g."""
    inputs = [part.token_weights, part.theta] if through_theta else [part.token_weights]
    pulled = student.run(part.parameters, lambda _: torch.autograd.grad(part.value, inputs, u))
    return pulled[0], pulled[1] if through_theta else None


def _shifted(
    student: Student, theta: Tensor, micro_batch: MicroBatch, weights: Tensor, u: Tensor
) -> tuple[Tensor, Tensor | None]:
    """
    The same two by central differences along u, from first derivatives alone.

    The step is ε^(1/3) ‖θ‖ long, ε being the rounding unit, which balances rounding against the third derivative.
    """
    norm = u.norm()
    h = torch.finfo(theta.dtype).eps ** (1 / 3) * theta.norm() / torch.where(norm > 0, norm, 1.0)
    ahead, behind = (
        micro_batch_gradient(student, theta + shift * u, micro_batch, weights, differentiable=False)
        for shift in (h, -h)
    )
    return (ahead.token_losses - behind.token_losses) / (2 * h), (ahead.value - behind.value) / (2 * h)
