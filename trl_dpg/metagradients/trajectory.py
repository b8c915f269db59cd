"""The forward sweep: fine-tunes the student on the data, one optimizer step after the other."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ranks import ALONE, Ranks
from ..student import Student
from .batches import MicroBatch
from .config import InnerLoopConfig
from .gradient import Gradient, micro_batch_gradient
from .memory import GraphBudget, GraphSize, free_memory, map_state, pinned
from .memory_plan import MemoryPlan
from .optimizers import Optimizer, clip
from .per_sample import SampleGradients, estimated_bytes, sample_gradients


class Step(NamedTuple):
    """
    What the reverse sweep needs of one optimizer step. Of several ranks, each keeps its shard of θ_t, s_t and g_t.

    Attributes:
        micro_batches (`list[MicroBatch]`): The step's data.
        theta (`torch.Tensor` of shape `[S]`): θ_t.
        state (`NamedTuple`): The optimizer's state s_t.
        gradient (`torch.Tensor` of shape `[S]`): g_t, before clipping.
        lr (`float`): The learning rate.
        by_sample (`bool`): Whether its scores come from the backward pass of the samples, without a Hessian.
        retained (`list[Gradient | SampleGradients | None]`): Each micro-batch's gradient with its graph or, with
            `by_sample`, the gradients of its samples; `None` if they were not kept.
    """

    micro_batches: list[MicroBatch]
    theta: Tensor
    state: Any
    gradient: Tensor
    lr: float
    by_sample: bool
    retained: list[Gradient | SampleGradients | None]


class Stretch(NamedTuple):
    """
    Consecutive steps of the inner loop from t = `first` on, the shards of θ and s after them, and the training losses
    of this rank's samples.
    """

    first: int
    steps: list[Step]
    theta: Tensor
    state: Any
    losses: list[Tensor]


class Checkpoint(NamedTuple):
    """The shard of the state before a stretch of steps t = `first` ... `end` - 1."""

    first: int
    end: int
    theta: Tensor
    state: Any


@dataclass
class InnerLoop:
    """
    The optimizer steps of a fine-tuning. Any stretch of them can be run.

    Attributes:
        student (`Student`): The student before fine-tuning. Its stored weights are only read.
        steps (`list[list[MicroBatch]]`): The micro-batches of each of T steps.
        weights (`torch.Tensor` of shape `[N]`): Data weights w.
        plain (`bool`): Whether all of them are 1.
        config (`InnerLoopConfig`): Optimizer and schedule.
        optimizer (`Optimizer`): The optimizer, whose step is U.
        rates (`list[float]`): Learning rates of the T steps.
        initial_theta (`torch.Tensor` of shape `[P]`): θ_0.
        ranks (`Ranks`): The processes that share the work. `steps` are the micro-batches of this one.
    """

    student: Student
    steps: Sequence[list[MicroBatch]]
    weights: Tensor
    plain: bool
    config: InnerLoopConfig
    optimizer: Optimizer
    rates: list[float]
    initial_theta: Tensor
    ranks: Ranks

    def run(self, first: int, end: int, own: Tensor, state: Any, budget: GraphBudget | None) -> Stretch:
        """
        Run the steps t = `first` ... `end` - 1.

        Args:
            first (`int`), end (`int`): The range of steps.
            own (`torch.Tensor` of shape `[S]`), state: The shards of θ and s before the steps.
            budget (`GraphBudget`, *optional*): Keep what the reverse sweep needs, and the graphs that fit into this
                budget. `None`: keep nothing.
        """
        kept, losses = [], []
        for t in range(first, end):
            gradient, loss, retained = self._gradient(t, self.theta(t, own), budget)
            gradient = self.ranks.sum_shards(gradient)
            if budget is not None:
                step = Step(self.steps[t], own, state, gradient, self.rates[t], self.by_sample(t), retained)
                kept.append(step._replace(theta=self.put(own), state=self.put(state), gradient=self.put(gradient)))
            losses.append(loss)
            clip_norm = self.config.max_grad_norm
            clipped = gradient if clip_norm is None else clip(gradient, clip_norm, self.ranks.norm(gradient))
            own, state = self.optimizer.update(clipped, state, own, self.rates[t])
        return Stretch(first, kept, own, state, losses)

    def theta(self, t: int, own: Tensor) -> Tensor:
        """θ_t of shape `[P]`, of which this rank has the shard `own`."""
        return self.initial_theta if t == 0 else self.ranks.gather(own, len(self.initial_theta))

    def by_sample(self, t: int) -> bool:
        """Whether a step's scores come from the backward pass of its samples: it needs no Hessian-vector product."""
        needs_no_hessian = self.config.attribution == "first_order" or (
            t == 0 and self.config.attribution != "dataset"
        )
        return needs_no_hessian and not self.config.per_token

    def _gradient(
        self, t: int, theta: Tensor, budget: GraphBudget | None
    ) -> tuple[Tensor, Tensor, list[Gradient | SampleGradients | None]]:
        """This rank's share of g_t and of the training loss, and what is kept of each of its micro-batches."""
        gradient, loss, retained = None, theta.new_zeros(()), []
        for micro_batch in self.steps[t]:
            part, keep = self._part(t, theta, micro_batch, budget)
            if gradient is None:
                gradient = torch.cat([value.flatten() for value in part.values])
            else:
                parts = list(self.student.unflatten(gradient, cast=False).values())
                torch._foreach_add_(parts, part.values)
            loss += part.loss
            retained.append(part._replace(values=[]) if keep else None)
            del part
        if gradient is None:  # a batch of empty samples, or fewer samples than ranks
            gradient = torch.zeros_like(theta)
        return gradient, loss, retained

    def _part(
        self, t: int, theta: Tensor, micro_batch: MicroBatch, budget: GraphBudget | None
    ) -> tuple[Gradient | SampleGradients, bool]:
        """A micro-batch's contribution to g_t, and whether to keep it for the reverse sweep."""
        held = (theta, *self.student.model.parameters())
        by_sample = self.by_sample(t) and self.student.tells_samples_apart is not False
        if budget is not None and by_sample and not budget.knows(micro_batch, by_sample):
            budget.learn(micro_batch, estimated_bytes(self.student, micro_batch), by_sample)
        keep = budget is not None and budget.has_room_for(micro_batch, by_sample)
        if by_sample:
            weights = None if self.plain else self.weights
            part = sample_gradients(self.student, theta, micro_batch, weights, self.config, keep)
            if part is not None and budget is not None and keep:
                budget.learn(micro_batch, part.bytes(*held), by_sample)
                keep = budget.take(micro_batch, by_sample)
            if part is not None:
                return part, keep
            keep = budget is not None and budget.has_room_for(micro_batch)
        arguments = (self.student, theta, micro_batch, self.weights, self.config)
        if budget is None or not keep or not self.config.differentiates_twice:
            return micro_batch_gradient(*arguments), False
        through_theta = t > 0 and self.config.attribution != "first_order"
        with nullcontext() if budget.knows(micro_batch) else GraphSize() as size:
            graph = micro_batch_gradient(*arguments, differentiable=True, through_theta=through_theta)
        if size is not None:
            budget.learn(micro_batch, size.bytes(*held))
        return graph, budget.take(micro_batch)

    def put(self, state: Any) -> Any:
        """A state in the memory where states are kept."""
        if self.config.offload_trajectory and self.student.device.type == "cuda":
            return map_state(pinned, state)
        return state

    def get(self, state: Any) -> Any:
        """A kept state on the student's device."""
        return map_state(lambda x: x.to(self.student.device, non_blocking=True), state)


@dataclass
class Trajectory:
    """
    The result of a forward sweep, and what one reverse sweep needs.

    Attributes:
        theta (`torch.Tensor` of shape `[P]`): θ_T.
        losses (`torch.Tensor` of shape `[T]`): Training losses.
        loop (`InnerLoop`): The steps.
        checkpoints (`list[Checkpoint]`): The states before each stretch except the last one.
        last (`Stretch`): The last stretch, with all its states.
        budget (`int`): Bytes for the graphs of a stretch.
    """

    theta: Tensor
    losses: Tensor
    loop: InnerLoop
    checkpoints: list[Checkpoint]
    last: Stretch | None
    budget: int

    def stretches_backwards(self) -> Iterator[Stretch]:
        """
        The stretches with all their steps, the last stretch first. A stretch that was yielded is not kept.

        Raises:
            `ValueError`: If the states were not kept, or if this was called before.
        """
        if self.last is None:
            raise ValueError("The states of this fine-tuning were not kept. Run the forward sweep with `keep_states`.")
        last, self.last = self.last, None
        yield last
        del last
        while self.checkpoints:
            first, end, theta, state = self.checkpoints.pop()
            yield self.loop.run(first, end, self.loop.get(theta), self.loop.get(state), GraphBudget(self.budget))


def forward_sweep(
    student: Student,
    steps: Sequence[list[MicroBatch]],
    weights: Tensor,
    config: InnerLoopConfig,
    keep_states: bool = True,
    num_metrics: int = 1,
    ranks: Ranks = ALONE,
    initial_theta: Tensor | None = None,
) -> Trajectory:
    """
    Fine-tune the student: (θ_{t+1}, s_{t+1}) = U_t(θ_t, s_t, g_t) with g_t = Σ_i w_i c_i ∇ℓ_i(θ_t), t = 0 ... T-1.

    The steps are divided into stretches, see `checkpoint_interval` in [`InnerLoopConfig`]. For the reverse sweep, the
    state before each stretch is kept, and every state in the last stretch. The states in an earlier stretch are
    computed again when the reverse sweep needs them (checkpointing, Griewank & Walther 2000). In a stretch, graphs are
    kept if `config.memory_budget` has room for them.

    Of several ranks, each computes its micro-batches' share of g_t. The shares are summed shard by shard, each rank
    updates its shard of θ and s and keeps only this, and θ_{t+1} is gathered from the shards.

    Args:
        student (`Student`): The student before fine-tuning. Its stored weights are only read.
        steps (`list[list[MicroBatch]]`): The micro-batches of each of T steps.
        weights (`torch.Tensor` of shape `[N]`): Data weights w.
        config (`InnerLoopConfig`): Optimizer and schedule.
        keep_states (`bool`, *optional*, defaults to `True`):
            Keep what the reverse sweep needs. If `False`, memory does not grow with T.
        num_metrics (`int`, *optional*, defaults to 1): M. The reverse sweep needs memory for each of them.
        ranks (`Ranks`, *optional*): The processes that share the work. `steps` are the micro-batches of this one.
        initial_theta (`torch.Tensor` of shape `[P]`, *optional*): θ_0, the same on all ranks.
    """
    plain, rates = bool((weights == 1).all()), config.learning_rates(len(steps))
    initial_theta = student.initial_theta() if initial_theta is None else initial_theta
    loop = InnerLoop(student, steps, weights, plain, config, config.make_optimizer(), rates, initial_theta, ranks)
    own = ranks.shard(initial_theta)
    state = loop.optimizer.init(own)
    length, budget = _plan_memory(loop, own, num_metrics) if keep_states else (len(steps), 0)
    checkpoints, losses, last = [], [], None
    for first in range(0, len(steps), length):
        end = min(first + length, len(steps))
        if end < len(steps):
            checkpoints.append(Checkpoint(first, end, loop.put(own), loop.put(state)))
        keep = keep_states and end == len(steps)
        last = loop.run(first, end, own, state, GraphBudget(budget) if keep else None)
        own, state = last.theta, last.state
        losses += last.losses
    total = ranks.sum(torch.stack(losses))
    theta = loop.theta(len(steps), own)
    return Trajectory(theta, total, loop, checkpoints, last if keep_states else None, budget)


def _plan_memory(loop: InnerLoop, own: Tensor, num_metrics: int) -> tuple[int, int]:
    """Steps in a stretch, the same on all ranks, and bytes for the graphs of a stretch."""
    config, device = loop.config, loop.student.device
    plan = MemoryPlan(config, own.nbytes, len(loop.steps), num_metrics)
    kept_on = torch.device("cpu") if config.offload_trajectory else device
    length = plan.stretch(free_memory(kept_on), agreed=lambda fits: bool(loop.ranks.least(fits)))
    return length, plan.graphs(free_memory(device), length, device.type == "cuda")
