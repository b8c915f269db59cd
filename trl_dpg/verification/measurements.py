"""
Compares the changes of the metric that the scores predict with the changes after fine-tuning the student again.

The scores are exact derivatives. But if the fine-tuning is not smooth in the data weights, its derivatives do not
predict how the metric changes (Engstrom et al., arXiv 2503.13751, sec. 4). So the data weights w are changed a little,
the student is fine-tuned with the new weights, and the metric Φ is computed again.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from scipy.stats import norm, rankdata
from torch import Tensor

from ..metagradients.batches import plan_steps
from ..metagradients.fine_tuning import FineTuning
from ..metagradients.out_of_memory import within_memory
from ..student import FinetunedStudent, TokenizedExample
from .reweighting import ends, step_gradient


STEP = 0.05
"""
h, the change of every data weight. The vector of all weights changes by h √N, which for N = 400 is as much as leaving
out one sample. With the students of the quickstart, the effect of curvature is small at this h (Pearson 0.998), and
the rounding errors of float32 are much smaller than the change of Φ.
"""
NUM_GROUPS = 8
"""Number of groups of samples whose gradients are compared to measure the gradient noise."""


def random_signs(num_directions: int, num_samples: int, seed: int) -> Tensor:
    """K random directions for changes of the data weights, of shape `[K, N]`: 1 or -1 with equal probability."""
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
        ranks = (torch.as_tensor(rankdata(values)) for values in self)
        return pearson(*ranks)

    @property
    def interval(self) -> tuple[float, float]:
        """
        The 95 % confidence interval of Pearson's correlation, by Fisher's transformation.

        It holds if the changes are normally distributed, which sums over many samples are nearly. With 3 directions it
        is [-1, 1].
        """
        if len(self.actual) <= 3 or not math.isfinite(self.pearson):
            return -1.0, 1.0
        half_width = norm.ppf(0.975) / math.sqrt(len(self.actual) - 3)
        z = math.atanh(min(max(self.pearson, -1 + 1e-12), 1 - 1e-12))
        return math.tanh(z - half_width), math.tanh(z + half_width)

    @property
    def mirrored(self) -> float:
        """
        Pearson's correlation over each direction and its opposite.

        An opposite direction needs no fine-tuning: its changes are the same with the other sign. So the means are
        zero, and a few directions tell more than with `pearson`.
        """
        return (self.predicted.dot(self.actual) / (self.predicted.norm() * self.actual.norm())).item()

    @property
    def is_still(self) -> bool:
        """Whether the metric changes in no direction."""
        return not self.actual.any()

    @property
    def slope(self) -> float:
        """The least-squares slope through the origin: actual ≈ slope · predicted."""
        return (self.predicted.dot(self.actual) / self.predicted.dot(self.predicted)).item()


def predicted_and_actual(
    fine_tuning: FineTuning,
    metric: Callable[[FinetunedStudent], Tensor],
    scores: Tensor,
    directions: Tensor,
    step: float = STEP,
) -> Agreement:
    """
    The predicted and the actual change of the metric in each direction d.

        predicted: 2h ⟨τ, d⟩
        actual:    Φ(θ_T(1 + h d)) - Φ(θ_T(1 - h d))

    Here τ are the scores. In the central difference, the second-order term of Φ cancels, so the linear terms are
    compared. Takes 2K evaluations of the metric, and the sweeps of [`~trl_dpg.verification.reweighting.ends`].

    Args:
        fine_tuning (`FineTuning`): The student's fine-tuning on N samples.
        metric (`Callable`): Φ.
        scores (`torch.Tensor` of shape `[N]`): τ at w = 1.
        directions (`torch.Tensor` of shape `[K, N]`): The directions d.
        step (`float`, *optional*, defaults to `STEP`): h.
    """
    changes = [change.actual for change in changes_along(fine_tuning, metric, directions, step)]
    actual = torch.tensor(changes, dtype=torch.float64)
    return Agreement(predicted_changes(scores, directions, step), actual)


def predicted_changes(scores: Tensor, directions: Tensor, step: float = STEP) -> Tensor:
    """2h ⟨τ, d⟩ for each direction d, of shape `[K]`, float64."""
    return 2 * step * directions.double() @ scores.double()


class Change(NamedTuple):
    """
    What a change of the data weights in one direction did.

    Attributes:
        actual (`float`): The change of Φ between w = 1 - h d and w = 1 + h d.
        smoothness (`float`): Metasmoothness in this direction. `nan` if θ_T at w = 1 was not given.
    """

    actual: float
    smoothness: float


def changes_along(
    fine_tuning: FineTuning,
    metric: Callable[[FinetunedStudent], Tensor],
    directions: Tensor,
    step: float = STEP,
    theta: Tensor | None = None,
) -> Iterator[Change]:
    """
    The actual change of the metric in each direction, and the metasmoothness if `theta` (θ_T at w = 1) is given.

    See [`predicted_and_actual`] and [`metasmoothness`] for the figures and for the arguments.
    """
    for ahead, behind in ends(fine_tuning, directions, step):
        actual = fine_tuning.evaluate(ahead, metric) - fine_tuning.evaluate(behind, metric)
        yield Change(actual, math.nan if theta is None else _smoothness(behind, theta, ahead))


def metasmoothness(fine_tuning: FineTuning, directions: Tensor, step: float = STEP) -> float:
    """
    Empirical metasmoothness of the fine-tuning (Engstrom et al., arXiv 2503.13751, Def. 2), averaged over directions.

    The data weights take two steps of length h in a direction v: from w = 1 - h v to 1, and on to 1 + h v. The first
    step changes the fine-tuned parameters by Δ = θ_T(1) - θ_T(1 - h v), the second by Δ' = θ_T(1 + h v) - θ_T(1). If
    the fine-tuning is smooth, a parameter moves in the same direction in both steps. If it is not smooth, the two
    directions are unrelated. Each parameter p is weighted by its total movement |Δ_p + Δ'_p|:

        S = Σ_p |Δ_p + Δ'_p| sign(Δ_p) sign(Δ'_p) / Σ_p |Δ_p + Δ'_p|        in [-1, 1]; 1 is smooth

    With one optimizer step (T = 1), S = 1 up to rounding, because a step of AdamW or SGD is monotone in the gradient,
    and the gradient is linear in w. S is `nan` if no parameter moves or a parameter is not finite. Takes 1 + 2K
    forward sweeps.

    Args:
        fine_tuning (`FineTuning`): The student's fine-tuning on N samples.
        directions (`torch.Tensor` of shape `[K, N]`): The directions v.
        step (`float`, *optional*, defaults to `STEP`): h.
    """
    middle = fine_tuning.theta(torch.ones_like(directions[0]))
    found = [_smoothness(behind, middle, ahead) for ahead, behind in ends(fine_tuning, directions, step)]
    return sum(found) / len(found)


def _smoothness(behind: Tensor, middle: Tensor, ahead: Tensor) -> float:
    """S for θ_T `[P]` at three points on a line."""
    first, second = middle - behind, ahead - middle
    moved = (ahead - behind).abs()
    return (moved * first.sign() * second.sign()).sum().div(moved.sum()).item()


class GradientNoise(NamedTuple):
    """
    The noise in the gradient of the student before fine-tuning.

    Attributes:
        noise_scale (`float`): tr(Σ) / |G|², in samples. With a batch of this size, the noise share is one half.
        noise_share (`float`): The share of noise in the expected |g|² of a step's gradient g, in [0, 1].
        mean_square (`float`): The mean of g² over the parameters that have a gradient.
    """

    noise_scale: float
    noise_share: float
    mean_square: float


def gradient_noise(fine_tuning: FineTuning) -> GradientNoise:
    """
    Measure the simple noise scale (McCandlish et al., arXiv 1812.06162, sec. 2.2) of the student before fine-tuning.

    Let G be the mean gradient and Σ the covariance of a sample's gradient. The samples are split into M groups of b.
    The expected squared norm is |G|² + tr(Σ) / b for a group's gradient, and |G|² + tr(Σ) / bM for the mean gradient
    of all groups. These two equations give |G|² and tr(Σ). The noise share of a step of the inner loop with B samples
    is (tr(Σ) / B) / (|G|² + tr(Σ) / B).

    Args:
        fine_tuning (`FineTuning`): The student's fine-tuning; needs at least 2 samples with a supervised token.
    """
    examples = [example for example in fine_tuning.samples if example.num_supervised]
    if len(examples) < 2:
        raise ValueError(f"Gradient noise needs two samples with a token to learn from, got {len(examples)}.")
    size = max(1, len(examples) // NUM_GROUPS)
    num_groups = len(examples) // size
    groups = examples[: size * num_groups]
    mean, mean_norm = within_memory(fine_tuning, lambda: _mean(fine_tuning, groups, size), "The gradient noise")
    norm_of_mean = mean.square().sum().item()
    variance = max(mean_norm - norm_of_mean, 0.0) * num_groups / (num_groups - 1) * size  # tr(Σ)
    signal = max(norm_of_mean - variance / (size * num_groups), 0.0)  # |G|²
    step_noise = variance / min(fine_tuning.config.batch_size, len(examples))
    return GradientNoise(
        noise_scale=variance / signal if signal else math.inf,
        noise_share=step_noise / (signal + step_noise) if signal + step_noise else 0.0,
        mean_square=(signal + step_noise) / max(1, mean.count_nonzero().item()),
    )


def _mean(fine_tuning: FineTuning, examples: list[TokenizedExample], size: int) -> tuple[Tensor, float]:
    """The mean gradient `[P]` of groups of `size` samples, and the mean of |g|²."""
    grouping = replace(fine_tuning.config, batch_size=size, num_epochs=1, shuffle=False)
    groups = plan_steps(fine_tuning.student, examples, grouping)
    theta = fine_tuning.initial_theta()
    weights = torch.ones(len(examples), dtype=theta.dtype, device=theta.device)
    mean, mean_norm = torch.zeros_like(theta), 0.0
    with fine_tuning.sweeping():
        for group in groups:
            gradient = step_gradient(fine_tuning, theta, group, weights)
            mean += gradient / len(groups)
            mean_norm += gradient.square().sum().item() / len(groups)
    return mean, mean_norm


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors, in float64. `nan` if a vector is constant or not finite."""
    return torch.corrcoef(torch.stack([a, b]).double())[0, 1].item()
