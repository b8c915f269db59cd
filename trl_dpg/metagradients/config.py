"""`InnerLoopConfig`: how the student is fine-tuned, and how its metric's change is attributed to the samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from transformers import SchedulerType, get_scheduler

from .optimizers import Optimizer, adamw, sgd


_SCHEDULES = (
    SchedulerType.CONSTANT,
    SchedulerType.CONSTANT_WITH_WARMUP,
    SchedulerType.LINEAR,
    SchedulerType.COSINE,
    SchedulerType.COSINE_WITH_RESTARTS,
    SchedulerType.POLYNOMIAL,
    SchedulerType.INVERSE_SQRT,
)


MEMORY_ONLY = (
    "micro_batch_size",
    "memory_budget",
    "gradient_checkpointing",
    "checkpoint_interval",
    "offload_trajectory",
)
"""Fields of [`InnerLoopConfig`] that change memory and time, and no scores."""


AUTO = ("learning_rate", "eps_root")
"""Fields of [`InnerLoopConfig`] that may be `"auto"`."""


class SettingsError(ValueError):
    """Settings that do not fit the data, or an earlier run. Fields and arguments are in backticks in the message."""


class NotFiniteError(FloatingPointError):
    """
    Numbers of a fine-tuning that are not finite.

    Args:
        message (`str`): What is not finite, in which step, and the likely cause.
        rows (`list[int]`): The samples that it was found at, by their place in the dataset.
    """

    def __init__(self, message: str, rows: Sequence[int]):
        super().__init__(message)
        self.rows = list(rows)


@dataclass
class InnerLoopConfig:
    """
    How the student is fine-tuned on a dataset, and how its metric's change is attributed to the samples.

    Args:
        > Parameters that control the optimizer

        optimizer (`str`, *optional*, defaults to `"adamw"`):
            `"adamw"` or `"sgd"`, as in `torch.optim`.
        learning_rate (`float` or `str`, *optional*, defaults to `1e-4`):
            Peak learning rate. `"auto"`: chosen by [`~trl_dpg.tuning.tune`]. [`DPGReward`] does this on its first
            batch; everything else needs a number.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`):
            AdamW's decay rates of the first and second moment.
        eps (`float`, *optional*, defaults to `1e-8`):
            AdamW's epsilon, outside the square root.
        eps_root (`float` or `str`, *optional*, defaults to `1e-9`):
            Added to AdamW's second moment inside the square root. It makes training smooth in the data weights. If it
            is too small for the gradients, the scores become very large and are useless. `"auto"`: as for the learning
            rate.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay. For AdamW it is decoupled, for SGD it is added to the gradient.
        momentum (`float`, *optional*, defaults to `0.0`):
            SGD's momentum.
        max_grad_norm (`float`, *optional*):
            Clips the norm of each step's gradient.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            A name of [`~transformers.SchedulerType`] that needs no further arguments.
        warmup_steps (`int`, *optional*, defaults to `0`):
            Steps of linear warm-up, for schedules that have a warm-up.

        > Parameters that control the data

        batch_size (`int`, *optional*, defaults to `8`):
            Samples per optimizer step. The last step of an epoch may be smaller.
        num_epochs (`int`, *optional*, defaults to `1`):
            Passes over the dataset. A sample's score is the sum over all epochs.
        shuffle (`bool`, *optional*, defaults to `False`):
            Whether to shuffle the samples before every epoch.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the shuffling.
        micro_batch_size (`int`, *optional*):
            Samples per forward pass. A smaller value saves memory. It changes the numbers only by rounding.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether the student's blocks keep only their inputs and run again in each backward pass. This saves memory
            in the forward sweep, but not in the reverse sweep, where the gradient's graph keeps the blocks'
            activations. It takes more time and does not change the numbers.
        max_length (`int`, *optional*, defaults to `1024`):
            Longest sample, in tokens. Longer samples are cut off.
        loss_normalization (`str`, *optional*, defaults to `"example_tokens"`):
            `"example_tokens"`: mean over a sample's supervised tokens, then over the batch. `"max_length"`: sum over a
            sample's tokens divided by `max_length`, then mean over the batch (the paper's). `"batch_tokens"`: mean
            over the supervised tokens of the batch (what [`~trl.SFTTrainer`] does).

        > Parameters that control the attribution

        attribution (`str`, *optional*, defaults to `"metagradient"`):
            `"metagradient"`: ∂Φ/∂w_i. `"first_order"`: the same without the Hessian of the student's loss, so that a
            score counts a sample's own steps, and not how these change the gradients of later steps. It needs no
            second derivative, costs less, and is exact with one step. [`~trl_dpg.verification.verify`] says how close
            it is. `"dataset"`: the metric itself for every sample (the paper's naive baseline).
        per_token (`bool`, *optional*, defaults to `False`):
            Also return ∂Φ/∂w_{i,k}, the score of each token.
        memory_budget (`int` or `str`, *optional*, defaults to `"auto"`):
            Memory in bytes for graphs of the forward sweep, and for the samples' gradients where these suffice: in the
            first step, and with `"first_order"`. The reverse sweep does not compute again what was kept. Graphs are
            measured, once for each shape, and freed if they do not fit. `"auto"`: half of a GPU's free memory, or a
            quarter of the host's, so that memory is left for the generator's update. `0`: keep nothing. It changes the
            numbers only by rounding.
        checkpoint_interval (`int` or `str`, *optional*, defaults to `"auto"`):
            Steps between the states (parameters and moments) that are kept for the reverse sweep. The states in
            between are computed again, one stretch of steps at a time. `"auto"`: 1 (keep every state) if all states
            take at most half of the free memory, otherwise √T, which keeps 2√T states. It changes the numbers only by
            rounding.
        offload_trajectory (`bool`, *optional*, defaults to `False`):
            Whether to keep the states in pinned host memory instead of on the student's GPU.
        hvp (`str`, *optional*, defaults to `"double_backward"`):
            Method for Hessian-vector products. `"double_backward"`: exact. `"finite_difference"`: the difference of
            two gradients, for students whose kernels are not twice differentiable (flash attention, custom kernels).
            It is not exact with several steps.
    """

    optimizer: str = "adamw"
    learning_rate: float | str = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    eps_root: float | str = 1e-9
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
        _check_numbers(self)
        _check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        _check_choice("loss_normalization", self.loss_normalization, ("example_tokens", "max_length", "batch_tokens"))
        _check_choice("attribution", self.attribution, ("metagradient", "first_order", "dataset"))
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
        for name in AUTO:
            if isinstance(vars(self)[name], str) and vars(self)[name] != "auto":
                raise ValueError(
                    f"{name} must be a number or 'auto', got {vars(self)[name]!r}. 'auto': the first batch chooses it."
                )
        for name in ("learning_rate", "eps", "eps_root", "weight_decay", "momentum", "warmup_steps"):
            if name not in self.auto and vars(self)[name] < 0:
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
        return adamw(self.betas, self.eps, float(self.eps_root), self.weight_decay)

    @property
    def auto(self) -> tuple[str, ...]:
        """Names of the fields that are `"auto"`."""
        return tuple(name for name in AUTO if vars(self)[name] == "auto")

    def check_numbers(self) -> None:
        """
        Refuse fields that are still `"auto"`.

        Raises:
            `SettingsError`: If there are any.
        """
        if self.auto:
            names = " and ".join(f"`{name}`" for name in self.auto)
            raise SettingsError(
                f"{names}: 'auto' stands for a number that is not chosen yet. Give a number, or choose one with "
                "trl_dpg.tuning.tune."
            )

    @property
    def differentiates_twice(self) -> bool:
        """Whether the reverse sweep differentiates the graph of the gradient."""
        return self.attribution != "dataset" and self.hvp == "double_backward"

    def learning_rates(self, num_steps: int) -> list[float]:
        """The learning rate of each of `num_steps` steps, computed by the schedules of transformers."""
        dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=float(self.learning_rate))
        scheduler = get_scheduler(self.lr_scheduler_type, dummy, self.warmup_steps, num_steps)
        rates = []
        for _ in range(num_steps):
            rates.append(scheduler.get_last_lr()[0])
            dummy.step()
            scheduler.step()
        return rates


def _check_numbers(config: InnerLoopConfig) -> None:
    """Refuse numbers that are none, or not finite: `batch_size=True`, `weight_decay=nan`."""
    for name in ("batch_size", "num_epochs", "max_length", "micro_batch_size", "warmup_steps", "seed"):
        value = vars(config)[name]
        if value is None and name == "micro_batch_size":
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name} must be a whole number, got {value!r}.")
    numbers = {name: vars(config)[name] for name in ("eps", "weight_decay", "momentum", "max_grad_norm")}
    numbers |= {name: vars(config)[name] for name in AUTO if not isinstance(vars(config)[name], str)}
    numbers |= {f"betas[{index}]": beta for index, beta in enumerate(config.betas)}
    for name, value in numbers.items():
        if value is None and name == "max_grad_norm":
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}.")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}. Choose one of: {', '.join(repr(str(c)) for c in choices)}.")
