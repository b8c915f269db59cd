"""Trials: whether predicted and actual changes of the metric agree with one learning rate and one `eps_root`."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..metagradients import InnerLoopConfig
from ..metagradients.fine_tuning import FineTuning, modes
from ..metagradients.goals import metric_at_start
from ..metagradients.metagradient import differentiate
from ..metagradients.out_of_memory import within_memory
from ..student import FinetunedStudent
from ..verification import SMOOTH, STEP, Agreement, random_signs
from ..verification.measurements import changes_along, predicted_changes
from ..verification.progress import Progress
from ..verification.reweighting import OneStep, Remembering, num_together, one_step, step_gradient


AGREES = 0.995
"""
Pearson's correlation that a trial needs, over each direction and its opposite. It is more than 0.99, because a trial
has few directions, and the values must hold for other samples.
"""
FITS = (0.75, 1.33)
"""The slopes that a trial may have. Outside of it, the student moves far beyond where the scores were taken."""
STEADY = 0.9
"""
The cosine between the metric's gradients before and after the fine-tuning that a trial needs, over the parameters that
moved. If the gradient turns further, the scores say what would mend the end of this fine-tuning. They say less about
what helps the student, and the generator learns less from them.
"""
HOPELESS = 0.9
"""A trial ends early if its first directions agree less than this."""
MOVES = 50
"""The changes of the metric must be as many times larger than the rounding errors of float32."""


@dataclass
class Trial:
    """
    One pair of values that was tried.

    Attributes:
        learning_rate (`float`), eps_root (`float`): The values.
        pearson (`float`): Correlation of predicted and actual changes of Φ, over each direction and its opposite.
        slope (`float`): Actual changes as a multiple of the predicted ones.
        metasmoothness (`float`): See [`~trl_dpg.verification.metasmoothness`]. 1 with one optimizer step.
        cosine (`float`): Cosine between ∇Φ before and after the fine-tuning, over the parameters that moved.
        metric_change (`float`): Φ after the fine-tuning minus Φ before.
        loss_change (`float`): The same for the training loss on the samples, in nats. It must fall.
        num_directions (`int`): Directions that were measured.
        seconds (`float`): Time of the trial.
        verdict (`str`): `"agrees"`; `"still"` if Φ hardly moves; `"disagrees"`, `"rough"`; `"overshoots"` if the
            student's own loss does not fall; `"turns"` if the cosine is too small; or `"diverges"`.
    """

    learning_rate: float
    eps_root: float
    pearson: float = math.nan
    slope: float = math.nan
    metasmoothness: float = math.nan
    cosine: float = math.nan
    metric_change: float = math.nan
    loss_change: float = math.nan
    num_directions: int = 0
    seconds: float = math.nan
    verdict: str = "diverges"

    @property
    def agrees(self) -> bool:
        return self.verdict == "agrees"

    def learns(self) -> bool:
        """Whether the student's own loss falls, and ∇Φ keeps its direction. If not, writes this into the verdict."""
        if self.loss_change < 0 and self.cosine < STEADY:
            self.verdict = "turns"
            return False
        if self.loss_change < 0:
            return True
        self.verdict = "overshoots" if self.loss_change > 0 else "still" if self.loss_change == 0 else "diverges"
        return False


class Prober:
    """Measures trials of a fine-tuning with several steps: a metagradient, and two fine-tunings for each direction."""

    PASSES_OF_A_REWARD_STEP = 6  # two each: the forward sweep, the metric and its gradient, the reverse sweep
    PASSES_OF_SCORES = 7  # those of a reward step, and one for the loss
    PASSES_OF_A_DIRECTION = 6
    NUM_DIRECTIONS = 2

    def __init__(self, plan: FineTuning, metric, seed: int, bar: Progress):
        self.plan, self.metric, self.bar = plan, metric, bar
        self.student = plan.student
        self.directions = random_signs(self.num_directions(), len(plan.samples), seed)
        bar.measuring("the start")
        self.start = Remembering(metric)
        self.metric_before = within_memory(plan, lambda: metric_at_start(self.start, self.student), "The metric")
        self.losses_before = plan.losses(self.student.initial_theta())
        bar.done(3)
        self.mean_square = self._mean_square()

    def num_directions(self) -> int:
        return self.NUM_DIRECTIONS

    @property
    def passes_of_a_trial(self) -> int:
        return self.PASSES_OF_SCORES + len(self.directions) * self.PASSES_OF_A_DIRECTION

    def _mean_square(self) -> float:
        """The mean square of the first step's gradient, over the parameters that have one."""
        gradient = within_memory(self.plan, self._first_gradient, "The first gradient")
        self.bar.done(round(2 / len(self.plan.steps)))
        return _mean_square(gradient)

    def _first_gradient(self) -> Tensor:
        theta = self.student.initial_theta()
        weights = torch.ones(len(self.plan.samples), dtype=theta.dtype, device=theta.device)
        with self.plan.sweeping():
            return step_gradient(self.plan, theta, self.plan.steps[0], weights)

    def loss_change(self, theta: Tensor) -> float:
        """The mean training loss for θ minus that for the student before fine-tuning."""
        return (self.plan.losses(theta) - self.losses_before).mean().item()

    def cosine(self, theta: Tensor, gradient: Tensor) -> float:
        """The cosine between a metric's gradient at θ and that before fine-tuning, over the parameters that moved."""
        moved = theta != self.start.theta
        after, before = gradient[moved].double(), self.start.gradient[moved].double()  # type: ignore[index]
        return torch.cosine_similarity(after, before, dim=0).item()

    def probe(self, trial: Trial, config: InnerLoopConfig) -> None:
        """Measure a trial. Ends early if it is hopeless."""
        seen = Remembering(self.metric)
        fine_tuning = FineTuning(self.student, self.plan.examples, config)
        output = differentiate(fine_tuning, seen, metric_before=self.metric_before)
        trial.metric_change = output.metric_after - self.metric_before
        theta, gradient = seen.theta, seen.gradient
        if theta is None or gradient is None:  # for mypy: `differentiate` refuses such a metric
            return
        trial.loss_change, trial.cosine = self.loss_change(theta), self.cosine(theta, gradient)
        self.bar.done(self.PASSES_OF_SCORES)
        if not trial.learns():
            return
        predicted = predicted_changes(output.scores, self.directions)
        actual: list[float] = []
        smoothness: list[float] = []
        for change in changes_along(fine_tuning, self.metric, self.directions, STEP, theta):
            self.bar.done(self.PASSES_OF_A_DIRECTION)
            actual.append(change.actual)
            smoothness.append(change.smoothness)
            trial.metasmoothness = sum(smoothness) / len(smoothness)
            if not judge(trial, predicted, actual, output.metric_after):
                break


class OneStepProber(Prober):
    """
    Measures trials of a fine-tuning with one step.

    Its gradient does not depend on the learning rate or on `eps_root`. So it is computed once, also along each
    direction, and a trial takes only evaluations of the metric. The gradients along the directions stay in memory.
    """

    PASSES_OF_A_REWARD_STEP = 5  # the reverse sweep takes one
    PASSES_OF_SCORES = 3
    PASSES_OF_A_DIRECTION = 2
    NUM_DIRECTIONS = 4
    single: OneStep

    def num_directions(self) -> int:
        """As many as fit into memory. One alone is not enough for a correlation."""
        return num_together(self.plan, self.NUM_DIRECTIONS, least=2)

    def _mean_square(self) -> float:
        self.bar.measuring("gradients")
        self.single = one_step(self.plan, self.directions)
        self.bar.done(2)
        return _mean_square(self.single.gradient)

    def probe(self, trial: Trial, config: InnerLoopConfig) -> None:
        theta = self.single.end(config).requires_grad_()
        finetuned = FinetunedStudent(self.student, theta, self.single.theta)
        with modes(self.student):
            value, gradient = within_memory(self.plan, lambda: finetuned.evaluate(self.metric), "The metric")
        trial.metric_change, trial.metasmoothness = value.item() - self.metric_before, 1.0
        self.bar.done(self.PASSES_OF_SCORES)
        if gradient is None or not math.isfinite(value.item()):
            return
        trial.loss_change, trial.cosine = self.loss_change(theta.detach()), self.cosine(theta.detach(), gradient)
        if not trial.learns():
            return
        predicted = 2 * STEP * self.single.slopes(config, gradient)
        actual: list[float] = []
        for k in range(len(self.directions)):
            ahead, behind = (self.single.end(config, step, k) for step in (STEP, -STEP))
            actual.append(self.plan.evaluate(ahead, self.metric) - self.plan.evaluate(behind, self.metric))
            self.bar.done(self.PASSES_OF_A_DIRECTION)
            if not judge(trial, predicted, actual, value.item()):
                break


def _mean_square(gradient: Tensor) -> float:
    return gradient.square().sum().item() / max(1, gradient.count_nonzero().item())


def judge(trial: Trial, predicted: Tensor, actual: list[float], metric: float) -> bool:
    """
    Write the figures of the directions so far into a trial, and its verdict. Whether it is worth to go on with it.

    Args:
        trial (`Trial`): The trial.
        predicted (`torch.Tensor` of shape `[K]`): Predicted changes in all directions.
        actual (`list[float]`): Actual changes in the directions so far.
        metric (`float`): Φ of the fine-tuned student.
    """
    agreement = Agreement(predicted[: len(actual)], torch.tensor(actual, dtype=torch.float64))
    trial.pearson, trial.slope, trial.num_directions = agreement.mirrored, agreement.slope, len(actual)
    rounding = torch.finfo(torch.float32).eps * max(abs(metric), abs(metric - trial.metric_change))
    size = agreement.actual.square().mean().sqrt().item()
    if not math.isfinite(size) or not math.isfinite(trial.pearson):
        trial.verdict = "still" if size == 0 else "diverges"
        return False
    if size < MOVES * rounding:
        trial.verdict = "still"
        return False
    fits = FITS[0] <= trial.slope <= FITS[1]
    if trial.pearson < AGREES or not fits:
        trial.verdict = "disagrees"
        return trial.pearson >= HOPELESS and fits
    trial.verdict = "agrees" if trial.metasmoothness >= SMOOTH else "rough"
    return True
