"""Fine-tunings with changed data weights: θ_T(1 + h d) and θ_T(1 - h d), for directions d."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..metagradients import InnerLoopConfig
from ..metagradients.batches import MicroBatch, plan_steps
from ..metagradients.fine_tuning import FineTuning
from ..metagradients.gradient import micro_batch_gradient
from ..metagradients.memory import free_memory
from ..metagradients.optimizers import clip, clip_vjp
from ..metagradients.out_of_memory import within_memory
from ..metagradients.per_sample import sample_gradients
from ..student import FinetunedStudent


TOGETHER = 8
"""Directions whose gradients are held at the same time, if there is memory for them."""


class OneStep(NamedTuple):
    """
    A fine-tuning with T = 1. Its only gradient is linear in the data weights: g(1 + h d) = g(1) + h g(d).

    So g(d) is computed once for each direction. It gives θ_1 for every h, and for every learning rate and `eps_root`.

    Attributes:
        theta (`torch.Tensor` of shape `[P]`): θ_0.
        gradient (`torch.Tensor` of shape `[P]`): g(1).
        along (`torch.Tensor` of shape `[K, P]`): g(d) for each direction d.
    """

    theta: Tensor
    gradient: Tensor
    along: Tensor

    def end(self, config: InnerLoopConfig, step: float = 0.0, direction: int = 0) -> Tensor:
        """θ_1(1 + `step` · d) of shape `[P]`, for the direction d of this number."""
        gradient = self.gradient + step * self.along[direction]
        if config.max_grad_norm is not None:
            gradient = clip(gradient, config.max_grad_norm, gradient.norm())
        optimizer = config.make_optimizer()
        (rate,) = config.learning_rates(1)
        return optimizer.update(gradient, optimizer.init(self.theta), self.theta, rate)[0]

    def slopes(self, config: InnerLoopConfig, metric_gradient: Tensor) -> Tensor:
        """
        ⟨τ, d⟩ for each direction d, of shape `[K]`, float64 on the CPU. No scores τ are computed for it.

        With u, the derivative of the metric in g, it is ⟨u, g(d)⟩.

        Args:
            config (`InnerLoopConfig`): The inner loop.
            metric_gradient (`torch.Tensor` of shape `[P]`): ∇Φ(θ_1).
        """
        optimizer = config.make_optimizer()
        (rate,) = config.learning_rates(1)
        norm = self.gradient.norm()
        u = self.gradient.clone() if config.max_grad_norm is None else clip(self.gradient, config.max_grad_norm, norm)
        start = optimizer.init(self.theta)
        _, end = optimizer.update(u, start, self.theta, rate)
        optimizer.vjp(u, start, end, rate, metric_gradient.clone(), optimizer.init(self.theta), out=u)
        if config.max_grad_norm is not None:
            clip_vjp(self.gradient, config.max_grad_norm, norm, (self.gradient @ u)[None], u[None])
        return (self.along @ u).double().cpu()


def one_step(fine_tuning: FineTuning, directions: Tensor) -> OneStep:
    """
    The gradients of a fine-tuning's only step.

    Takes one sweep, which keeps the gradients of all samples of a micro-batch. If they are too large for it, or cannot
    be told apart, it takes a sweep for g(1) and for each direction or, if there are few samples, one sweep with a
    sample at a time.

    Args:
        fine_tuning (`FineTuning`): A fine-tuning with T = 1 on N samples.
        directions (`torch.Tensor` of shape `[K, N]`): The directions d.
    """
    return within_memory(fine_tuning, lambda: _one_step(fine_tuning, directions), "The changed data weights")


def _one_step(fine_tuning: FineTuning, directions: Tensor) -> OneStep:
    student, config, (step,) = fine_tuning.student, fine_tuning.config, fine_tuning.steps
    theta, ranks = fine_tuning.initial_theta(), fine_tuning.ranks
    rows = torch.cat([torch.ones_like(directions[:1]), directions]).to(theta)
    gradients = theta.new_zeros(len(rows), theta.numel())
    with fine_tuning.sweeping():
        if _from_samples(fine_tuning, theta, rows, gradients):
            gradients = ranks.sum(gradients)
            return OneStep(theta, gradients[0], gradients[1:])
        if len(fine_tuning.samples) <= 4 * len(directions):  # a sample alone takes more time than its share of a batch
            (step,) = plan_steps(student, fine_tuning.samples, replace(config, micro_batch_size=1), ranks)
            for sample in step:
                gradients.addr_(rows[:, sample.rows[0]], step_gradient(fine_tuning, theta, [sample], rows[0]))
        else:
            for weights, gradient in zip(rows, gradients, strict=True):
                gradient.copy_(step_gradient(fine_tuning, theta, step, weights))
    gradients = ranks.sum(gradients)
    return OneStep(theta, gradients[0], gradients[1:])


def _from_samples(fine_tuning: FineTuning, theta: Tensor, rows: Tensor, gradients: Tensor) -> bool:
    """
    Add Σ_i a_i ∇ℓ_i over this rank's samples i, for each row a of `rows` `[K, N]`, to `gradients` `[K, P]`. Returns
    whether this was possible on all ranks.
    """
    student, config = fine_tuning.student, fine_tuning.config
    fitting = max(1, free_memory(student.device) // 4 // theta.nbytes)
    config = replace(config, micro_batch_size=min(config.micro_batch_size or config.batch_size, fitting))
    (step,) = plan_steps(student, fine_tuning.samples, config, fine_tuning.ranks)
    told = True
    for micro_batch in step:
        part = sample_gradients(student, theta, micro_batch, None, config)
        found = None if part is None else part.recorder.combinations(rows[:, micro_batch.samples])
        if found is None:
            told = False
            break
        for total, value in zip(gradients.split([v[0].numel() for v in found], dim=1), found, strict=True):
            total += value.flatten(1)
    if not fine_tuning.ranks.least(told):
        gradients.zero_()
        return False
    return True


def step_gradient(fine_tuning: FineTuning, theta: Tensor, step: list[MicroBatch], weights: Tensor) -> Tensor:
    """The gradient of micro-batches' loss with these data weights `[N]`, of shape `[P]`."""
    gradient = torch.zeros_like(theta)
    for micro_batch in step:
        part = micro_batch_gradient(fine_tuning.student, theta, micro_batch, weights, fine_tuning.config)
        gradient += torch.cat([value.flatten() for value in part.values])
    return gradient


def ends(fine_tuning: FineTuning, directions: Tensor, step: float) -> Iterator[tuple[Tensor, Tensor]]:
    """
    θ_T(1 + h d) and θ_T(1 - h d), of shape `[P]` each, for each direction d.

    Takes 2K sweeps. With T = 1, the gradient is linear in the data weights, which saves half of the sweeps or more.

    Args:
        fine_tuning (`FineTuning`): The student's fine-tuning on N samples.
        directions (`torch.Tensor` of shape `[K, N]`): The directions d.
        step (`float`): h.
    """
    if len(fine_tuning.steps) > 1:
        for d in directions:
            yield fine_tuning.theta(1 + step * d), fine_tuning.theta(1 - step * d)
        return
    for some in directions.split(num_together(fine_tuning, TOGETHER)):
        single = one_step(fine_tuning, some)
        for k in range(len(some)):
            yield single.end(fine_tuning.config, step, k), single.end(fine_tuning.config, -step, k)


def num_together(fine_tuning: FineTuning, most: int, least: int = 1) -> int:
    """How many directions' gradients fit into a quarter of the free memory, beside four more vectors of that size."""
    student = fine_tuning.student
    fitting = free_memory(student.device) // 4 // student.initial_theta().nbytes - 4
    return fine_tuning.ranks.least(max(least, min(most, fitting)))


class Remembering:
    """
    A metric that keeps what it saw last, so that the fine-tuning at w = 1 need not be repeated.

    Attributes:
        theta (`torch.Tensor` of shape `[P]`): θ of the student.
        gradient (`torch.Tensor` of shape `[P]`): ∇Φ(θ), if it was computed.
    """

    def __init__(self, metric: Callable[[FinetunedStudent], Tensor]):
        self.metric = metric
        self.theta: Tensor | None = None
        self.gradient: Tensor | None = None

    def __call__(self, student: FinetunedStudent) -> Tensor:
        self.theta, self.gradient = student.theta.detach(), None
        if student.theta.requires_grad:
            student.theta.register_hook(self._keep)
        return self.metric(student)

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient  # after those of batches, the whole metric's comes last
