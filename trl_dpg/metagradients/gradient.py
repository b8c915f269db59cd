"""The gradient of one micro-batch's weighted loss, with its graph if the reverse sweep will differentiate it."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..kernels import TwiceDifferentiable
from ..student import Student
from ..student.block_checkpointing import block_checkpointing
from .batches import MicroBatch
from .config import InnerLoopConfig


class Gradient(NamedTuple):
    """
    A micro-batch's contribution to a step's gradient g_t.

    Attributes:
        loss (`torch.Tensor`): Σ w_{i,k} c_{i,k} ℓ_{i,k}(θ_t), detached.
        token_losses (`torch.Tensor` of shape `[n]`): ℓ_{i,k}(θ_t), detached.
        values (`list[torch.Tensor]`): Gradient of the loss in each of the `leaves`, detached. With `skip_values`, some
            of them are not computed.
        edges (`list[GradientEdge | None]`): The nodes of the values in the graph. `None` for constant values.
        leaves (`list[torch.Tensor]`): θ_t, one tensor for each parameter.
        parameters (`dict[str, torch.Tensor]`): The leaves, by name and in the model's dtypes.
        token_weights (`torch.Tensor` of shape `[n]`): w_{i,k}.
    """

    loss: Tensor
    token_losses: Tensor
    values: list[Tensor]
    edges: list[GradientEdge | None]
    leaves: list[Tensor]
    parameters: dict[str, Tensor]
    token_weights: Tensor


def check_attention(student: Student) -> None:
    """
    Refuse a double backward through an attention that may not be linked to its graph.

    Raises:
        `ValueError`: If the student's attention has no second derivative.
    """
    implementation = student.model.config._attn_implementation or "eager"
    if implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"The student's attention ({implementation!r}) has no second derivative. Load it with "
            "attn_implementation='sdpa', or set hvp='finite_difference'. attribution='first_order' needs none, unless "
            "per_token is set or samples cannot be told apart in this model's layers."
        )


def micro_batch_gradient(
    student: Student,
    theta: Tensor,
    micro_batch: MicroBatch,
    weights: Tensor,
    config: InnerLoopConfig,
    differentiable: bool = False,
    through_theta: bool = True,
    skip_values: bool = False,
) -> Gradient:
    """
    Compute the gradient of a micro-batch's weighted loss at `theta`.

    Args:
        student (`Student`): Runs the model.
        theta (`torch.Tensor` of shape `[P]`): Trainable parameters.
        micro_batch (`MicroBatch`): The samples.
        weights (`torch.Tensor` of shape `[N]`): Data weights w of the whole dataset.
        config (`InnerLoopConfig`): The inner loop.
        differentiable (`bool`): Keep the graph, so that the result can be differentiated in the token weights.
        through_theta (`bool`): Keep what is needed to differentiate the result in θ as well.
        skip_values (`bool`): Do not compute the values of weight gradients. Use this if only the graph is needed.
    """
    leaves = [part.requires_grad_() for part in student.unflatten(theta.detach(), cast=False).values()]
    parameters = student.cast(leaves)
    token_weights = weights[micro_batch.rows].requires_grad_(differentiable)
    flags: dict[str, Any] = {"through_theta": through_theta, "skip_values": skip_values}

    def gradient(model):
        loss, losses = student.loss(model, micro_batch.batch, token_weights * micro_batch.coefficients, **flags)
        return loss, losses, torch.autograd.grad(loss, leaves, create_graph=differentiable, materialize_grads=True)

    def kernels():
        return TwiceDifferentiable(**flags) if config.differentiates_twice else nullcontext()

    with block_checkpointing(student.model, config.gradient_checkpointing, kernels), kernels():
        loss, losses, values = student.run(parameters, gradient)
    return Gradient(
        loss.detach(),
        losses.detach(),
        values=[value.detach() for value in values],
        edges=[get_gradient_edge(value) if value.requires_grad else None for value in values],
        leaves=leaves,
        parameters=parameters,
        token_weights=token_weights,
    )
