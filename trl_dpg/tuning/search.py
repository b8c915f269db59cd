"""The search for the inner loop's learning rate and `eps_root`, see [`tune`]."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from ..files import finite
from ..metagradients import InnerLoopConfig
from ..metagradients.config import AUTO, SettingsError
from ..metagradients.fine_tuning import FineTuning
from ..metagradients.metagradient import check_samples
from ..student import Examples, FinetunedStudent, Student
from ..verification.advice import fitting_eps_root, short
from ..verification.progress import Progress
from .trials import AGREES, OneStepProber, Prober, Trial


CLOSE = 0.9995
"""
Pearson's correlation that a smaller `eps_root` needs. It is more than `AGREES`, because the generator's later texts
have other gradients than the first batch, and a small `eps_root` is the first to fail on them.
"""
MAX_REWARD_STEPS = 12
"""What a search may cost at most, in reward steps."""


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
        chosen: dict[str, Any] = {name: self.chosen[name] for name in config.auto}
        return replace(config, **chosen)

    def render(self) -> str:
        """The evidence as a Markdown table, and the choice. Names of fields are in backticks."""
        columns = [
            "learning rate",
            "eps_root",
            "Pearson",
            "slope",
            "metasmoothness",
            "cosine of ∇Φ",
            "change of Φ",
            "of the loss",
        ]
        columns += ["seconds", "verdict"]
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for trial in self.trials:
            measured = (trial.pearson, trial.slope, trial.metasmoothness, trial.cosine)
            figures = ["" if math.isnan(value) else f"{value:.4f}" for value in measured]
            cells = [
                short(trial.learning_rate),
                short(trial.eps_root),
                *figures,
                f"{trial.metric_change:.3g}",
                f"{trial.loss_change:.3g}",
            ]
            lines.append("| " + " | ".join([*cells, f"{trial.seconds:.1f}", trial.verdict]) + " |")
        return "\n".join([*lines, "", self.choice()])

    def choice(self) -> str:
        """The choice and its cost as a sentence. Names of fields are in backticks."""
        chosen = ", ".join(f"`{name}` {short(value)}" for name, value in self.chosen.items())
        cost = f"{self.passes} passes, {self.reward_steps:.1f} reward steps, {self.seconds:.0f} s"
        doubt = "" if self.found else " No values agreed, these agreed best. Verify them before you trust the scores."
        return f"Chosen: {chosen} ({cost}).{doubt}"

    def figures(self) -> dict[str, Any]:
        """All figures, as values that JSON can hold. Those that are not finite are `None`."""
        return finite(asdict(self))


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

    The learning rate is the largest tried with which predicted and actual changes of Φ agree, Φ moves by much more
    than rounding errors, ∇Φ keeps its direction during the fine-tuning, and the student's own loss falls. `eps_root`
    is the smallest tried that is smooth at this learning rate: the metasmoothness passes as in
    [`~trl_dpg.verification.verify`], and all of the above still holds. With one optimizer step, metasmoothness is 1.
    The search first sets `eps_root` close to the mean square of a step's gradient, looks for the learning rate, then
    lowers `eps_root`. It costs at most 12 reward steps. SGD has no `eps_root`; `"auto"` is 0 then.

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
        `ValueError`: If nothing is `"auto"`, there are no scores to predict with (`attribution="dataset"`), the
            schedule's learning rate is 0 in every step, the gradient on the samples is 0 or not finite, or for what
            [`metagradient`] raises it.
    """
    if not config.auto:
        raise ValueError(f"There is nothing to choose: none of {', '.join(AUTO)} is 'auto'.")
    check_scores(config)
    stand_ins: dict[str, Any] = dict.fromkeys(config.auto, 1.0)
    plan = FineTuning(student, examples, replace(config, **stand_ins, per_token=False))  # its samples and steps
    check_samples(plan)
    if not any(plan.config.learning_rates(len(plan.steps))):
        raise SettingsError(
            f"The learning rate is 0 in each of the {len(plan.steps)} steps, so no values can move the metric. Look "
            f"at `learning_rate` ({config.learning_rate}), `lr_scheduler_type` ({config.lr_scheduler_type!r}) and "
            f"`warmup_steps` ({config.warmup_steps}): a warm-up starts at 0."
        )
    prober = OneStepProber if len(plan.steps) == 1 else Prober
    budget = MAX_REWARD_STEPS * prober.PASSES_OF_A_REWARD_STEP
    with Progress("Tuning", budget, progress) as bar:
        search = _Search(prober(plan, metric, seed, bar), config, budget, bar, on_trial)
        search.run()
    return search.result


def check_scores(config: InnerLoopConfig) -> None:
    """
    Refuse to choose what is `"auto"` if there are no scores of samples to predict with.

    Raises:
        `SettingsError`: If the attribution is the naive baseline.
    """
    if config.auto and config.attribution == "dataset":
        names = " and ".join(f"`{name}`" for name in config.auto)
        raise SettingsError(
            f"{names}: attribution='dataset' computes no scores that could agree. Give numbers in the place of 'auto'."
        )


class _Search:
    """The search over both values."""

    def __init__(self, prober: Prober, config: InnerLoopConfig, budget: int, bar: Progress, on_trial):
        if not 0 < prober.mean_square < math.inf:
            raise SettingsError(
                f"The mean square of the gradient of the student's loss on these samples is {prober.mean_square}, so "
                "no values can be chosen. If it is 0, the samples do not reach a trainable parameter. Otherwise the "
                "loss or its gradient is not finite, e.g. because the weights or the precision do not fit."
            )
        self.prober, self.config, self.budget, self.bar = prober, config, budget, bar
        self.result = Tuning()
        self._on_trial = on_trial
        self._started = time.perf_counter()
        self._eps_root = self._first_eps_root()

    def run(self) -> None:
        best = None
        if "learning_rate" in self.config.auto:
            best = self._raise_learning_rate(self._first_learning_rate())
        if "eps_root" in self.config.auto and self.config.optimizer == "adamw":
            best = self._lower_eps_root(best)
        if not self.result.trials:
            best = self._try(self._first_learning_rate(), self._eps_root)
        self._choose(best)

    def _first_eps_root(self) -> float:
        if "eps_root" not in self.config.auto:
            return float(self.config.eps_root)
        return 0.0 if self.config.optimizer == "sgd" else fitting_eps_root(self.prober.mean_square)

    def _first_learning_rate(self) -> float:
        """A learning rate that moves each parameter by about 1e-3 in a step."""
        if "learning_rate" not in self.config.auto:
            return float(self.config.learning_rate)
        if self.config.optimizer == "adamw":
            return 1e-3
        return _rounded(1e-3 / math.sqrt(self.prober.mean_square))

    def _affordable(self, num_trials: int = 1) -> bool:
        return self.bar.passes + num_trials * self.prober.passes_of_a_trial <= self.budget

    def _try(self, learning_rate: float, eps_root: float) -> Trial:
        started = time.perf_counter()
        trial = Trial(learning_rate, eps_root)
        self.bar.measuring(f"learning rate {short(learning_rate)}, eps_root {short(eps_root)}")
        config = replace(self.prober.plan.config, learning_rate=learning_rate, eps_root=eps_root)
        try:
            self.prober.probe(trial, config)
        except FloatingPointError:
            pass  # the verdict is "diverges"
        trial.seconds = time.perf_counter() - started
        self.result.trials.append(trial)
        self._tell()
        return trial

    def _tell(self) -> None:
        self.result.passes = self.bar.passes
        self.result.reward_steps = self.bar.passes / self.prober.PASSES_OF_A_REWARD_STEP
        self.result.seconds = time.perf_counter() - self._started
        if self._on_trial is not None:
            self._on_trial(self.result)

    def _raise_learning_rate(self, rate: float) -> Trial | None:
        """The largest learning rate that agrees, within a factor of 2 or as near as the budget allows."""
        good: Trial | None = None
        left = 2 if "eps_root" in self.config.auto and self.config.optimizer == "adamw" else 1  # one is for `eps_root`
        low, high = 0.0, math.inf  # of those that do not move, or agree; and of those that do not agree
        while self._affordable(left) and high > 2.2 * low:
            trial = self._try(rate, self._eps_root)
            if trial.agrees:
                good, low = trial, rate
            elif trial.verdict == "still":
                low = max(low, rate)
            else:
                high = min(high, rate)
            if high < math.inf and low > 0:
                rate = _rounded(math.sqrt(low * high))
            else:
                rate = _rounded(rate * (self._factor(trial) if low > 0 else 1 / self._factor(trial)))
            if any(rate == trial.learning_rate for trial in self.result.trials):
                break
        return good

    def _factor(self, trial: Trial) -> float:
        """How far the next learning rate is from one that agrees or not: the further, the clearer the verdict is."""
        if not -1 < trial.pearson < 1 or trial.verdict == "still":
            return 10.0
        ratio = (1 - AGREES**2) / (1 - trial.pearson**2)  # the share of the changes that is not predicted
        return min(10.0, max(2.0, ratio ** (1 / 3), ratio ** (-1 / 3)))

    def _lower_eps_root(self, best: Trial | None) -> Trial | None:
        """The smallest `eps_root` that agrees at the learning rate of the best trial."""
        rate = self._first_learning_rate() if best is None else best.learning_rate
        if best is None and not self.result.trials:
            best = self._try(rate, self._eps_root)
        if best is None or not best.agrees:
            return self._raise_eps_root(rate)
        factor = 0.01
        while self._affordable() and factor < 1:
            trial = self._try(rate, _rounded(best.eps_root * factor))
            if trial.agrees and trial.pearson >= CLOSE:
                best = trial
            else:
                factor = math.inf if factor > 0.05 else 0.1
        return best

    def _raise_eps_root(self, rate: float) -> Trial | None:
        """The first larger `eps_root` that agrees, if there is one."""
        eps_root = self._eps_root
        while self._affordable():
            eps_root = _rounded(100 * eps_root)
            trial = self._try(rate, eps_root)
            if trial.agrees:
                return trial
        return None

    def _choose(self, best: Trial | None) -> None:
        """The values of a trial that agrees or, without one, of the most promising one."""
        self.result.found = best is not None and best.agrees
        chosen = best if best is not None and best.agrees else most_promising(self.result.trials)
        self.result.chosen = {name: getattr(chosen, name) for name in self.config.auto}
        self._tell()


def most_promising(trials: list[Trial]) -> Trial:
    """
    The trial to take if none agrees.

    That is the one that agreed best. If no agreement was measured, it is the smallest learning rate with which Φ
    moves. If there is none, it is the largest one that hardly moves Φ, or the smallest one that diverges.
    """
    measured = [trial for trial in trials if trial.verdict not in ("still", "diverges") and trial.pearson > -math.inf]
    if measured:  # not a number is not larger than anything
        return max(measured, key=lambda trial: trial.pearson)
    moving = [trial for trial in trials if trial.verdict in ("overshoots", "turns")]
    still = [trial for trial in trials if trial.verdict == "still"]
    if still and not moving:
        return max(still, key=lambda trial: trial.learning_rate)
    return min(moving or trials, key=lambda trial: trial.learning_rate)


def _rounded(value: float) -> float:
    """The nearest of 1, 2, 3 and 5 times a power of ten, on a logarithmic scale."""
    exponent = math.floor(math.log10(value))
    candidates = [float(f"{digit}e{exponent}") for digit in (1, 2, 3, 5)] + [float(f"1e{exponent + 1}")]
    return min(candidates, key=lambda candidate: abs(math.log(candidate / value)))
