"""The inner loop: fine-tuning the student on the data, one optimizer step after the other (the forward sweep)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import SchedulerType, get_scheduler

from ..student import Batch, Student, TokenizedExample, token_losses
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
    max_length: int = 1024
    loss_normalization: str = "example_tokens"
    attribution: str = "metagradient"
    max_grad_norm: float | None = None
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    per_token: bool = False
    memory_budget: int | str = "auto"
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
        _check_choice("lr_scheduler_type", self.lr_scheduler_type, _SCHEDULES)
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
    The part of a step's batch that one forward pass takes.

    Attributes:
        rows (`torch.Tensor` of shape `[B]`): Which samples of the dataset these are.
        batch (`Batch`): Their tokens, `[B, L]`.
        coefficients (`torch.Tensor` of shape `[B, L]`): The normaliser c_{i,k} of each token's loss, 0 where
            unsupervised.
    """

    rows: Tensor
    batch: Batch
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
    supervised = (batch.labels != -100).to(student.accumulator_dtype)
    supervised[:, 0] = 0  # nothing precedes the first token
    if config.loss_normalization == "example_tokens":
        coefficients = supervised / (supervised.sum(dim=1, keepdim=True) * step_samples)
    elif config.loss_normalization == "max_length":
        coefficients = supervised / (config.max_length * step_samples)
    else:
        coefficients = supervised / step_tokens
    return MicroBatch(torch.tensor(rows, device=student.device), batch, coefficients)


def attention_kernels(config: InnerLoopConfig) -> AbstractContextManager:
    """
    Attention by kernels that have a second derivative, if one is taken. Both sweeps must run the same ones.

    The flash and memory-efficient kernels of `scaled_dot_product_attention` have none; the math kernel does.
    """
    return sdpa_kernel(SDPBackend.MATH) if config.hvp == "double_backward" else nullcontext()


class Gradient(NamedTuple):
    """
    A micro-batch's contribution to a step's gradient g_t.

    Attributes:
        loss (`torch.Tensor`): Σ w_{i,k} c_{i,k} ℓ_{i,k}(θ_t), detached.
        token_losses (`torch.Tensor` of shape `[B, L]`): c_{i,k} ℓ_{i,k}(θ_t), detached.
        value (`torch.Tensor` of shape `[P]`): Its gradient in θ_t.
        parameters (`dict[str, torch.Tensor]`): The weights it was taken at.
        theta (`torch.Tensor` of shape `[P]`): θ_t, the leaf that `parameters` are views of.
        token_weights (`torch.Tensor` of shape `[B, L]`): w_{i,k}.
    """

    loss: Tensor
    token_losses: Tensor
    value: Tensor
    parameters: dict[str, Tensor]
    theta: Tensor
    token_weights: Tensor


def micro_batch_gradient(
    student: Student, theta: Tensor, micro_batch: MicroBatch, weights: Tensor, differentiable: bool
) -> Gradient:
    """
    The gradient of a micro-batch's weighted loss at `theta`.

    Args:
        student (`Student`): Runs the model.
        theta (`torch.Tensor` of shape `[P]`): Trainable parameters.
        micro_batch (`MicroBatch`): The samples.
        weights (`torch.Tensor` of shape `[N]`): Data weights w of the whole dataset.
        differentiable (`bool`): Keep the graph, so that the result can be differentiated in θ and in the token
            weights.
    """
    theta = theta.detach().requires_grad_()
    token_weights = weights[micro_batch.rows, None].expand_as(micro_batch.coefficients).clone()
    token_weights.requires_grad_(differentiable)
    parameters = student.unflatten(theta)

    def gradient(model):
        input_ids, attention_mask, labels = micro_batch.batch
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        losses = micro_batch.coefficients * token_losses(logits, labels)
        loss = (token_weights * losses).sum()
        (value,) = torch.autograd.grad(loss, theta, create_graph=differentiable)
        return loss.detach(), losses.detach(), value

    loss, losses, value = student.run(parameters, gradient)
    return Gradient(loss, losses, value, parameters, theta, token_weights)


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


class Trajectory(NamedTuple):
    """A finished forward sweep: its steps, θ_T, s_T, and the training losses `[T]`."""

    steps: list[Step]
    theta: Tensor
    state: Any
    losses: Tensor


def forward_sweep(
    student: Student, steps: Sequence[list[MicroBatch]], weights: Tensor, config: InnerLoopConfig
) -> Trajectory:
    """
    Fine-tune the student: (θ_{t+1}, s_{t+1}) = U_t(θ_t, s_t, g_t) with g_t = Σ_i w_i c_i ∇ℓ_i(θ_t).

    The graphs of the last steps are kept as far as `config.memory_budget` goes. What a graph takes is measured on the
    first micro-batch, whose own is dropped again if its step is not among them.

    Args:
        student (`Student`): The model at its start; its stored weights are only read.
        steps (`list[list[MicroBatch]]`): The micro-batches of each step.
        weights (`torch.Tensor` of shape `[N]`): Data weights w.
        config (`InnerLoopConfig`): Optimizer and schedule.
    """
    optimizer = config.make_optimizer()
    theta = student.initial_theta()
    state = optimizer.init(theta)
    budget = _retention_budget(student, 4 * theta.nbytes * len(steps), config)
    first_retained = None if budget > 0 else len(steps)  # None: not yet known
    done, losses = [], []
    for t, (micro_batches, lr) in enumerate(zip(steps, config.learning_rates(len(steps)), strict=True)):
        gradient, loss, retained = torch.zeros_like(theta), theta.new_zeros(()), []
        for micro_batch in micro_batches:
            if first_retained is None:
                graph_size = _GraphSize()
                with graph_size:
                    part = micro_batch_gradient(student, theta, micro_batch, weights, differentiable=True)
                first_retained = _first_retained(steps, micro_batch, graph_size.bytes(student), budget)
            else:
                part = micro_batch_gradient(student, theta, micro_batch, weights, differentiable=t >= first_retained)
            gradient += part.value.detach()
            loss += part.loss
            if t >= first_retained:
                retained.append(part)
            del part
        done.append(Step(micro_batches, theta, state, gradient, lr, retained))
        losses.append(loss)
        if config.max_grad_norm is not None:
            gradient = clip(gradient, config.max_grad_norm)
        theta, state = optimizer.update(gradient, state, theta, lr)
    return Trajectory(done, theta, state, torch.stack(losses))


class _GraphSize(torch.autograd.graph.saved_tensors_hooks):
    """Counts the memory that the graphs built within it hold on to."""

    def __init__(self):
        self.storages: dict[int, int] = {}
        super().__init__(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes(self, student: Student) -> int:
        """Bytes held beside the model's own weights."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in student.model.parameters()}
        return sum(size for pointer, size in self.storages.items() if pointer not in weights)


def _retention_budget(student: Student, trajectory_bytes: int, config: InnerLoopConfig) -> int:
    """Bytes for retained graphs. "auto" leaves room for the trajectory: θ, g and two moments of every step."""
    if config.attribution == "dataset" or config.hvp == "finite_difference":
        return 0  # there is no second derivative to keep a graph for
    if isinstance(config.memory_budget, int):
        return config.memory_budget
    if student.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(student.device)
        free += torch.cuda.memory_reserved(student.device) - torch.cuda.memory_allocated(student.device)
    else:
        free = psutil.virtual_memory().available
    return (free - trajectory_bytes) // 2


def _first_retained(steps: Sequence[list[MicroBatch]], measured: MicroBatch, measured_bytes: int, budget: int) -> int:
    """The first of the last steps whose graphs together fit into the budget, judged by one micro-batch's graph."""

    def size(micro_batch):
        # Activations grow with B · L, attention weights with B · L²: the latter, to be safe.
        return micro_batch.coefficients.numel() * micro_batch.coefficients.size(1)

    first = len(steps)
    while first > 0 and budget >= 0:
        budget -= measured_bytes * sum(map(size, steps[first - 1])) // size(measured)
        first -= budget >= 0
    return first
