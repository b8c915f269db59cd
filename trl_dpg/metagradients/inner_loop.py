"""The inner loop: fine-tuning the student on the data, one optimizer step after the other (the forward sweep)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers import SchedulerType, get_scheduler

from ..student import Batch, Student, TokenizedExample
from .kernels import TwiceDifferentiable
from .optimizers import Optimizer, adamw, clip, sgd


_SCHEDULES = (
    SchedulerType.CONSTANT,
    SchedulerType.CONSTANT_WITH_WARMUP,
    SchedulerType.LINEAR,
    SchedulerType.COSINE,
    SchedulerType.COSINE_WITH_RESTARTS,
    SchedulerType.POLYNOMIAL,
    SchedulerType.INVERSE_SQRT,
)


@dataclass
class InnerLoopConfig:
    """
    How the student is fine-tuned on a dataset, and how its metric's change is attributed to the samples.

    Args:
        > Parameters that control the optimizer

        optimizer (`str`, *optional*, defaults to `"adamw"`):
            `"adamw"` or `"sgd"`, as in `torch.optim`.
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Peak learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`):
            AdamW's decay rates of the first and second moment.
        eps (`float`, *optional*, defaults to `1e-8`):
            AdamW's epsilon, outside the square root.
        eps_root (`float`, *optional*, defaults to `1e-9`):
            Added to AdamW's second moment inside the square root; makes training smooth in the data weights. Too small
            for the gradients at hand, and the scores become large and useless.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Decoupled for AdamW, added to the gradient for SGD.
        momentum (`float`, *optional*, defaults to `0.0`):
            SGD's momentum.
        max_grad_norm (`float`, *optional*):
            Clips the norm of each step's gradient.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            A name of [`~transformers.SchedulerType`] that needs no further arguments.
        warmup_steps (`int`, *optional*, defaults to `0`):
            Steps of linear warm-up, for schedules that have one.

        > Parameters that control the data

        batch_size (`int`, *optional*, defaults to `8`):
            Samples per optimizer step. The last step of an epoch may be smaller.
        num_epochs (`int`, *optional*, defaults to `1`):
            Passes over the dataset. A sample's scores in all epochs are summed.
        shuffle (`bool`, *optional*, defaults to `False`):
            Draws a new order for every epoch.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the order.
        micro_batch_size (`int`, *optional*):
            Samples per forward pass. Bounds memory; never changes the numbers beyond rounding.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            The student's blocks keep their inputs only and run again in each backward pass. Spares memory in the
            forward sweep; in the reverse sweep the gradient's own graph holds the blocks' activations all the same.
            Takes time; never changes the numbers.
        max_length (`int`, *optional*, defaults to `1024`):
            Longer samples are cut off, in tokens.
        loss_normalization (`str`, *optional*, defaults to `"example_tokens"`):
            `"example_tokens"`: mean over a sample's supervised tokens, then over the batch. `"max_length"`: sum over a
            sample's tokens divided by `max_length`, then mean over the batch (the paper's). `"batch_tokens"`: mean
            over the supervised tokens of the batch (what [`~trl.SFTTrainer`] does).

        > Parameters that control the attribution

        attribution (`str`, *optional*, defaults to `"metagradient"`):
            `"metagradient"`: ∂Φ/∂w_i. `"dataset"`: the metric itself for every sample (the paper's naive baseline).
        per_token (`bool`, *optional*, defaults to `False`):
            Also return ∂Φ/∂w_{i,k}, the score of each token.
        memory_budget (`int` or `str`, *optional*, defaults to `"auto"`):
            Bytes for graphs kept from the forward sweep: as many of the last steps as fit are not computed again in
            the reverse sweep. `"auto"`: half of the device's free memory. `0`: recompute all. Never changes the
            numbers.
        checkpoint_interval (`int` or `str`, *optional*, defaults to `"auto"`):
            Steps between the states (parameters and moments) that are kept for the reverse sweep. The steps in
            between are computed again, one stretch at a time. `"auto"`: 1, every state, if they take less than half
            of the free memory, otherwise √T, for which 2√T states are held. Never changes the numbers beyond
            rounding.
        offload_trajectory (`bool`, *optional*, defaults to `False`):
            Keep the states in pinned host memory instead of on the student's GPU.
        hvp (`str`, *optional*, defaults to `"double_backward"`):
            `"double_backward"`: exact. `"finite_difference"`: two shifted gradients instead, for students whose
            kernels are not twice differentiable (flash attention, custom kernels); inexact.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    eps_root: float = 1e-9
    weight_decay: float = 0.0
    momentum: float = 0.0
    batch_size: int = 8
    num_epochs: int = 1
    shuffle: bool = False
    seed: int = 42
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False
    max_length: int = 1024
    loss_normalization: str = "example_tokens"
    attribution: str = "metagradient"
    max_grad_norm: float | None = None
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    per_token: bool = False
    memory_budget: int | str = "auto"
    checkpoint_interval: int | str = "auto"
    offload_trajectory: bool = False
    hvp: str = "double_backward"

    def __post_init__(self):
        _check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        _check_choice("loss_normalization", self.loss_normalization, ("example_tokens", "max_length", "batch_tokens"))
        _check_choice("attribution", self.attribution, ("metagradient", "dataset"))
        _check_choice("hvp", self.hvp, ("double_backward", "finite_difference"))
        if isinstance(self.memory_budget, str):
            _check_choice("memory_budget", self.memory_budget, ("auto",))
        elif self.memory_budget < 0:
            raise ValueError(f"memory_budget must be 'auto' or a number of bytes, got {self.memory_budget}.")
        else:
            self.memory_budget = int(self.memory_budget)
        if isinstance(self.checkpoint_interval, str):
            _check_choice("checkpoint_interval", self.checkpoint_interval, ("auto",))
        elif self.checkpoint_interval < 1:
            raise ValueError(f"checkpoint_interval must be 'auto' or at least 1, got {self.checkpoint_interval}.")
        else:
            self.checkpoint_interval = int(self.checkpoint_interval)
        _check_choice("lr_scheduler_type", self.lr_scheduler_type, [schedule.value for schedule in _SCHEDULES])
        if self.warmup_steps > 0 and self.lr_scheduler_type == "constant":
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} has no effect on the 'constant' schedule. Use "
                "lr_scheduler_type='constant_with_warmup'."
            )
        for name in ("batch_size", "num_epochs", "max_length"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}.")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1 or None, got {self.micro_batch_size}.")
        for name in ("learning_rate", "eps", "eps_root", "weight_decay", "momentum", "warmup_steps"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name} must not be negative, got {vars(self)[name]}.")
        if self.optimizer == "adamw" and self.eps == 0 and self.eps_root == 0:
            raise ValueError("AdamW divides by zero with eps = 0 and eps_root = 0. Set eps_root, e.g. to 1e-9.")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {self.max_grad_norm}.")

    def make_optimizer(self) -> Optimizer:
        if self.optimizer == "sgd":
            return sgd(self.momentum, self.weight_decay)
        return adamw(self.betas, self.eps, self.eps_root, self.weight_decay)

    @property
    def differentiates_twice(self) -> bool:
        """Whether the reverse sweep differentiates the gradient's graph."""
        return self.attribution == "metagradient" and self.hvp == "double_backward"

    def learning_rates(self, num_steps: int) -> list[float]:
        """The learning rate of each of `num_steps` steps, by transformers' own schedule."""
        dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.learning_rate)
        scheduler = get_scheduler(self.lr_scheduler_type, dummy, self.warmup_steps, num_steps)
        rates = []
        for _ in range(num_steps):
            rates.append(scheduler.get_last_lr()[0])
            dummy.step()
            scheduler.step()
        return rates


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}. Choose one of: {', '.join(repr(str(c)) for c in choices)}.")


class MicroBatch(NamedTuple):
    """
    The part of a step's batch that one forward pass takes, with its n supervised tokens.

    Attributes:
        batch (`Batch`): Its tokens, `[B, L]`.
        rows (`torch.Tensor` of shape `[n]`): Which sample of the dataset each supervised token is of.
        columns (`torch.Tensor` of shape `[n]`): Its position there.
        coefficients (`torch.Tensor` of shape `[n]`): The normaliser c_{i,k} of its loss.
    """

    batch: Batch
    rows: Tensor
    columns: Tensor
    coefficients: Tensor


def plan_steps(
    student: Student, examples: Sequence[TokenizedExample], config: InnerLoopConfig
) -> list[list[MicroBatch]]:
    """The micro-batches of each optimizer step. Samples without a supervised token take part in none of them."""
    generator = torch.Generator().manual_seed(config.seed)
    steps = []
    for _ in range(config.num_epochs):
        order = torch.randperm(len(examples), generator=generator) if config.shuffle else torch.arange(len(examples))
        for rows in order.split(config.batch_size):
            supervised = [row for row in rows.tolist() if examples[row].num_supervised]
            step_tokens = sum(examples[row].num_supervised for row in supervised)
            micro_size = config.micro_batch_size or config.batch_size
            steps.append(
                [
                    _micro_batch(student, examples, supervised[k : k + micro_size], len(rows), step_tokens, config)
                    for k in range(0, len(supervised), micro_size)
                ]
            )
    return steps


def _micro_batch(student, examples, rows, step_samples, step_tokens, config) -> MicroBatch:
    batch = student.collate([examples[row] for row in rows])
    counts = torch.tensor([examples[row].num_supervised for row in rows])
    if config.loss_normalization == "example_tokens":
        normalizers = 1 / (counts.to(student.accumulator_dtype) * step_samples)
    elif config.loss_normalization == "max_length":
        normalizers = torch.ones(len(rows), dtype=student.accumulator_dtype) / (config.max_length * step_samples)
    else:
        normalizers = torch.ones(len(rows), dtype=student.accumulator_dtype) / step_tokens
    return MicroBatch(
        batch,
        rows=torch.tensor(rows).repeat_interleave(counts).to(student.device),
        columns=batch.targets % batch.input_ids.size(1),
        coefficients=normalizers.repeat_interleave(counts).to(student.device),
    )


class Gradient(NamedTuple):
    """
    A micro-batch's contribution to a step's gradient g_t.

    Attributes:
        loss (`torch.Tensor`): Σ w_{i,k} c_{i,k} ℓ_{i,k}(θ_t), detached.
        token_losses (`torch.Tensor` of shape `[n]`): ℓ_{i,k}(θ_t), detached.
        values (`list[torch.Tensor]`): Its gradient in each of the `leaves`, detached; partly left out with
            `skip_values`.
        edges (`list[GradientEdge | None]`): Where the values stand in the graph; `None` for constant ones.
        leaves (`list[torch.Tensor]`): θ_t by parameter.
        parameters (`dict[str, torch.Tensor]`): The model's weights: the leaves, in the model's dtypes.
        token_weights (`torch.Tensor` of shape `[n]`): w_{i,k}.
    """

    loss: Tensor
    token_losses: Tensor
    values: list[Tensor]
    edges: list[GradientEdge | None]
    leaves: list[Tensor]
    parameters: dict[str, Tensor]
    token_weights: Tensor


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
    The gradient of a micro-batch's weighted loss at `theta`.

    Args:
        student (`Student`): Runs the model.
        theta (`torch.Tensor` of shape `[P]`): Trainable parameters.
        micro_batch (`MicroBatch`): The samples.
        weights (`torch.Tensor` of shape `[N]`): Data weights w of the whole dataset.
        config (`InnerLoopConfig`): The inner loop.
        differentiable (`bool`): Keep the graph, so that the result can be differentiated in the token weights.
        through_theta (`bool`): And in θ.
        skip_values (`bool`): Leave out values that only take time: the graph is all that is wanted.
    """
    leaves = [part.requires_grad_() for part in student.unflatten(theta.detach(), cast=False).values()]
    parameters = student.cast(leaves)
    token_weights = weights[micro_batch.rows].requires_grad_(differentiable)
    flags = {"through_theta": through_theta, "skip_values": skip_values}

    def gradient(model):
        loss, losses = student.loss(model, micro_batch.batch, token_weights * micro_batch.coefficients, **flags)
        return loss, losses, torch.autograd.grad(loss, leaves, create_graph=differentiable, materialize_grads=True)

    def kernels():
        return TwiceDifferentiable(**flags) if config.differentiates_twice else nullcontext()

    with student.block_checkpointing(config.gradient_checkpointing, kernels), kernels():
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


class Step(NamedTuple):
    """
    What the reverse sweep needs of one optimizer step.

    Attributes:
        micro_batches (`list[MicroBatch]`): Its data.
        theta (`torch.Tensor` of shape `[P]`): θ_t.
        state (`NamedTuple`): The optimizer's s_t.
        gradient (`torch.Tensor` of shape `[P]`): g_t, before clipping.
        lr (`float`): Its learning rate.
        retained (`list[Gradient]`): The micro-batches' gradients with their graphs; empty if they were not kept.
    """

    micro_batches: list[MicroBatch]
    theta: Tensor
    state: Any
    gradient: Tensor
    lr: float
    retained: list[Gradient]


class Stretch(NamedTuple):
    """Consecutive steps of the inner loop from t = `first` on, and where they led: θ, s, and their training losses."""

    first: int
    steps: list[Step]
    theta: Tensor
    state: Any
    losses: list[Tensor]


class Trajectory:
    """
    The fine-tuning: (θ_{t+1}, s_{t+1}) = U_t(θ_t, s_t, g_t) with g_t = Σ_i w_i c_i ∇ℓ_i(θ_t), t = 0 ... T-1.

    Made by the forward sweep, which is the constructor, and read backwards, once, by the reverse sweep. The states
    before every `interval`-th step are kept. Of the last stretch of steps every state is; of an earlier one they are
    computed again when the reverse sweep gets there (checkpointing, Griewank & Walther 2000). In a stretch, the
    graphs of the last steps are kept as far as `config.memory_budget` goes.

    Args:
        student (`Student`): The model at its start; its stored weights are only read.
        steps (`list[list[MicroBatch]]`): The micro-batches of each of T steps.
        weights (`torch.Tensor` of shape `[N]`): Data weights w.
        config (`InnerLoopConfig`): Optimizer and schedule.

    Attributes:
        theta (`torch.Tensor` of shape `[P]`): θ_T.
        initial_theta (`torch.Tensor` of shape `[P]`): θ_0.
        losses (`torch.Tensor` of shape `[T]`): Training losses.
    """

    def __init__(self, student: Student, steps: Sequence[list[MicroBatch]], weights: Tensor, config: InnerLoopConfig):
        self._student, self._steps, self._weights, self._config = student, steps, weights, config
        self._optimizer = config.make_optimizer()
        self._rates = config.learning_rates(len(steps))
        self.initial_theta = theta = student.initial_theta()
        state = self._optimizer.init(theta)
        self._graph_size: float | None = None  # bytes for each unit of `_size`; not yet known
        step_bytes = 4 * theta.nbytes  # θ, g and two moments
        if isinstance(config.checkpoint_interval, int):
            interval = config.checkpoint_interval
        else:
            free = _free_memory(torch.device("cpu") if config.offload_trajectory else student.device)
            interval = 1 if step_bytes * len(steps) <= free // 2 else math.isqrt(len(steps))
        # Stretches of one step would each be computed again: every state is kept in a single stretch
        length = len(steps) if interval == 1 else interval
        self._budget = 0
        if config.differentiates_twice and isinstance(config.memory_budget, int):
            self._budget = config.memory_budget
        elif config.differentiates_twice:
            held = 0 if config.offload_trajectory else step_bytes * (length + len(steps) // length)
            self._budget = (_free_memory(student.device) - held) // 2

        losses: list[Tensor] = []
        self._checkpoints = []
        for first in range(0, len(steps), length):
            last = first + length >= len(steps)
            self._checkpoints.append((first, min(first + length, len(steps)), self._put(theta), self._put(state)))
            self._last = self._run(first, min(first + length, len(steps)), theta, state, keep=last)
            theta, state = self._last.theta, self._last.state
            losses += self._last.losses
        self.theta = theta
        self.losses = torch.stack(losses)

    def stretches_backwards(self) -> Iterator[Stretch]:
        """The stretches with all their steps, the last one first. Frees what it has handed out."""
        yield self._last
        del self._last
        self._checkpoints.pop()
        while self._checkpoints:
            first, end, theta, state = self._checkpoints.pop()
            yield self._run(first, end, self.get(theta), self.get(state), keep=True)

    def _run(self, first: int, end: int, theta: Tensor, state: Any, keep: bool) -> Stretch:
        """Take the steps t = `first` ... `end` - 1, and keep what the reverse sweep needs of them."""
        student, optimizer, clip_norm = self._student, self._optimizer, self._config.max_grad_norm
        # While a graph's size is not known, the next one is measured, and dropped again if it is not to be kept
        first_retained = self._first_retained(first, end) if keep and self._budget > 0 else end
        done, losses = [], []
        for t in range(first, end):
            gradient, loss, retained = None, theta.new_zeros(()), []
            for micro_batch in self._steps[t]:
                gradient_of = partial(
                    micro_batch_gradient, student, theta, micro_batch, self._weights, self._config, through_theta=t > 0
                )
                if first_retained is None:
                    with _GraphSize() as measured:
                        part = gradient_of(differentiable=True)
                    self._graph_size = measured.bytes(student) / _size(micro_batch)
                    first_retained = self._first_retained(first, end)
                else:
                    part = gradient_of(differentiable=t >= first_retained)
                if gradient is None:
                    gradient = torch.cat([value.flatten() for value in part.values])
                else:
                    torch._foreach_add_(list(student.unflatten(gradient, cast=False).values()), part.values)
                loss += part.loss
                if t >= first_retained:
                    retained.append(part._replace(values=[]))
                del part
            if gradient is None:  # a batch of empty samples
                gradient = torch.zeros_like(theta)
            if keep:
                step = Step(self._steps[t], theta, state, gradient, self._rates[t], retained)
                done.append(
                    step._replace(theta=self._put(theta), state=self._put(state), gradient=self._put(gradient))
                )
            losses.append(loss)
            clipped = gradient if clip_norm is None else clip(gradient, clip_norm)
            theta, state = optimizer.update(clipped, state, theta, self._rates[t])
        return Stretch(first, done, theta, state, losses)

    def _first_retained(self, first: int, end: int) -> Any:
        """The first of the last steps before `end` whose graphs together fit into the budget; `None` if not known."""
        if self._graph_size is None:
            return None
        budget: float = self._budget
        while end > first and budget >= 0:
            budget -= self._graph_size * sum(map(_size, self._steps[end - 1]))
            end -= budget >= 0
        return end

    def _put(self, state: Any) -> Any:
        """A state where states are kept. Copies to pinned memory do not wait for the device."""
        if not self._config.offload_trajectory or self._student.device.type != "cuda":
            return state
        return _map(lambda x: torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True), state)

    def get(self, state: Any) -> Any:
        """A kept state on the student's device."""
        return _map(lambda x: x.to(self._student.device, non_blocking=True), state)


def _map(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """`function` of a tensor, or of each tensor in an optimizer's state."""
    if isinstance(state, Tensor):
        return function(state)
    return type(state)(*(function(x) if isinstance(x, Tensor) else x for x in state))


class _GraphSize(torch.autograd.graph.saved_tensors_hooks):
    """Counts the memory that the graphs built within it hold on to."""

    def __init__(self):
        self.storages: dict[int, int] = {}
        super().__init__(self._count, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation that holds its own output would never be freed

    def bytes(self, student: Student) -> int:
        """Bytes held beside the model's own weights."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in student.model.parameters()}
        return sum(size for pointer, size in self.storages.items() if pointer not in weights)


def _size(micro_batch: MicroBatch) -> int:
    """What a graph's size is proportional to. Activations grow with B · L; where attention keeps more, its part."""
    return micro_batch.batch.input_ids.numel() * micro_batch.batch.input_ids.size(1)


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available
