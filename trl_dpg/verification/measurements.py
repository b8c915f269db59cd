"""
What the scores say about a student, held against what comes of fine-tuning it again.

The scores are exact derivatives. Whether they are of use is another question: a fine-tuning that is rough in its data
weights has derivatives that predict nothing (Engstrom et al., arXiv 2503.13751, sec. 4). So the data weights w are
moved a little, the student is fine-tuned with the new weights, and the metric Φ is read again.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ..metagradients.batches import plan_steps
from ..metagradients.fine_tuning import FineTuning
from ..metagradients.gradient import micro_batch_gradient
from ..student import FinetunedStudent


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
        return spearmanr(self.predicted, self.actual).statistic.item()

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


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors, in float64; `nan` if one is constant or not finite."""
    return torch.corrcoef(torch.stack([a, b]).double())[0, 1].item()
