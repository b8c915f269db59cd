"""The student's fine-tuning as a function of the data weights."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from zlib import crc32

import torch
from torch import Tensor

from ..kernels.layers import lean_layers
from ..ranks import ALONE, Ranks, checksums
from ..student import Examples, FinetunedStudent, Student
from .batches import MicroBatch, plan_steps
from .config import MEMORY_ONLY, InnerLoopConfig
from .host_memory import keep_freed_memory
from .out_of_memory import within_memory
from .trajectory import Trajectory, forward_sweep


@contextmanager
def modes(student: Student) -> Iterator[None]:
    """Layers in train mode, gradients on and autocast off, independent of the caller's modes."""
    autocast = torch.autocast(student.device.type, enabled=False)
    with student.train_mode(), torch.inference_mode(False), torch.enable_grad(), autocast:
        yield


class FineTuning:
    """
    The student's fine-tuning on a dataset as a function of the data weights: w ↦ θ_T(w) and w ↦ Φ(θ_T(w)).

    `metagradient` differentiates it at one w. For any other w, θ_T and Φ are computed with the same order of samples,
    the same kernels and the same arithmetic.

    Args:
        student (`Student`): The student before fine-tuning.
        examples (`list[str]`, `list[dict]` or [`~datasets.Dataset`]): N samples, see [`Student.tokenize`].
        config (`InnerLoopConfig`): The inner loop.
        ranks (`Ranks`, *optional*): The processes that compute it together, with the same arguments. They call the
            same methods in the same order. This process alone if not given.

    Attributes:
        examples (`list[str]`, `list[dict]` or [`~datasets.Dataset`]): The N samples as they were given.
        samples (`list[TokenizedExample]`): The N samples as the student reads them.
        steps (`list[list[MicroBatch]]`): This rank's micro-batches of each of T steps.

    Raises:
        `ValueError`: If the ranks differ in the samples, the inner loop, or the student's frozen weights. Trained
            weights may differ: those of the first rank are taken.
    """

    def __init__(self, student: Student, examples: Examples, config: InnerLoopConfig, ranks: Ranks = ALONE):
        self.student, self.examples, self.config, self.ranks = student, examples, config, ranks
        with ranks.guard("The student's fine-tuning"):
            config.check_numbers()
            student.look_again()
            if student.device.type == "cpu":
                keep_freed_memory()
            self.samples = student.tokenize(examples, config.max_length, return_ends=config.per_token)
            if not ranks.alone:
                self._check_ranks()
            self.plan()

    def plan(self) -> None:
        """Plan the steps. Micro-batches have at most the size that fitted into memory before."""
        size = self.config.micro_batch_size or self.config.batch_size
        known = self.ranks.least(self.student.micro_batch_size or size)
        if known < size:
            self.config = replace(self.config, micro_batch_size=known)
        with modes(self.student):
            self.steps = plan_steps(self.student, self.samples, self.config, self.ranks)

    def _check_ranks(self) -> None:
        own = {*MEMORY_ONLY} - {"checkpoint_interval"}  # on which the exchanges depend
        inner_loop = {name: value for name, value in asdict(self.config).items() if name not in own}
        samples = crc32(json.dumps([(sample.input_ids, sample.labels) for sample in self.samples]).encode())
        new = self.ranks.is_new(self.student.model)
        frozen = [p for p in self.student.model.parameters() if new and not p.requires_grad]
        if self.student.num_trainable < self.ranks.size:
            raise ValueError(
                f"{self.ranks.size} ranks cannot share a student with {self.student.num_trainable} trained numbers."
            )
        student = (self.student.num_trainable, checksums(frozen))
        self.ranks.check_same(**{"inner loop": inner_loop, "samples": samples, "student": student})

    def initial_theta(self) -> Tensor:
        """θ_0 of shape `[P]`, that of the first rank."""
        return self.ranks.first(self.student.initial_theta())

    @property
    def samples_are_identical(self) -> bool:
        """Whether there are several samples, and all of them are the same tokens with the same labels."""
        first, *others = self.samples
        return bool(others) and all(
            (sample.input_ids, sample.labels) == (first.input_ids, first.labels) for sample in others
        )

    @contextmanager
    def sweeping(self) -> Iterator[None]:
        """The modes, and the layers that both sweeps use."""
        with modes(self.student), lean_layers(self.student.model):
            yield

    def sweep(self, weights: Tensor, keep_states: bool, num_metrics: int = 1) -> Trajectory:
        """Run the forward sweep with data weights w of shape `[N]`, for a reverse sweep with this many metrics."""
        weights = weights.to(self.student.device, self.student.accumulator_dtype)
        with self.sweeping():
            arguments = (self.student, self.steps, weights, self.config, keep_states, num_metrics)
            return forward_sweep(*arguments, self.ranks, self.initial_theta())

    def theta(self, weights: Tensor) -> Tensor:
        """θ_T(w) of shape `[P]`, for w of shape `[N]`."""
        return within_memory(self, lambda: self.sweep(weights, keep_states=False).theta, "The student's fine-tuning")

    def metric(self, weights: Tensor, metric: Callable[[FinetunedStudent], Tensor]) -> float:
        """Φ(θ_T(w)), for w of shape `[N]`."""
        return self.evaluate(self.theta(weights), metric)

    def evaluate(self, theta: Tensor, metric: Callable[[FinetunedStudent], Tensor]) -> float:
        """Φ(θ), for θ of shape `[P]`."""
        return within_memory(self, lambda: self._evaluate(theta, metric), "The metric")

    def _evaluate(self, theta: Tensor, metric: Callable[[FinetunedStudent], Tensor]) -> float:
        finetuned = FinetunedStudent(self.student, theta, self.initial_theta(), self.ranks)
        with modes(self.student), torch.no_grad():
            return self.ranks.first(finetuned.evaluate(metric)[0].detach().clone().to(theta.device)).item()

    def losses(self, theta: Tensor) -> Tensor:
        """The training loss of each step's samples for one θ of shape `[P]`. Shape `[T]`, in nats, on the CPU."""
        return within_memory(self, lambda: self._losses(theta), "The student's losses")

    def _losses(self, theta: Tensor) -> Tensor:
        parameters = self.student.unflatten(theta)

        def loss(micro_batch: MicroBatch) -> float:
            batch, weights = micro_batch.batch, micro_batch.coefficients
            return self.student.run(parameters, lambda model: self.student.loss(model, batch, weights)[0]).item()

        with self.sweeping(), torch.no_grad():
            losses = [float(sum(map(loss, step))) for step in self.steps]
            return self.ranks.sum(torch.tensor(losses, device=theta.device)).cpu()
