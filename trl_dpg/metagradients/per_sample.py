"""
Gradients of the samples out of the fine-tuning's own backward pass.

Where no Hessian is needed, the scores c_i ⟨u, ∇ℓ_i(θ_t)⟩ then cost no pass of their own: in the first step, which is
the last of the reverse sweep, and in every step of `attribution="first_order"`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.by_sample import BySample, Recorder
from ..student import Student
from ..student.block_checkpointing import block_checkpointing
from .batches import MicroBatch
from .config import InnerLoopConfig


class SampleGradients(NamedTuple):
    """
    A micro-batch's contribution to a step's gradient g_t, and what its B samples contribute to it.

    Attributes:
        loss (`torch.Tensor`): Σ w_i c_{i,k} ℓ_{i,k}(θ_t), detached.
        values (`list[torch.Tensor]`): Gradient of the loss in each parameter.
        recorder (`Recorder`): The gradients of the samples, each for w_i = 1.
    """

    loss: Tensor
    values: list[Tensor]
    recorder: Recorder

    def products(self, u: Sequence[Tensor]) -> Tensor:
        """⟨u_m, ∇_θ Σ_k c_{i,k} ℓ_{i,k}⟩ of shape `[M, B]`; `u` has a tensor `[M, *shape]` for each parameter."""
        return self.recorder.products(u)

    def bytes(self, *others: Tensor) -> int:
        """Memory of the samples' gradients, without the storages of `others`, which are in memory anyway."""
        held = {other.untyped_storage().data_ptr() for other in others}
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.recorder.tensors}
        return sum(size for pointer, size in storages.items() if pointer not in held)


def sample_gradients(
    student: Student,
    theta: Tensor,
    micro_batch: MicroBatch,
    weights: Tensor | None,
    config: InnerLoopConfig,
    keep: bool = True,
) -> SampleGradients | None:
    """
    Compute the gradient of a micro-batch's weighted loss at `theta`, and keep those of its samples.

    Args:
        student (`Student`): Runs the model.
        theta (`torch.Tensor` of shape `[P]`): Trainable parameters.
        micro_batch (`MicroBatch`): The samples.
        weights (`torch.Tensor` of shape `[N]`, *optional*): Data weights w of the whole dataset; ones if `None`.
        config (`InnerLoopConfig`): The inner loop.
        keep (`bool`): Keep the samples' gradients.

    Returns:
        `SampleGradients` or `None`: `None` if a parameter is used in a way in which samples cannot be told apart. This
        is then noted in `student.tells_samples_apart`.
    """
    if student.tells_samples_apart is False:
        return None
    weights = None if weights is None else weights[micro_batch.samples]
    if not keep and weights is not None and not _is_right(student, theta, micro_batch, config):
        return None
    found = _backward(student, theta, micro_batch, config, weights, keep=keep)
    if found is not None and keep and not _is_right(student, theta, micro_batch, config, found.recorder):
        return None
    return found


def estimated_bytes(student: Student, micro_batch: MicroBatch) -> int:
    """What the samples' gradients take at most: of each matrix the gradients, or inputs and outputs of its layer."""
    num_samples, length = micro_batch.batch.input_ids.shape
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    ends = [end.weight for end in (student.model.get_input_embeddings(), student.model.get_output_embeddings()) if end]

    def size(parameter: Tensor) -> int:
        if any(parameter is end for end in ends):
            return length * parameter.size(-1)
        return min(parameter.numel(), length * sum(parameter.shape)) if parameter.dim() > 1 else parameter.numel()

    return num_samples * sum(size(p) * p.element_size() for p in parameters)


def sample_products(
    student: Student, theta: Tensor, micro_batch: MicroBatch, config: InnerLoopConfig, u: Sequence[Tensor]
) -> Tensor | None:
    """
    ⟨u_m, ∇_θ Σ_k c_{i,k} ℓ_{i,k}(θ)⟩ for M directions and B samples, `[M, B]`, by a forward and a backward pass.

    `u` has a tensor `[M, *shape]` for each parameter. No gradient in a parameter is computed, and none is kept. See
    [`sample_gradients`] for arguments and for `None`.
    """
    if not _is_right(student, theta, micro_batch, config):
        return None
    found = _backward(student, theta, micro_batch, config, along=u)
    return None if found is None else found.recorder.scores


def _backward(
    student: Student,
    theta: Tensor,
    micro_batch: MicroBatch,
    config: InnerLoopConfig,
    weights: Tensor | None = None,
    along: Sequence[Tensor] | None = None,
    keep: bool = True,
) -> SampleGradients | None:
    batch, coefficients = micro_batch.batch, micro_batch.coefficients
    leaves = [part.requires_grad_() for part in student.unflatten(theta.detach(), cast=False).values()]
    parameters = student.cast(leaves)
    owners = batch.targets // batch.input_ids.size(1)
    recorder = Recorder(list(parameters.values()), len(batch.input_ids), owners, weights, along, keep)

    def run(model):
        loss, losses = student.loss(model, batch, coefficients, head_loss=recorder.head_loss)
        if not recorder.covers:
            student.tells_samples_apart = False
            return None
        if along is None:
            return losses, torch.autograd.grad(loss, leaves, materialize_grads=True)
        if loss.requires_grad:
            torch.autograd.grad(loss, leaves, allow_unused=True)  # for what is recorded
        return losses, ()

    def kernels():
        return BySample(recorder)

    with block_checkpointing(student.model, config.gradient_checkpointing, kernels), kernels():
        found = student.run(parameters, run)
    if found is None:
        return None
    losses, values = found
    weighted = coefficients if weights is None else coefficients * weights[owners]
    return SampleGradients(torch.dot(weighted, losses), [value.detach() for value in values], recorder)


def _is_right(
    student: Student, theta: Tensor, micro_batch: MicroBatch, config: InnerLoopConfig, kept: Recorder | None = None
) -> bool:
    """
    Whether the last sample's gradient is that of the sample alone. It is tested once for a student.

    The sample's gradient is the one that was `kept`. If none was, the batch takes a pass of its own.

    A model may change the order of the rows of its activations, so that they belong to other samples. Then the result
    is wrong by much more than rounding errors.
    """
    if student.tells_samples_apart is not None or len(micro_batch.batch.input_ids) == 1:
        return student.tells_samples_apart is not False
    alone = micro_batch.last_sample()
    leaves = [part.requires_grad_() for part in student.unflatten(theta.detach(), cast=False).values()]
    parameters = student.cast(leaves)

    def gradient(model):
        loss = student.loss(model, alone.batch, alone.coefficients)[0]
        return torch.autograd.grad(loss, leaves, materialize_grads=True)

    with block_checkpointing(student.model, config.gradient_checkpointing, nullcontext):
        expected = student.run(parameters, gradient)
    norms = torch.stack([value.norm() for value in expected])
    rounding = torch.tensor([torch.finfo(parameter.dtype).eps for parameter in parameters.values()]).to(norms)
    moved = norms > 32 * rounding * norms[norms > 0].median()  # less is rounding, e.g. in the bias of attention's keys
    along = [(value / norm**2 if norm > 0 else value)[None] for value, norm in zip(expected, norms, strict=True)]
    if kept is None:
        found = _backward(student, theta, micro_batch, config, along=along)
        kept = None if found is None else found.recorder
    if kept is not None:
        with torch.no_grad():
            products = kept.last_by_place(along)
        told = {place for places, _ in products for place in places}
        student.tells_samples_apart = set(moved.nonzero().flatten().tolist()) <= told and all(
            abs(product - len(places)) <= 0.1 * len(places) for places, product in products if moved[places].all()
        )
    return student.tells_samples_apart is True
