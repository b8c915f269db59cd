"""Scores that hold when a large share of the samples is left out: means over data weights between 0 and 1."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metagradients.fine_tuning import FineTuning
from ..metagradients.goals import MetricFunction
from ..metagradients.metagradient import MetagradientOutput, differentiate


def path_weights(num_points: int, num_samples: int, seed: int) -> Tensor:
    """
    K random vectors of data weights, of shape `[K, N]`: a Latin hypercube.

    The weights of a sample are uniform in [0, 1], one in each of K equal intervals. So each sample is nearly left out
    in some vectors and nearly whole in others, each time among other companions.

    Args:
        num_points (`int`): K.
        num_samples (`int`): N.
        seed (`int`): Seed of the weights.
    """
    rng = np.random.default_rng(seed)
    intervals = rng.permuted(np.arange(num_points)[:, None].repeat(num_samples, axis=1), axis=0)
    return torch.from_numpy((intervals + rng.random(intervals.shape)) / num_points).float()


def differentiate_path(
    fine_tuning: FineTuning,
    metrics: Mapping[Any, MetricFunction],
    befores: Mapping[Any, float],
    num_points: int,
    rows: Sequence[int],
) -> dict[Any, MetagradientOutput]:
    """
    [`differentiate`] with scores that are means over random data weights. Takes K times as long, and a fine-tuning.

    A derivative at w = 1 is the effect of a small change of a weight. If a sample is left out, its weight goes from 1
    to 0, and the metric changes by the integral of the derivative over this way. If a large share is left out, the
    other weights are not 1 either. So the mean of the derivative over random weights predicts the effect better.

    Args:
        fine_tuning (`FineTuning`): The student's fine-tuning on N samples.
        metrics (`dict[str, Callable]`): Φ by name.
        befores (`dict[str, float]`): Φ before the fine-tuning, of those metrics of which it is known.
        num_points (`int`): K.
        rows (`list[int]`): The samples whose weights are random. The others, which are replayed, keep the weight 1.

    Returns:
        The output of each metric by name. `metric_after` is that of the fine-tuning with w = 1. What is neither this
        nor a score is that of the first random weights.
    """
    ones, points = torch.ones(len(fine_tuning.samples)), []
    for drawn in path_weights(num_points, len(rows), fine_tuning.config.seed):
        weights = ones.index_copy(0, torch.tensor(rows), drawn)
        points.append(differentiate(fine_tuning, metrics, weights, befores))
        befores = {name: output.metric_before for name, output in points[-1].items()}
    outputs, *others = points
    theta = fine_tuning.theta(ones)
    for name, output in outputs.items():
        output.metric_after = fine_tuning.evaluate(theta, metrics[name])
        for other in others:
            output.scores += other[name].scores
            if output.token_scores is not None:
                output.token_scores += other[name].token_scores
        output.scores /= num_points
        if output.token_scores is not None:
            output.token_scores /= num_points
    return outputs
