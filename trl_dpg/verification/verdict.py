"""The verdict on whether the scores of a set-up can be trusted: checks that pass or fail, with advice."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metagradients import InnerLoopConfig
from ..metagradients.fine_tuning import FineTuning
from ..metagradients.metagradient import check_samples, differentiate
from ..student import Examples, FinetunedStudent, Student
from ..student.checks import bnb_modules
from ..student.precision import compute_dtype, in_precision
from .measurements import (
    STEP,
    GradientNoise,
    gradient_noise,
    metasmoothness,
    pearson,
    predicted_and_actual,
    random_signs,
)


PASS, WARN = 0.95, 0.9
"""A correlation passes if it is at least `PASS`, and fails if it is below `WARN`."""
SMOOTH, ROUGH = 0.9, 0.7
"""Metasmoothness passes if it is at least `SMOOTH`, and fails if it is below `ROUGH`."""
NOISY = 0.95
"""A noise share above this gets a warning. The batch size is then less than 1/19 of the noise scale."""


@dataclass
class Check:
    """
    One figure, and whether it passes.

    Attributes:
        name (`str`): Name of the figure, e.g. `"pearson"`.
        value (`float` or `None`): The figure. `None` if it could not be computed.
        threshold (`float` or `None`): The value that is needed to pass.
        status (`str`): `"pass"`, `"warn"`, `"fail"` or `"skip"`.
        meaning (`str`): What the figure measures. For a skipped check, the reason.
        advice (`str`): What to change. Empty if the check passes. Names of fields of [`InnerLoopConfig`] and of
            arguments of [`Student`] are in backticks.
    """

    name: str
    value: float | None
    threshold: float | None
    status: str
    meaning: str
    advice: str = ""


@dataclass
class Remedy:
    """A change of [`InnerLoopConfig`] that was tried: the changed fields, and the two central figures with them."""

    changes: dict[str, Any]
    pearson: float
    metasmoothness: float

    @property
    def helps(self) -> bool:
        return self.pearson >= PASS and self.metasmoothness >= SMOOTH

    def describe(self) -> str:
        """The changes as text, with the names of fields in backticks."""
        return " ".join(f"`{name}` {_short(value)}" for name, value in self.changes.items())


@dataclass
class Verification:
    """
    The result of [`verify`].

    Attributes:
        checks (`list[Check]`): The checks.
        remedies (`list[Remedy]`): Changes that were tried because a check did not pass, up to the first that helps.
        predicted (`list[float]`), actual (`list[float]`): Predicted and actual change of Φ in each direction.
        slope (`float`): The least-squares slope in actual ≈ slope · predicted.
        noise_scale (`float`): See [`GradientNoise`]; in samples.
        mean_square_gradient (`float`): See [`GradientNoise`].
        metric_before (`float`), metric_after (`float`): Φ before and after the student's fine-tuning.
        seconds (`float`): Time of the verification.
    """

    checks: list[Check] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    actual: list[float] = field(default_factory=list)
    slope: float = math.nan
    noise_scale: float = math.nan
    mean_square_gradient: float = math.nan
    metric_before: float = math.nan
    metric_after: float = math.nan
    seconds: float = math.nan

    @property
    def trustworthy(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "fail" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def render(self) -> str:
        """The verdict and its reasons as text for the terminal. Names of fields are in backticks."""
        lines: list[str] = []
        for check in self.checks:
            value = "" if check.value is None else f"{check.value:.3f}"
            lines.append(f"{check.status:4}  {check.name:14} {value:>6}  {check.meaning}")
            advice = f"      -> {check.advice}"
            if check.advice and advice not in lines:  # several checks may have the same advice
                lines.append(advice)
        if self.remedies:
            lines.append("Tried:")
        for remedy in self.remedies:
            figures = f"Pearson {remedy.pearson:.3f}, metasmoothness {remedy.metasmoothness:.3f}"
            lines.append(f"      {remedy.describe()}: {figures}")
        if self.remedies and self.remedies[-1].helps:
            lines.append(f"Change: {self.remedies[-1].describe()}")
        verdict = "trustworthy" if self.trustworthy else "NOT trustworthy"
        return "\n".join([*lines, f"This set-up is {verdict} ({self.seconds:.0f} s)."])


@dataclass
class SetUp:
    """The set-up to verify: a student, N samples, the metric, the inner loop, and the change h of the data weights."""

    student: Student
    examples: Examples
    metric: Callable[[FinetunedStudent], Tensor]
    config: InnerLoopConfig
    step: float

    def fine_tuning(self) -> FineTuning:
        return FineTuning(self.student, self.examples, self.config)


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
) -> Verification:
    """
    Check whether the scores of a student, its data and metric can be trusted, and what to change if not.

    Takes two metagradients (one with `compare_precision=False`) and 2K + 7 forward sweeps. Each remedy that is tried
    takes one metagradient and 15 forward sweeps.

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
            K, the number of random changes of the data weights for which Φ is predicted; at least 3.
        step (`float`, *optional*, defaults to `STEP`):
            h, the change of every data weight.
        compare_precision (`bool`, *optional*, defaults to `True`):
            Compare the scores in float32 with those in bfloat16. Needs memory for a copy of the student.
        try_remedies (`bool`, *optional*, defaults to `True`):
            If a central check does not pass, try other values of `eps_root`, learning rate and batch size.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the changes of the data weights.

    Raises:
        `ValueError`: If the baseline without scores is asked for (`attribution="dataset"`), there are fewer than 3
            directions or 2 samples, all samples are the same, the step does not lie in (0, 0.5), or for what
            [`metagradient`] raises it.
    """
    config = replace(config or InnerLoopConfig(), per_token=False)
    _check_arguments(config, num_directions, step)
    started = time.perf_counter()
    set_up = SetUp(student, examples, metric, config, step)
    fine_tuning = _checked_fine_tuning(set_up)
    noise = gradient_noise(fine_tuning)
    directions = random_signs(num_directions, len(fine_tuning.samples), seed)
    result = Verification(noise_scale=noise.noise_scale, mean_square_gradient=noise.mean_square)
    _check_predictions(set_up, fine_tuning, noise, directions, compare_precision, result)
    result.checks.append(_noise_check(config, noise, len(fine_tuning.samples)))
    central = [check for check in result.checks if check.name in ("finite", "pearson", "metasmoothness")]
    if try_remedies and any(check.status != "pass" for check in central):
        for changes in _remedies(config, noise, len(fine_tuning.samples)):
            result.remedies.append(_try(changes, set_up, directions[:6]))
            if result.remedies[-1].helps:
                break
    result.seconds = time.perf_counter() - started
    return result


def _check_arguments(config: InnerLoopConfig, num_directions: int, step: float) -> None:
    if config.attribution != "metagradient":
        raise ValueError("There is nothing to verify: attribution='dataset' computes no scores of samples.")
    if num_directions < 3:
        raise ValueError(f"A correlation needs at least 3 directions, got num_directions = {num_directions}.")
    if not 0 < step < 0.5:
        raise ValueError(f"step must lie between 0 and 0.5 (weights stay positive), got {step}.")


def _checked_fine_tuning(set_up: SetUp) -> FineTuning:
    fine_tuning = set_up.fine_tuning()
    check_samples(fine_tuning)
    if fine_tuning.samples_are_identical:
        raise ValueError(
            f"There is nothing to verify: all {len(fine_tuning.samples)} samples are the same tokens. Give samples "
            "that differ, or check the generator's texts."
        )
    return fine_tuning


def _check_predictions(
    set_up: SetUp,
    fine_tuning: FineTuning,
    noise: GradientNoise,
    directions: Tensor,
    compare_precision: bool,
    result: Verification,
) -> None:
    """Add the checks that need scores to the result."""
    metric, config, step = set_up.metric, set_up.config, set_up.step
    advice = _advice(config, noise, directions.size(1))
    try:
        output = differentiate(fine_tuning, metric)
    except FloatingPointError as error:
        result.checks.append(Check("finite", None, None, "fail", str(error), advice))
        return
    result.metric_before, result.metric_after = output.metric_before, output.metric_after
    agreement = predicted_and_actual(fine_tuning, metric, output.scores, directions, step)
    result.predicted, result.actual = (values.tolist() for values in agreement)
    result.slope = agreement.slope
    meaning = f"correlation of predicted and actual changes of the metric, in {len(directions)} directions"
    smoothness = metasmoothness(fine_tuning, directions[:3], step)
    smooth = "whether parameters keep their direction when a change of the data weights grows"
    result.checks += [
        _check("pearson", agreement.pearson, PASS, WARN, meaning, advice),
        _check("spearman", agreement.spearman, WARN, ROUGH, "the same correlation for the ranks", advice),
        _check("metasmoothness", smoothness, SMOOTH, ROUGH, smooth, advice),
    ]
    if compare_precision:
        result.checks.append(_precision_check(set_up, output.scores))


def _check(name: str, value: float, passes: float, fails: float, meaning: str, advice: str) -> Check:
    status = "pass" if value >= passes else "warn" if value >= fails else "fail"  # nan fails
    return Check(name, value, passes, status, meaning, advice if status != "pass" else "")


def _noise_check(config: InnerLoopConfig, noise: GradientNoise, num_samples: int) -> Check:
    share = f"share of noise in a step's gradient; one half at {noise.noise_scale:.0f} samples per step"
    larger = f"raise `batch_size`: the gradient of the {config.batch_size} samples in a step is mostly noise"
    noisy = noise.noise_share > NOISY and config.batch_size < num_samples
    return Check("gradient_noise", noise.noise_share, NOISY, *(("warn", share, larger) if noisy else ("pass", share)))


def _precision_check(set_up: SetUp, scores: Tensor) -> Check:
    """Correlation of the scores in float32 and in bfloat16. The student computes in one, and a copy in the other."""
    student, config = set_up.student, set_up.config
    half = compute_dtype(student).itemsize == 2
    meaning = "correlation of the scores in float32 and in bfloat16"
    if config.hvp == "finite_difference":
        reason = "bfloat16 is too coarse for the small changes of hvp='finite_difference'"
        return Check("bf16_agreement", None, PASS, "skip", reason)
    try:
        other = replace(set_up, student=in_precision(student, torch.float32 if half else torch.bfloat16))
        value = pearson(scores, differentiate(other.fine_tuning(), set_up.metric).scores)
    except torch.OutOfMemoryError:
        return Check("bf16_agreement", None, PASS, "skip", "there is not enough memory for a copy of the student")
    except FloatingPointError:
        value = math.nan
    larger = ", or raise `eps_root`" if config.optimizer == "adamw" else ""
    if half:
        advice = 'set `model_init_kwargs` \'{"dtype": "float32"}\''
        if bnb_modules(student.model, "Linear4bit"):
            advice = "set `bnb_4bit_compute_dtype` float32"
        return _check("bf16_agreement", value, PASS, WARN, meaning, f"{advice}{larger}")
    if value >= PASS:
        return Check("bf16_agreement", value, PASS, "pass", meaning)
    advice = f"leave the student in float32{larger}"  # a warning only, because the student computes in float32
    return Check("bf16_agreement", value, PASS, "warn", meaning, advice)


def _advice(config: InnerLoopConfig, noise: GradientNoise, num_samples: int) -> str:
    """What to change for a smoother fine-tuning."""
    changes = [f"lower `learning_rate` (now {_short(config.learning_rate)})"]
    if config.batch_size < min(num_samples, noise.noise_scale):
        changes.append(f"raise `batch_size` (now {config.batch_size})")
    if _lacks_eps_root(config, noise):
        now = f"now {_short(config.eps_root)}; the mean square of a step's gradient is {noise.mean_square:.0e}"
        changes.insert(0, f"raise `eps_root` to {_short(_fitting_eps_root(noise))} ({now})")
    return ", or ".join(changes)


def _lacks_eps_root(config: InnerLoopConfig, noise: GradientNoise) -> bool:
    return config.optimizer == "adamw" and config.eps_root < noise.mean_square / 10


def _fitting_eps_root(noise: GradientNoise) -> float:
    """The power of ten that is nearest to the mean square of a step's gradient."""
    return float(f"1e{round(math.log10(noise.mean_square))}")


def _remedies(config: InnerLoopConfig, noise: GradientNoise, num_samples: int) -> Iterator[dict[str, Any]]:
    """The changes to try, in this order, as fields of the configuration."""
    lower = config.learning_rate / 10
    if _lacks_eps_root(config, noise):
        yield {"eps_root": _fitting_eps_root(noise)}
        yield {"eps_root": _fitting_eps_root(noise), "learning_rate": lower}
    yield {"learning_rate": lower}
    yield {"learning_rate": lower / 10}
    larger = 4 * config.batch_size if num_samples % (4 * config.batch_size) == 0 else num_samples
    if config.batch_size < larger:
        yield {"batch_size": larger}


def _try(changes: dict[str, Any], set_up: SetUp, directions: Tensor) -> Remedy:
    fine_tuning = replace(set_up, config=replace(set_up.config, **changes)).fine_tuning()
    try:
        scores = differentiate(fine_tuning, set_up.metric).scores
    except FloatingPointError:
        return Remedy(changes, math.nan, math.nan)
    agreement = predicted_and_actual(fine_tuning, set_up.metric, scores, directions, set_up.step)
    return Remedy(changes, agreement.pearson, metasmoothness(fine_tuning, directions[:1], set_up.step))


def _short(value: float) -> str:
    """A number in short form, e.g. 1e-5, 0.5 or 128."""
    return np.format_float_scientific(value, trim="-", exp_digits=1) if 0 < value < 0.01 else f"{value:g}"
