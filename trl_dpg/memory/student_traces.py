"""What one micro-batch of the student needs: the sweeps' own functions, run on tensors without data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..kernels.blocks import of_an_accelerator
from ..kernels.layers import lean_layers
from ..metagradients import InnerLoopConfig
from ..metagradients.batches import MicroBatch, plan_steps
from ..metagradients.fine_tuning import modes
from ..metagradients.goals import MetricFunction
from ..metagradients.gradient import micro_batch_gradient
from ..metagradients.per_sample import sample_gradients, sample_products
from ..metagradients.reverse import _pull_back
from ..metrics import LanguageModelingMetric
from ..student import Batch, FinetunedStudent, Student, TokenizedExample
from .empty_models import held_tensors
from .live_bytes import LiveBytes


class Needs(NamedTuple):
    """
    What a micro-batch takes in each sweep, in bytes.

    Attributes:
        forward (`int`): The most while its part of the gradient g is computed, with that part of g.
        kept (`int`): What of it is kept for the reverse sweep, if there is room.
        reverse (`int`): The most in the reverse sweep, with what was kept.
    """

    forward: int
    kept: int
    reverse: int


class StudentTraces:
    """
    Traces of a student whose matrices are fake tensors, see [`~trl_dpg.memory.empty_models.empty_model`].

    Args:
        student (`Student`): The student. It is assumed that its layers tell samples apart.
        length (`int`): Tokens of a sample. In a micro-batch of several, one sample is a token shorter, so that there
            is a mask.
        accelerator (`bool`): Whether tensors are processed in the blocks of an accelerator.
    """

    def __init__(self, student: Student, length: int, accelerator: bool):
        self.student, self.length, self.accelerator = student, length, accelerator
        fake = next(p for p in student.model.parameters() if isinstance(p, FakeTensor))
        self.fake_mode = fake.fake_mode
        with self.fake_mode:
            self.theta = student.initial_theta()
        if student.tells_samples_apart is None:
            student.tells_samples_apart = True
        self._known: dict[tuple, Any] = {}

    @property
    def theta_bytes(self) -> int:
        """Bytes of a vector `[P]`."""
        return self.theta.nbytes

    def by_sample(self, size: int, config: InnerLoopConfig, keep: bool, num_rows: int) -> Needs | None:
        """A micro-batch whose samples' gradients come out of its backward pass; `None` if they do not."""

        def trace() -> Needs | None:
            micro_batch, u = self._micro_batch(size, config), self._directions(num_rows)
            with self._sweeping(), self._live() as live:
                part = sample_gradients(self.student, self.theta, micro_batch, None, config, keep)
                if part is None:
                    return None
                forward, part = live.peak, part._replace(values=[])
                kept = live.peak = live.now
                if keep:
                    part.products(u)
                else:
                    part = None
                    live.peak = live.now
                    sample_products(self.student, self.theta, micro_batch, config, u)
                return Needs(forward, kept if keep else 0, live.peak)

        return self._once(("by sample", size, keep, num_rows, config.gradient_checkpointing), trace)

    def twice(self, size: int, config: InnerLoopConfig, keep: bool, through_theta: bool) -> Needs:
        """A micro-batch whose gradient is differentiated again."""

        def trace() -> Needs:
            micro_batch, u = self._micro_batch(size, config), self._directions(1)
            weights = self._fake(torch.ones(size, dtype=self.theta.dtype))
            arguments = (self.student, self.theta, micro_batch, weights, config)
            flags: dict[str, Any] = dict(differentiable=True, through_theta=through_theta)
            with self._sweeping(), self._live() as live:
                part = micro_batch_gradient(*arguments, **(flags if keep else {}))
                forward, part = live.peak, part._replace(values=[])
                kept = live.now
                if not keep:
                    del part
                    live.peak = live.now
                    part = micro_batch_gradient(*arguments, **flags, skip_values=True)
                    part = part._replace(values=[])
                else:
                    live.peak = live.now
                _pull_back(self.student, part, [own[0] for own in u], through_theta, keep=False)
                return Needs(forward, kept if keep else 0, live.peak)

        return self._once(("twice", size, keep, through_theta, config.gradient_checkpointing), trace)

    def once(self, size: int, config: InnerLoopConfig) -> Needs:
        """A micro-batch whose gradient is not differentiated, or by the difference of two gradients."""

        def trace() -> Needs:
            micro_batch = self._micro_batch(size, config)
            weights = self._fake(torch.ones(size, dtype=self.theta.dtype))
            with self._sweeping(), self._live() as live:
                part = micro_batch_gradient(self.student, self.theta, micro_batch, weights, config)
                forward, own = live.peak, live.now
                del part
            return Needs(forward, 0, forward + own + 2 * self.theta_bytes)  # the other gradient, and θ ± h u

        return self._once(("once", size, config.differentiates_twice, config.gradient_checkpointing), trace)

    def metric(self, metric: MetricFunction) -> int:
        """The most that a metric needs, with its gradient."""

        def trace() -> int:
            with modes(self.student):
                theta = self.theta.detach().requires_grad_()
                finetuned = FinetunedStudent(self.student, theta, self.theta)
                own = _longest_batches(metric, self.student)
                with self._blocks(), self._live(theta) as live:
                    finetuned.evaluate(own)
            return live.peak

        return self._once(("metric", id(metric)), trace)

    def _once(self, key: tuple, trace: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = trace()
        return self._known[key]

    def _live(self, *others: Tensor) -> LiveBytes:
        return LiveBytes([*held_tensors(self.student.model), self.theta, *others])

    def _blocks(self):
        return of_an_accelerator() if self.accelerator else nullcontext()

    @contextmanager
    def _sweeping(self) -> Iterator[None]:
        with modes(self.student), lean_layers(self.student.model), self._blocks():
            yield

    def _directions(self, num_rows: int) -> list[Tensor]:
        """u `[M, *shape]` of each parameter."""
        return list(self.student.unflatten(self.theta.new_zeros(num_rows, self.theta.numel()), cast=False).values())

    def _fake(self, tensor: Tensor) -> Tensor:
        return self.fake_mode.from_tensor(tensor)

    def _micro_batch(self, size: int, config: InnerLoopConfig) -> MicroBatch:
        full = [0] * max(self.length, 3)
        examples = [TokenizedExample(full, full)] * (size - 1)
        last = full[1:] if size > 1 else full
        plan = replace(config, batch_size=size, micro_batch_size=None, num_epochs=1, shuffle=False)
        with modes(self.student):
            (((ids, mask, labels, targets), *others),) = plan_steps(
                self.student, [*examples, TokenizedExample(last, last)], plan
            )[0]
        batch = Batch(self._fake(ids), None if mask is None else self._fake(mask), *map(self._fake, (labels, targets)))
        return MicroBatch(batch, *map(self._fake, others))


def _longest_batches(metric: MetricFunction, student: Student) -> MetricFunction:
    """A metric of language modelling on its longest texts alone, which take the most memory. Others as they are."""
    if not isinstance(metric, LanguageModelingMetric):
        return metric
    short = copy(metric)
    short._tokenized = {student: metric._examples(student)[-2 * metric.batch_size :]}  # type: ignore[assignment]
    return short
