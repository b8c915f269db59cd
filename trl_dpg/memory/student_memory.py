"""The memory of a reward step: a student's weights, trajectory, graphs, micro-batch and metric, phase by phase."""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..metagradients import InnerLoopConfig
from ..metagradients.goals import MetricFunction, plan_goals
from ..metagradients.memory_plan import MemoryPlan
from .student_traces import Needs, StudentTraces
from .trajectory_bytes import num_moments, trajectory_bytes


VJP_TENSORS = 6
"""Intermediate results of the optimizer's vector-Jacobian product, each of one block."""


@dataclass
class Phase:
    """
    A phase of a training step, and what is in memory at its peak.

    Attributes:
        name (`str`): What happens in it.
        parts (`dict[str, int]`): Bytes by part.
    """

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Plan(NamedTuple):
    """
    The student's fine-tuning in numbers.

    Attributes:
        num_steps (`int`): T.
        length (`int`): Steps in a stretch.
        micro_batches (`float`): Micro-batches of a step; a smaller one counts as a part.
        size (`int`): Samples of a micro-batch.
        by_sample (`int`): Steps of a stretch whose scores come from the samples' gradients.
        twice (`int`): Steps of a stretch whose gradient is differentiated again.
    """

    num_steps: int
    length: int
    micro_batches: float
    size: int
    by_sample: int
    twice: int


class StudentMemory:
    """
    What a reward step needs on the student's device, beside the weights of the student and of others.

    The parts, with V the bytes of a vector of P trained parameters, σ the moments of the optimizer (AdamW 2, SGD 1)
    and M the metrics:

    - trajectory: see [`~trl_dpg.memory.trajectory_bytes.trajectory_bytes`]. With `offload_trajectory`, V (2 + σ) of
      the step at hand.
    - optimizer: in the forward sweep V (g, where micro-batches are summed, and its clipped copy). Afterwards
      M V (λ), and with several steps M σ V (the cotangents of the moments) and, if M > 1 or with clipping, M V (u).
    - graphs and samples' gradients: as many micro-batches as `memory_budget` has room for. What one of them takes is
      measured on the student's own code, with tensors without data, see [`StudentTraces`].
    - micro-batch: what the micro-batch at hand takes beside this, measured in the same way. If it is more: six blocks
      of the optimizer's vector-Jacobian product.
    - metric: what its evaluation takes with its gradient, measured in the same way.

    Of R ranks, each has a share of a step's samples, and V / R bytes of each vector of the trajectory and of the
    cotangents. It has θ_0, θ and u whole, and the sums before they are shared out: up to V (2 + 2 M).

    Args:
        traces (`StudentTraces`): The student, and the length of its samples.
        config (`InnerLoopConfig`): The inner loop.
        num_samples (`int`): N, samples of a dataset.
        metric (`Callable`, *optional*): Φ. Without it, the metric is not counted.
        free (`int`): Bytes that are free when the fine-tuning begins. They decide what `"auto"` is.
        num_ranks (`int`, *optional*, defaults to 1): R, ranks that score the dataset together.
    """

    def __init__(
        self,
        traces: StudentTraces,
        config: InnerLoopConfig,
        num_samples: int,
        metric: MetricFunction | None,
        free: int,
        num_ranks: int = 1,
    ):
        self.traces, self.config, self.metric, self.num_ranks = traces, config, metric, num_ranks
        self.vector, self.shard = traces.theta_bytes, traces.theta_bytes // num_ranks
        num_steps = config.num_epochs * math.ceil(num_samples / config.batch_size)
        one_step = num_steps == 1 or config.attribution == "first_order"
        goals = [] if metric is None else plan_goals({None: metric}, True, one_step and not config.per_token)
        self.num_rows = goals[-1].rows.stop if goals and config.attribution != "dataset" else 1
        self.metrics = [part for goal in goals for part in (goal.parts.values() or [goal.metric])]
        rules = MemoryPlan(config, self.shard, num_steps, self.num_rows)
        length = rules.stretch(free)
        self.plan = self._plan(num_samples, num_steps, length)
        self.budget = rules.graphs(free, length, traces.accelerator)

    def _plan(self, num_samples: int, num_steps: int, length: int) -> Plan:
        config = self.config
        batch = math.ceil(min(config.batch_size, num_samples) / self.num_ranks)  # this rank's share
        size = min(config.micro_batch_size or batch, batch)
        attribution = config.attribution != "dataset"
        by_sample = 0
        if attribution and not config.per_token and self._tells_samples_apart(size):
            by_sample = length if config.attribution == "first_order" else int(length == num_steps)
        twice = length - by_sample if attribution else 0
        return Plan(num_steps, length, batch / size, size, by_sample, twice)

    def _tells_samples_apart(self, size: int) -> bool:
        return self.traces.by_sample(size, self.config, self.config.memory_budget != 0, 1) is not None

    # -- micro-batches ----------------------------------------------------------------------------------------------

    def _needs(self, by_sample: bool, keep: bool) -> Needs:
        config, size = self.config, self.plan.size
        if by_sample:
            found = self.traces.by_sample(size, config, keep, self.num_rows)
            assert found is not None  # asked in `_plan`
            return found
        if not config.differentiates_twice:
            return self.traces.once(size, config)
        through_theta = self.plan.num_steps > 1 and config.attribution != "first_order"
        return self.traces.twice(size, config, keep, through_theta)

    def _kept(self) -> tuple[int, int, bool]:
        """Bytes of samples' gradients and of graphs that are kept of a stretch, and if the last micro-batch's is."""
        room, found, last = self.budget, [0, 0], False
        for place, steps in ((0, self.plan.by_sample), (1, self.plan.twice)):
            number = steps * self.plan.micro_batches
            if not number:
                continue
            each = self._needs(place == 0, keep=True).kept if room else 0
            fitting = min(number, room // each) if each else 0
            last = fitting >= number
            found[place] = int(fitting * each)
            room -= found[place]
        return found[0], found[1], last

    # -- phases -----------------------------------------------------------------------------------------------------

    def phases(self) -> list[Phase]:
        """The fine-tuning (forward sweep), the metric, and the attribution (reverse sweep)."""
        config, plan, vector = self.config, self.plan, self.vector
        moments, rows = num_moments(config), self.num_rows
        samples, graphs, last_kept = self._kept()
        trajectory = trajectory_bytes(config, vector, plan.num_steps, plan.length, self.num_ranks)
        state = (1 + moments) * self.shard
        several = self.num_ranks > 1
        current = state + self.shard if config.offload_trajectory else trajectory
        current += vector * several  # θ at the start
        gathered = vector * (several and plan.num_steps > 1)  # θ in a later step
        kept = {"samples' gradients": samples, "graphs": graphs}
        last = self._needs(not plan.twice and bool(plan.by_sample), last_kept)

        clipped = vector * (config.max_grad_norm is not None)
        summed = vector * (plan.micro_batches > 1)
        # At the last micro-batch, θ and s after the step are not there yet, and what it keeps is a part of its peak
        computing = last.forward + summed - (last.kept if last_kept else 0) - (state + vector)
        forward = max(computing, clipped, self._first_step(samples) - current - samples - graphs)
        phases = [Phase("fine-tuning", {"trajectory": current + gathered, **kept, "micro-batch": forward})]
        if config.attribution == "dataset":
            phases[0].parts["trajectory"] += 2 * state + 2 * vector  # θ and s at the start and after a step; two g
            # Before the fine-tuning, the metric's gradient is checked
            return [*phases, Phase("metric", {"trajectory": state, "metric": self._metric()})]

        optimizer = rows * vector
        after = current + vector * several  # with θ after the last step
        phases.append(Phase("metric", {"trajectory": after, "optimizer": optimizer, **kept, "metric": self._metric()}))
        if plan.num_steps > 1:
            optimizer += rows * moments * self.shard + clipped + (rows * self.shard if rows > 1 else 0)
        else:
            optimizer += clipped
        if several:  # λ is a shard, u is gathered, and with several steps there are sums of Hessian products
            optimizer += rows * (self.shard + vector * (plan.num_steps > 1))
        block = min(vector * rows, (64 if self.traces.accelerator else 2) << 20)
        computing = max(last.reverse - (last.kept if last_kept else 0), VJP_TENSORS * block)
        if plan.length < plan.num_steps:  # a stretch is run again while the last step of the later one is still held
            computing = max(computing, last.forward + summed + state - (last.kept if last_kept else 0))
        phases.append(
            Phase(
                "attribution",
                {"trajectory": current + gathered, "optimizer": optimizer, **kept, "micro-batch": computing},
            )
        )
        return phases

    def _first_step(self, samples: int) -> int:
        """The most in the first step, if its scores come from the samples' gradients; all that there is then."""
        if not self.plan.by_sample:
            return 0
        needs = self._needs(True, self.budget > 0)
        state = (1 + num_moments(self.config)) * self.vector
        return state + max(samples - needs.kept, 0) + needs.forward + self.vector * (self.plan.micro_batches > 1)

    def _metric(self) -> int:
        return max(map(self.traces.metric, self.metrics), default=0)

    def changed(self, config: InnerLoopConfig, num_samples: int, free: int) -> "StudentMemory":
        """The same for other settings of the inner loop."""
        return StudentMemory(self.traces, replace(config), num_samples, self.metric, free, self.num_ranks)
