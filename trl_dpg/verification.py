"""
Is a set-up trustworthy? What the scores say about a student, held against what comes of fine-tuning it again.

The scores are exact derivatives. Whether they are of use is another question: a fine-tuning that is rough in its data
weights has derivatives that predict nothing (Engstrom et al., arXiv 2503.13751, sec. 4). So the data weights w are
moved a little, the student is fine-tuned with the new weights, and the metric Φ is read again.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .metagradients import InnerLoopConfig, metagradient
from .metagradients.batches import plan_steps
from .metagradients.fine_tuning import FineTuning
from .metagradients.gradient import micro_batch_gradient
from .student import Examples, FinetunedStudent, Student
from .student.checks import bnb_modules


STEP = 0.05
"""
h, how far every data weight is moved. All weights together then move by h √N, about as far as leaving out one sample
of N = 400; on the quickstart's students the prediction's own curvature is still small there (Pearson 0.998), and
float32's rounding is far smaller than the change of Φ.
"""
NUM_GROUPS = 16
"""Groups of samples whose gradients are compared for the gradient noise."""


def random_signs(num_directions: int, num_samples: int, seed: int) -> Tensor:
    """Directions of shape `[K, N]` to move the data weights in: ±1, each half of the time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (num_directions, num_samples), generator=generator).float() * 2 - 1


class Agreement(NamedTuple):
    """Predicted and actual changes of Φ, `[K]` each, float64."""

    predicted: Tensor
    actual: Tensor

    @property
    def pearson(self) -> float:
        return pearson(self.predicted, self.actual)

    @property
    def spearman(self) -> float:
        return pearson(_ranks(self.predicted), _ranks(self.actual))

    @property
    def slope(self) -> float:
        """Least squares through the origin: actual ≈ slope · predicted."""
        return (self.predicted.dot(self.actual) / self.predicted.dot(self.predicted)).item()


def predicted_and_actual(
    fine_tuning: FineTuning,
    metric: Callable[[FinetunedStudent], Tensor],
    scores: Tensor,
    directions: Tensor,
    step: float = STEP,
) -> Agreement:
    """
    For each direction d, what the scores τ say of the metric's change, 2h ⟨τ, d⟩, and what it is,

        Φ(θ_T(1 + h d)) - Φ(θ_T(1 - h d)).

    Central differences: curvature drops out, and what is compared is the linear term. Takes 2K forward sweeps.

    Args:
        fine_tuning (`FineTuning`): The student's fine-tuning on N samples.
        metric (`Callable`): Φ.
        scores (`torch.Tensor` of shape `[N]`): τ at w = 1.
        directions (`torch.Tensor` of shape `[K, N]`): The directions d.
        step (`float`, *optional*, defaults to `STEP`): h.
    """
    ahead, behind = (
        torch.tensor([fine_tuning.metric(1 + shift * d, metric) for d in directions], dtype=torch.float64)
        for shift in (step, -step)
    )
    return Agreement(2 * step * directions.double() @ scores.double(), ahead - behind)


def metasmoothness(fine_tuning: FineTuning, directions: Tensor, step: float = STEP) -> float:
    """
    Empirical metasmoothness of the fine-tuning (Engstrom et al., arXiv 2503.13751, Def. 2), averaged over directions.

    Along a direction v, starting from w = 1, take two steps of length h one after the other. Each moves the fine-tuned
    parameters, by Δ = θ_T(w + h v) - θ_T(w) and by Δ' = θ_T(w + 2h v) - θ_T(w + h v). If the fine-tuning is smooth, a
    parameter moves in the same direction both times; if it is rough, the two directions have nothing to do with each
    other. Parameters are weighted by how far both steps together moved them, |θ_T(w + 2h v) - θ_T(w)|:

        S = Σ_p |Δ_p + Δ'_p| sign(Δ_p) sign(Δ'_p) / Σ_p |Δ_p + Δ'_p|        in [-1, 1]; 1 is smooth

    One step of AdamW or SGD (T = 1) has S = 1, up to rounding: it is monotone in the gradient, which is linear in
    w. `nan` if nothing moves or a parameter is not finite. Takes 1 + 2K forward sweeps.

    Args:
        fine_tuning (`FineTuning`): The student's fine-tuning on N samples.
        directions (`torch.Tensor` of shape `[K, N]`): The directions v.
        step (`float`, *optional*, defaults to `STEP`): h.
    """
    start = fine_tuning.theta(torch.ones_like(directions[0]))
    total = 0.0
    for v in directions:
        middle, end = (fine_tuning.theta(1 + steps * step * v) for steps in (1, 2))
        first, second = middle - start, end - middle
        moved = (end - start).abs()
        total += (moved * first.sign() * second.sign()).sum().div(moved.sum()).item()
    return total / len(directions)


class GradientNoise(NamedTuple):
    """
    The gradient at the student's start, and how far single samples' gradients scatter about it.

    Attributes:
        noise_scale (`float`): tr(Σ) / |G|², in samples: a batch of this size is half signal, half noise.
        noise_share (`float`): Of a step's expected |g|², the part that is noise, in [0, 1].
        mean_square (`float`): A step's g² per parameter, averaged over parameters with a gradient.
    """

    noise_scale: float
    noise_share: float
    mean_square: float


def gradient_noise(fine_tuning: FineTuning) -> GradientNoise:
    """
    The simple noise scale (McCandlish et al., arXiv 1812.06162, sec. 2.2) at the student's start.

    The samples are split into M groups of b. With Σ the covariance of a sample's gradient and G the mean gradient, a
    group's gradient g has E|g|² = |G|² + tr(Σ) / b and the mean of all groups' |G|² + tr(Σ) / bM, which gives both.
    A step of the inner loop, with B samples, has the noise share (tr(Σ) / B) / (|G|² + tr(Σ) / B).

    Args:
        fine_tuning (`FineTuning`): The student's fine-tuning; needs at least 2 samples with a supervised token.
    """
    student, config = fine_tuning.student, fine_tuning.config
    examples = [example for example in fine_tuning.samples if example.num_supervised]
    if len(examples) < 2:
        raise ValueError(f"Gradient noise needs two samples with a token to learn from, got {len(examples)}.")
    size = max(1, len(examples) // NUM_GROUPS)
    num_groups = len(examples) // size
    grouping = replace(config, batch_size=size, num_epochs=1, shuffle=False)
    groups = plan_steps(student, examples[: size * num_groups], grouping)
    theta = student.initial_theta()
    weights = torch.ones(len(examples), dtype=theta.dtype, device=theta.device)
    mean, mean_norm = torch.zeros_like(theta), 0.0
    with fine_tuning.sweeping():
        for group in groups:
            gradient = torch.zeros_like(theta)
            for micro_batch in group:
                part = micro_batch_gradient(student, theta, micro_batch, weights, config)
                gradient += torch.cat([value.flatten() for value in part.values])
            mean += gradient / num_groups
            mean_norm += gradient.square().sum().item() / num_groups
    norm_of_mean = mean.square().sum().item()
    variance = max(mean_norm - norm_of_mean, 0.0) * num_groups / (num_groups - 1) * size  # tr(Σ)
    signal = max(norm_of_mean - variance / (size * num_groups), 0.0)  # |G|²
    step_noise = variance / min(config.batch_size, len(examples))
    return GradientNoise(
        noise_scale=variance / signal if signal else math.inf,
        noise_share=step_noise / (signal + step_noise) if signal + step_noise else 0.0,
        mean_square=(signal + step_noise) / max(1, mean.count_nonzero().item()),
    )


def in_precision(student: Student, dtype: torch.dtype) -> Student:
    """A copy of the student that computes in `dtype`: its weights cast, or the compute type of its 4-bit layers."""
    model = copy.deepcopy(student.model)
    quantized = bnb_modules(model, "Linear4bit")
    for layer in quantized.values():
        layer.compute_dtype = dtype
    if not quantized:
        model.to(dtype)
    return Student(model, student.processing_class)


def compute_dtype(student: Student) -> torch.dtype:
    """What the student computes in: its weights' type, or the compute type of its 4-bit layers."""
    quantized = bnb_modules(student.model, "Linear4bit")
    if quantized:
        return next(iter(quantized.values())).compute_dtype or torch.float32
    return next(parameter.dtype for parameter in student.model.parameters())


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors, in float64; `nan` if one is constant or not finite."""
    return torch.corrcoef(torch.stack([a, b]).double())[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 on; equal values share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


# -- the verdict -----------------------------------------------------------------------------------------------------


@dataclass
class Check:
    """
    One figure and what to think of it.

    Attributes:
        name (`str`): E.g. `"pearson"`.
        value (`float` or `None`): The figure; `None` if it could not be had.
        threshold (`float` or `None`): What a pass needs.
        status (`str`): `"pass"`, `"warn"`, `"fail"` or `"skip"`.
        meaning (`str`): What the figure is; of a skipped one, why.
        advice (`str`): What to change, by the flags' names; empty for a pass.
    """

    name: str
    value: float | None
    threshold: float | None
    status: str
    meaning: str
    advice: str = ""


@dataclass
class Remedy:
    """A change that was tried: its flags, and what the two central figures are with it."""

    flags: str
    pearson: float
    metasmoothness: float

    @property
    def helps(self) -> bool:
        return self.pearson >= PASS and self.metasmoothness >= SMOOTH


@dataclass
class Verification:
    """
    What [`verify`] returns.

    Attributes:
        checks (`list[Check]`): The figures.
        remedies (`list[Remedy]`): Changes that were tried because a check did not pass, up to the first that helps.
        predicted (`list[float]`), actual (`list[float]`): Predicted and actual change of Φ in each direction.
        slope (`float`): Least squares, actual ≈ slope · predicted.
        noise_scale (`float`): See [`GradientNoise`]; in samples.
        mean_square_gradient (`float`): See [`GradientNoise`].
        metric_before (`float`), metric_after (`float`): Φ before and after the student's fine-tuning.
        seconds (`float`): How long it took.
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
        """The verdict and its reasons, for the terminal."""
        lines: list[str] = []
        for check in self.checks:
            value = "" if check.value is None else f"{check.value:.3f}"
            lines.append(f"{check.status:4}  {check.name:14} {value:>6}  {check.meaning}")
            advice = f"      -> {check.advice}"
            if check.advice and advice not in lines:  # checks may share theirs
                lines.append(advice)
        if self.remedies:
            lines.append("Tried:")
        for remedy in self.remedies:
            figures = f"Pearson {remedy.pearson:.3f}, metasmoothness {remedy.metasmoothness:.3f}"
            lines.append(f"      {remedy.flags}: {figures}")
        if self.remedies and self.remedies[-1].helps:
            lines.append(f"Change: {self.remedies[-1].flags}")
        verdict = "trustworthy" if self.trustworthy else "NOT trustworthy"
        return "\n".join([*lines, f"This set-up is {verdict} ({self.seconds:.0f} s)."])


PASS, WARN = 0.95, 0.9
"""Correlations from `PASS` on pass, below `WARN` they fail."""
SMOOTH, ROUGH = 0.9, 0.7
"""Metasmoothness from `SMOOTH` on passes, below `ROUGH` it fails."""
NOISY = 0.95
"""A step's gradient of which more than this share is noise, a batch below 1/19 of the noise scale, gets a warning."""


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
    Whether the scores of a student, its data and metric can be trusted, and what to change if not.

    Takes two metagradients (one with `compare_precision=False`) and 2K + 7 forward sweeps; each remedy that is tried,
    a metagradient and 15 sweeps.

    Args:
        student (`Student`):
            The student at its start.
        examples (`list[str]`, `list[dict]` or [`~datasets.Dataset`]):
            N samples, such as the generator writes them; best as many as a reward step has.
        metric (`Callable`):
            Φ.
        config (`InnerLoopConfig`, *optional*):
            The inner loop.
        num_directions (`int`, *optional*, defaults to `20`):
            K, random reweightings of which Φ is predicted; at least 3.
        step (`float`, *optional*, defaults to `STEP`):
            h, how far they go.
        compare_precision (`bool`, *optional*, defaults to `True`):
            Compare float32's scores with bfloat16's. Needs memory for a copy of the student.
        try_remedies (`bool`, *optional*, defaults to `True`):
            If predictions fail, see whether another `eps_root`, learning rate or batch size mends it.
        seed (`int`, *optional*, defaults to `0`):
            Of the reweightings.

    Raises:
        `ValueError`: If the baseline without scores is asked for (`attribution="dataset"`), there are fewer than 3
            directions or 2 samples, the step does not lie in (0, 0.5), or for what [`metagradient`] raises it.
    """
    config = replace(config or InnerLoopConfig(), per_token=False)
    if config.attribution != "metagradient":
        raise ValueError("There is nothing to verify: attribution='dataset' computes no scores of samples.")
    if num_directions < 3:
        raise ValueError(f"A correlation needs at least 3 directions, got num_directions = {num_directions}.")
    if not 0 < step < 0.5:
        raise ValueError(f"step must lie between 0 and 0.5 (weights stay positive), got {step}.")
    started = time.perf_counter()
    fine_tuning = FineTuning(student, examples, config)
    num_samples = len(fine_tuning.samples)
    noise = gradient_noise(fine_tuning)
    result = Verification(noise_scale=noise.noise_scale, mean_square_gradient=noise.mean_square)
    advice = _advice(config, noise, num_samples)
    directions = random_signs(num_directions, num_samples, seed)
    try:
        output = metagradient(student, examples, metric, config)
    except FloatingPointError as error:
        result.checks.append(Check("finite", None, None, "fail", str(error), advice))
    else:
        result.metric_before, result.metric_after = output.metric_before, output.metric_after
        agreement = predicted_and_actual(fine_tuning, metric, output.scores, directions, step)
        result.predicted, result.actual = (values.tolist() for values in agreement)
        result.slope = agreement.slope
        meaning = f"correlation of predicted with actual changes of the metric, {num_directions} reweightings"
        result.checks += [
            _check("pearson", agreement.pearson, PASS, WARN, meaning, advice),
            _check("spearman", agreement.spearman, WARN, ROUGH, "the same of their ranks", advice),
        ]
        smoothness = metasmoothness(fine_tuning, directions[:3], step)
        meaning = "whether the fine-tuned weights go on as they began when a reweighting grows"
        result.checks.append(_check("metasmoothness", smoothness, SMOOTH, ROUGH, meaning, advice))
        if compare_precision:
            result.checks.append(_precision_check(student, examples, metric, config, output.scores))
    share = f"share of noise in a step's gradient; half at {noise.noise_scale:.0f} samples a step"
    larger = f"raise --student_batch_size: the {config.batch_size} samples of a step hardly agree on a direction"
    noisy = noise.noise_share > NOISY and config.batch_size < num_samples
    result.checks.append(
        Check("gradient_noise", noise.noise_share, NOISY, "warn" if noisy else "pass", share, larger if noisy else "")
    )
    central = [check for check in result.checks if check.name in ("finite", "pearson", "metasmoothness")]
    if try_remedies and any(check.status != "pass" for check in central):
        for flags, changed in _remedies(config, noise, num_samples):
            result.remedies.append(_try(flags, changed, student, examples, metric, directions[:6], step))
            if result.remedies[-1].helps:
                break
    result.seconds = time.perf_counter() - started
    return result


def _check(name: str, value: float, passes: float, fails: float, meaning: str, advice: str) -> Check:
    status = "pass" if value >= passes else "warn" if value >= fails else "fail"  # nan fails
    return Check(name, value, passes, status, meaning, advice if status != "pass" else "")


def _precision_check(student, examples, metric, config, scores: Tensor) -> Check:
    """Correlation of the scores in float32 and in bfloat16, whichever of them the student computes in."""
    half = compute_dtype(student).itemsize == 2
    threshold, meaning = PASS, "correlation of the scores in float32 and in bfloat16"
    if config.hvp == "finite_difference":
        reason = "bfloat16 cannot hold the shifts of hvp='finite_difference'"
        return Check("bf16_agreement", None, threshold, "skip", reason)
    try:
        other = in_precision(student, torch.float32 if half else torch.bfloat16)
        value = pearson(scores, metagradient(other, examples, metric, config).scores)
    except torch.OutOfMemoryError:
        return Check("bf16_agreement", None, threshold, "skip", "there is no memory for a copy of the student")
    except FloatingPointError:
        value = math.nan
    larger = ", or raise --student_eps_root" if config.optimizer == "adamw" else ""
    if half:
        flag = '--student_model_init_kwargs \'{"dtype": "float32"}\''
        if bnb_modules(student.model, "Linear4bit"):
            flag = "--student_bnb_4bit_compute_dtype float32"
        return _check("bf16_agreement", value, threshold, WARN, meaning, f"set {flag}{larger}")
    if value >= threshold:
        return Check("bf16_agreement", value, threshold, "pass", meaning)
    advice = f"leave the student in float32{larger}"  # where it is: nothing has failed
    return Check("bf16_agreement", value, threshold, "warn", meaning, advice)


def _advice(config: InnerLoopConfig, noise: GradientNoise, num_samples: int) -> str:
    """What to change for a smoother fine-tuning."""
    changes = [f"lower --student_learning_rate (now {config.learning_rate:g})"]
    if config.batch_size < min(num_samples, noise.noise_scale):
        changes.append(f"raise --student_batch_size (now {config.batch_size})")
    if _lacks_eps_root(config, noise):
        now = f"now {config.eps_root:g}; the mean square of a step's gradient is {noise.mean_square:.0e}"
        changes.insert(0, f"raise --student_eps_root to {_fitting_eps_root(noise)} ({now})")
    return ", or ".join(changes)


def _lacks_eps_root(config: InnerLoopConfig, noise: GradientNoise) -> bool:
    return config.optimizer == "adamw" and config.eps_root < noise.mean_square / 10


def _fitting_eps_root(noise: GradientNoise) -> str:
    """A power of ten near the gradient's squares, as an argument."""
    return f"1e{round(math.log10(noise.mean_square))}"


def _remedies(config: InnerLoopConfig, noise: GradientNoise, num_samples: int):
    """Changes worth trying, as flags and configurations."""
    if _lacks_eps_root(config, noise):
        fitting = _fitting_eps_root(noise)
        smoother = replace(config, eps_root=float(fitting))
        yield f"--student_eps_root {fitting}", smoother
        lower = config.learning_rate / 10
        flags = f"--student_eps_root {fitting} --student_learning_rate {lower:g}"
        yield flags, replace(smoother, learning_rate=lower)
    for lower in (config.learning_rate / 10, config.learning_rate / 100):
        yield f"--student_learning_rate {lower:g}", replace(config, learning_rate=lower)
    larger = 4 * config.batch_size if num_samples % (4 * config.batch_size) == 0 else num_samples
    if config.batch_size < larger:
        yield f"--student_batch_size {larger}", replace(config, batch_size=larger)


def _try(flags: str, config: InnerLoopConfig, student, examples, metric, directions: Tensor, step: float) -> Remedy:
    fine_tuning = FineTuning(student, examples, config)
    try:
        scores = metagradient(student, examples, metric, config).scores
    except FloatingPointError:
        return Remedy(flags, math.nan, math.nan)
    agreement = predicted_and_actual(fine_tuning, metric, scores, directions, step)
    return Remedy(flags, agreement.pearson, metasmoothness(fine_tuning, directions[:1], step))
