"""
Chooses the inner loop's learning rate and `eps_root`: the largest and the smallest with which the scores predict.

Both are found by a few fine-tunings on one batch, with the measurements of `verification/`. See [`tune`].
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .metagradients import InnerLoopConfig
from .metagradients.config import AUTO
from .metagradients.fine_tuning import FineTuning, modes
from .metagradients.metagradient import check_samples, differentiate, metric_at_start
from .student import Examples, FinetunedStudent, Student
from .verification import SMOOTH, STEP, Agreement, random_signs
from .verification.advice import fitting_eps_root, short
from .verification.measurements import changes_along, predicted_changes
from .verification.progress import Progress
from .verification.reweighting import OneStep, Remembering, one_step, step_gradient


AGREES = 0.995
"""
Pearson's correlation that a trial needs, over each direction and its opposite. It is more than 0.99, because a trial has
few directions, and the values must hold for other samples.
"""
FITS = (0.75, 1.33)
"""The slopes that a trial may have. Outside of it, the student moves far beyond where the scores were taken."""
HOPELESS = 0.9
"""A trial ends early if its first directions agree less than this."""
MOVES = 50
"""The changes of the metric must be as many times larger than the rounding errors of float32."""
MAX_REWARD_STEPS = 12
"""What a search may cost at most, in reward steps."""


@dataclass
class Trial:
    """
    One pair of values that was tried.

    Attributes:
        learning_rate (`float`), eps_root (`float`): The values.
        pearson (`float`): Correlation of predicted and actual changes of Φ, over each direction and its opposite.
        slope (`float`): Actual changes as a multiple of the predicted ones.
        metasmoothness (`float`): See [`~trl_dpg.verification.metasmoothness`]. 1 with one optimizer step.
        metric_change (`float`): Φ after the fine-tuning minus Φ before.
        num_directions (`int`): Directions that were measured.
        seconds (`float`): Time of the trial.
        verdict (`str`): `"agrees"`; `"still"` if Φ hardly moves; `"disagrees"`, `"rough"`; or `"diverges"`.
    """

    learning_rate: float
    eps_root: float
    pearson: float = math.nan
    slope: float = math.nan
    metasmoothness: float = math.nan
    metric_change: float = math.nan
    num_directions: int = 0
    seconds: float = math.nan
    verdict: str = "diverges"

    @property
    def agrees(self) -> bool:
        return self.verdict == "agrees"


@dataclass
class Tuning:
    """
    The result of [`tune`].

    Attributes:
        chosen (`dict[str, float]`): The chosen values, by fields of [`InnerLoopConfig`].
        trials (`list[Trial]`): What was tried, in this order.
        passes (`int`): Forward and backward passes over the samples. Those over the metric's data count as much.
        reward_steps (`float`): The passes, in those of a reward step.
        seconds (`float`): Time of the search.
        found (`bool`): Whether the chosen values agree. If not, they are those that agreed best.
    """

    chosen: dict[str, float] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    passes: int = 0
    reward_steps: float = 0.0
    seconds: float = 0.0
    found: bool = False

    def apply(self, config: InnerLoopConfig) -> InnerLoopConfig:
        """The configuration with the chosen values."""
        return replace(config, **self.chosen)

    def render(self) -> str:
        """The evidence as a Markdown table, and the choice. Names of fields are in backticks."""
        lines = ["| learning rate | eps_root | Pearson | slope | metasmoothness | change of Φ | seconds | |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        for trial in self.trials:
            figures = [f"{value:.4f}" for value in (trial.pearson, trial.slope, trial.metasmoothness)]
            cells = [short(trial.learning_rate), short(trial.eps_root), *figures, f"{trial.metric_change:.3g}"]
            lines.append("| " + " | ".join([*cells, f"{trial.seconds:.1f}", trial.verdict]) + " |")
        chosen = ", ".join(f"`{name}` {short(value)}" for name, value in self.chosen.items())
        cost = f"{self.passes} passes, {self.reward_steps:.1f} reward steps, {self.seconds:.0f} s"
        lines.append(f"Chosen: {chosen} ({cost}).")
        if not self.found:
            lines.append("No values agreed. These agreed best: run `trl-dpg verify` before you trust the scores.")
        return "\n".join(lines)

    def figures(self) -> dict[str, Any]:
        """All figures, as values that JSON can hold."""
        return asdict(self)


def tune(
    student: Student,
    examples: Examples,
    metric: Callable[[FinetunedStudent], Tensor],
    config: InnerLoopConfig,
    seed: int = 1,
    progress: bool = False,
    on_trial: Callable[[Tuning], None] | None = None,
) -> Tuning:
    """
    Choose the fields of the inner loop that are `"auto"`, from a few fine-tunings on one batch.

    The learning rate is the largest tried with which predicted and actual changes of Φ agree, and Φ moves by much more
    than rounding errors. `eps_root` is the smallest tried that is smooth at this learning rate: the metasmoothness
    passes as in [`~trl_dpg.verification.verify`], and the changes still agree. With one optimizer step, agreement
    alone decides. The search first sets `eps_root` close to the mean square of a step's gradient, looks for the
    learning rate, then lowers `eps_root`. It costs at most 12 reward steps. SGD has no `eps_root`; `"auto"` is 0 then.

    Args:
        student (`Student`):
            The student before fine-tuning.
        examples (`list[str]`, `list[dict]` or [`~datasets.Dataset`]):
            N samples, as many as a reward step has.
        metric (`Callable`):
            Φ.
        config (`InnerLoopConfig`):
            The inner loop. Its fields that are numbers stay as they are.
        seed (`int`, *optional*, defaults to `1`):
            Seed of the changes of the data weights.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.
        on_trial (`Callable`, *optional*):
            Called with the result so far after each trial.

    Raises:
        `ValueError`: If nothing is `"auto"`, there are no scores to predict with (`attribution="dataset"`), or for
            what [`metagradient`] raises it.
    """
    if not config.auto:
        raise ValueError(f"There is nothing to choose: none of {', '.join(AUTO)} is 'auto'.")
    if config.attribution != "metagradient":
        raise ValueError("attribution='dataset' computes no scores that could agree. Give numbers in the place of 'auto'.")
    numbers = {name: 0.0 for name in config.auto}
    plan = FineTuning(student, examples, replace(config, **numbers, eps=1e-8, per_token=False))  # its steps are used
    check_samples(plan)
    prober = _OneStepProber if len(plan.steps) == 1 else _Prober
    budget = MAX_REWARD_STEPS * prober.PASSES_OF_A_REWARD_STEP
    with Progress("Tuning", budget, progress) as bar:
        search = _Search(prober(plan, metric, seed, bar), config, budget, bar, on_trial)
        search.run()
    return search.result
