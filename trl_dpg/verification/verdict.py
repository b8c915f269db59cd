"""The verdict on whether the scores of a set-up can be trusted: checks that pass or fail, with advice."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..metagradients import InnerLoopConfig
from ..metagradients.fine_tuning import FineTuning
from ..metagradients.metagradient import check_samples, differentiate
from ..ranks import ALONE, Ranks
from ..student import Examples, FinetunedStudent, Student
from ..student.checks import bnb_modules
from ..student.precision import compute_dtype, in_precision
from .advice import Remedy, advice, advice_without_change, remedies, slope_advice
from .measurements import (
    STEP,
    Agreement,
    GradientNoise,
    changes_along,
    gradient_noise,
    pearson,
    predicted_changes,
    random_signs,
)
from .progress import Progress
from .result import Check, Verification
from .reweighting import Remembering


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


PASS, WARN = 0.95, 0.9
"""A correlation passes if it is at least `PASS`, and fails if it is below `WARN`."""
SMOOTH, ROUGH = 0.9, 0.7
"""Metasmoothness passes if it is at least `SMOOTH`, and fails if it is below `ROUGH`."""
NOISY = 0.95
"""A noise share above this gets a warning. The batch size is then less than 1/19 of the noise scale."""
TOO_FLAT, TOO_STEEP = 0.8, 1.25
"""A slope outside of this range gets a warning."""
FEWEST = 6
"""Directions after which `verify` may stop, if the verdict on the predictions is clear."""


def verify(
    student: Student,
    examples: Examples,
    metric: Callable[[FinetunedStudent], Tensor],
    config: InnerLoopConfig | None = None,
    num_directions: int = 20,
    step: float = STEP,
    compare_precision: bool = True,
    try_remedies: bool = True,
    seed: int = 0,
    progress: bool = False,
    on_figure: Callable[[Verification], None] | None = None,
    process_group: "ProcessGroup | None" = None,
) -> Verification:
    """
    Check whether the scores of a student, its data and metric can be trusted, and what to change if not.

    Takes two metagradients (one with `compare_precision=False`), a sweep for the gradient noise, and for each
    direction two forward sweeps (with one optimizer step: one or less) and two evaluations of the metric. It stops
    before all directions are measured if the verdict on the predictions is clear. Each remedy that is tried takes one
    metagradient and six directions.

    Args:
        student (`Student`):
            The student before fine-tuning.
        examples (`list[str]`, `list[dict]` or [`~datasets.Dataset`]):
            N samples like those that the generator writes. Use as many as a reward step has.
        metric (`Callable`):
            Φ.
        config (`InnerLoopConfig`, *optional*):
            The inner loop.
        num_directions (`int`, *optional*, defaults to `20`):
            K, the largest number of random changes of the data weights for which Φ is predicted; at least 3. After 6
            of them, the 95 % interval of Pearson's correlation may show that it passes, or that it fails.
        step (`float`, *optional*, defaults to `STEP`):
            h, the change of every data weight.
        compare_precision (`bool`, *optional*, defaults to `True`):
            Compare the scores in float32 with those in bfloat16. Needs memory for a copy of the student.
        try_remedies (`bool`, *optional*, defaults to `True`):
            If a central check does not pass, try other values of `eps_root`, learning rate and batch size.
        seed (`int`, *optional*, defaults to `0`): Seed of the changes of the data weights.
        progress (`bool`, *optional*, defaults to `False`): Show a progress bar.
        on_figure (`Callable`, *optional*):
            Called with the result so far after each check and each direction.
        process_group (`torch.distributed.ProcessGroup`, *optional*): See [`metagradient`].

    Raises:
        `ValueError`: If the baseline without scores is asked for (`attribution="dataset"`), there are fewer than 3
            directions or 2 samples, all samples are the same, the step does not lie in (0, 0.5), or for what
            [`metagradient`] raises it.
    """
    config = replace(config or InnerLoopConfig(), per_token=False)
    _check_arguments(config, num_directions, step)
    ranks = ALONE if process_group is None else Ranks(process_group)
    fine_tuning = _checked_fine_tuning(student, examples, config, ranks)
    total = 18 + num_directions * (2 if len(fine_tuning.steps) == 1 else 6)
    with ranks.guard("The verification"), Progress("Verifying", total, progress) as bar:
        verifier = _Verifier(fine_tuning, metric, step, bar, on_figure)
        verifier.check(random_signs(num_directions, len(fine_tuning.samples), seed), compare_precision, try_remedies)
    return verifier.result


def _check_arguments(config: InnerLoopConfig, num_directions: int, step: float) -> None:
    if config.attribution == "dataset":
        raise ValueError("There is nothing to verify: attribution='dataset' computes no scores of samples.")
    if num_directions < 3:
        raise ValueError(f"A correlation needs at least 3 directions, got num_directions = {num_directions}.")
    if not 0 < step < 0.5:
        raise ValueError(f"step must lie between 0 and 0.5 (weights stay positive), got {step}.")


def _checked_fine_tuning(student: Student, examples: Examples, config: InnerLoopConfig, ranks: Ranks) -> FineTuning:
    fine_tuning = FineTuning(student, examples, config, ranks)
    check_samples(fine_tuning)
    if fine_tuning.samples_are_identical:
        raise ValueError(
            f"There is nothing to verify: all {len(fine_tuning.samples)} samples are the same tokens. Give samples "
            "that differ, or check the generator's texts."
        )
    return fine_tuning


class _Verifier:
    """One verification: what it measures, in this order, and the result so far."""

    def __init__(self, fine_tuning: FineTuning, metric, step: float, bar: Progress, on_figure):
        self.fine_tuning, self.metric, self.step, self.bar = fine_tuning, metric, step, bar
        self.config, self.num_samples = fine_tuning.config, len(fine_tuning.samples)
        self.ranks = fine_tuning.ranks
        self.result = Verification()
        self._on_figure = on_figure
        self._started = time.perf_counter()

    def check(self, directions: Tensor, compare_precision: bool, try_remedies: bool) -> None:
        """Measure everything."""
        self.bar.measuring("gradient noise")
        noise = gradient_noise(self.fine_tuning)
        self.result.noise_scale, self.result.mean_square_gradient = noise.noise_scale, noise.mean_square
        self.bar.done(2)
        self.tell(_noise_check(self.config, noise, self.num_samples))
        self._check_predictions(noise, directions, compare_precision)
        central = [check for check in self.result.checks if check.name in ("finite", "pearson", "metasmoothness")]
        is_still = bool(self.result.actual) and not any(self.result.actual)  # what helps cannot be measured then
        if try_remedies and not is_still and any(check.status != "pass" for check in central):
            for changes in remedies(self.config, noise, self.num_samples):
                self.bar.measuring(f"with {Remedy(changes, 0, 0).describe().replace('`', '')}")
                self.result.remedies.append(self._try(changes, directions[:6]))
                self.tell()
                if self.result.remedies[-1].helps:
                    break
        self.result.complete = True
        self.tell()

    def tell(self, *checks: Check) -> None:
        """Add checks to the result, and tell of it."""
        self.result.checks += checks
        self.result.seconds, self.result.passes = time.perf_counter() - self._started, self.bar.passes
        if self._on_figure is not None:
            self._on_figure(self.result)

    def _check_predictions(self, noise: GradientNoise, directions: Tensor, compare_precision: bool) -> None:
        """The checks that need scores."""
        change = advice(self.config, noise, self.num_samples)
        self.bar.measuring("scores")
        seen, result = Remembering(self.metric), self.result
        try:
            output = differentiate(self.fine_tuning, seen)
        except FloatingPointError as error:
            self.tell(Check("finite", None, None, "fail", str(error), change))
            return
        result.metric_before, result.metric_after = output.metric_before, output.metric_after
        self.bar.done(8)
        agreement, smoothness = self._agreement(output.scores, directions, seen.theta)
        low, high = result.pearson_interval = list(agreement.interval)
        result.slope = agreement.slope
        if agreement.is_still:
            change = advice_without_change(self.config)
        meaning = f"correlation of predicted and actual changes of the metric, in {len(agreement.actual)} directions"
        meaning += f" (95 %: {low:.3f} to {high:.3f})"
        self.tell(
            _check("pearson", agreement.pearson, PASS, WARN, meaning, change),
            _check("spearman", agreement.spearman, WARN, ROUGH, "the same correlation for the ranks", change),
            _slope_check(agreement.slope, change if agreement.is_still else ""),
            _smoothness_check(smoothness, change),
        )
        if compare_precision:
            self.bar.measuring("scores in another precision")
            self.tell(self._precision_check(output.scores, output.metric_before))
        if self.config.attribution == "metagradient" and len(self.fine_tuning.steps) > 1:
            self.bar.measuring("first-order scores")
            self.tell(self._first_order_check(output.scores, output.metric_before))

    def _agreement(self, scores: Tensor, directions: Tensor, theta: Tensor | None) -> tuple[Agreement, float | None]:
        """Predicted and actual changes in as many directions as are needed, and the metasmoothness (T > 1)."""
        is_one_step = len(self.fine_tuning.steps) == 1 and self.config.max_grad_norm is None
        predicted = predicted_changes(scores, directions, self.step)
        found = changes_along(self.fine_tuning, self.metric, directions, self.step, None if is_one_step else theta)
        actual, smoothness = self.result.actual, []
        self.bar.measuring("predictions")
        for change in found:
            actual.append(change.actual)
            smoothness.append(change.smoothness)
            agreement = Agreement(predicted[: len(actual)], torch.tensor(actual, dtype=torch.float64))
            self.result.predicted = agreement.predicted.tolist()
            self.bar.done(2 if len(self.fine_tuning.steps) == 1 else 6)
            self.tell()
            if len(actual) >= FEWEST and _is_clear(agreement):
                break
        return agreement, None if is_one_step else sum(smoothness) / len(smoothness)

    def _precision_check(self, scores: Tensor, metric_before: float) -> Check:
        """Correlation of the scores in float32 and in bfloat16. The student computes in one, a copy in the other."""
        student, config = self.fine_tuning.student, self.config
        half = compute_dtype(student).itemsize == 2
        meaning = "correlation of the scores in float32 and in bfloat16"
        if config.hvp == "finite_difference":
            reason = "bfloat16 is too coarse for the small changes of hvp='finite_difference'"
            return Check("bf16_agreement", None, PASS, "skip", reason)
        try:
            with self.ranks.guard("The copy of the student"):
                copy = in_precision(student, torch.float32 if half else torch.bfloat16)
            other = FineTuning(copy, self.fine_tuning.examples, config, self.ranks)
            value = pearson(scores, differentiate(other, self.metric, metric_before=metric_before).scores)
        except torch.OutOfMemoryError:
            return Check("bf16_agreement", None, PASS, "skip", "there is not enough memory for a copy of the student")
        except FloatingPointError:
            value = math.nan
        self.bar.done(6)
        larger = ", or raise `eps_root`" if config.optimizer == "adamw" else ""
        if half:
            change = 'set `model_init_kwargs` \'{"dtype": "float32"}\''
            if bnb_modules(student.model, "Linear4bit"):
                change = "set `bnb_4bit_compute_dtype` float32"
            return _check("bf16_agreement", value, PASS, WARN, meaning, f"{change}{larger}")
        if value >= PASS:
            return Check("bf16_agreement", value, PASS, "pass", meaning)
        change = f"leave the student in float32{larger}"  # a warning only, because the student computes in float32
        return Check("bf16_agreement", value, PASS, "warn", meaning, change)

    def _first_order_check(self, scores: Tensor, metric_before: float) -> Check:
        """Correlation of the exact scores and those without the Hessian, which cost less."""
        config = replace(self.config, attribution="first_order")
        first = FineTuning(self.fine_tuning.student, self.fine_tuning.examples, config, self.ranks)
        try:
            value = pearson(scores, differentiate(first, self.metric, metric_before=metric_before).scores)
        except FloatingPointError as error:
            return Check("first_order", None, PASS, "skip", str(error))
        self.bar.done(6)
        meaning = "correlation of the scores with those of attribution='first_order', which "
        if value >= PASS:
            return Check("first_order", value, PASS, "pass", meaning + "may be used to save time")
        return Check("first_order", value, PASS, "skip", meaning + "are not close enough to be used")

    def _try(self, changes: dict[str, Any], directions: Tensor) -> Remedy:
        config = replace(self.config, **changes)
        fine_tuning = FineTuning(self.fine_tuning.student, self.fine_tuning.examples, config, self.ranks)
        seen = Remembering(self.metric)
        try:
            scores = differentiate(fine_tuning, seen).scores
        except FloatingPointError:
            return Remedy(changes, math.nan, math.nan)
        found = list(changes_along(fine_tuning, self.metric, directions, self.step, seen.theta))
        actual = torch.tensor([change.actual for change in found], dtype=torch.float64)
        correlation = pearson(predicted_changes(scores, directions, self.step), actual)
        smoothness = sum(change.smoothness for change in found) / len(found)
        return Remedy(changes, correlation, smoothness, correlation >= PASS and smoothness >= SMOOTH)


def _is_clear(agreement: Agreement) -> bool:
    """Whether more directions would hardly change the verdict on the predictions."""
    low, high = agreement.interval
    return agreement.is_still or (low >= PASS and agreement.spearman >= WARN) or high < WARN


def _check(name: str, value: float, passes: float, fails: float, meaning: str, advice: str) -> Check:
    status = "pass" if value >= passes else "warn" if value >= fails else "fail"  # nan fails
    return Check(name, value, passes, status, meaning, advice if status != "pass" else "")


def _slope_check(slope: float, wrong: str = "") -> Check:
    meaning = "actual changes as a multiple of the predicted ones"
    if TOO_FLAT <= slope <= TOO_STEEP:
        return Check("slope", slope, TOO_FLAT, "pass", meaning)
    wrong = wrong or slope_advice(slope)
    return Check("slope", slope, TOO_STEEP if slope > 1 else TOO_FLAT, "warn", meaning, wrong)


def _smoothness_check(smoothness: float | None, advice: str) -> Check:
    if smoothness is None:
        reason = "1 by definition, not measured: the student takes one step. Look at pearson"
        return Check("metasmoothness", 1.0, SMOOTH, "pass", reason)
    meaning = "whether parameters keep their direction when a change of the data weights grows"
    return _check("metasmoothness", smoothness, SMOOTH, ROUGH, meaning, advice)


def _noise_check(config: InnerLoopConfig, noise: GradientNoise, num_samples: int) -> Check:
    share = f"share of noise in a step's gradient; one half at {noise.noise_scale:.0f} samples per step"
    larger = f"raise `batch_size`: the gradient of the {config.batch_size} samples in a step is mostly noise"
    noisy = noise.noise_share > NOISY and config.batch_size < num_samples
    return Check("gradient_noise", noise.noise_share, NOISY, *(("warn", share, larger) if noisy else ("pass", share)))
