"""A reward for a batch whose lengths follow a target distribution."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..length_target import ALL, LengthTarget, LengthTargets
from .lengths import LengthReader


class LengthDistributionReward:
    """
    A TRL reward function: the lengths of the batch should follow a target distribution, by difficulty.

    It is optimal transport in one dimension. Of the n completions of one difficulty, from all prompts and all ranks,
    the i-th shortest has the log-length x_i and belongs to the target's quantile y_i at level (i - 1/2) / n. Equal
    lengths share the mean of their quantiles, so that chance never makes a difference between them. There are two
    forms.

    - `"potential"` is minus the derivative of the transport cost ½ Σ (x_i - y_i)² / n in the share of completions at
      each length. This derivative is the Kantorovich potential (Santambrogio, Optimal Transport for Applied
      Mathematicians, proposition 7.17). Between neighbours, the reward changes by ½ (d_i + d_{i+1}) (x_{i+1} - x_i)
      with d = y - x: it rises towards longer completions where the target is longer, and falls where it is shorter.
      The best length of the batch has the reward 0. This is the form for training: it says in which direction a
      length is to change, and two completions of one prompt differ wherever their lengths do.
    - `"distance"` is -|x_i - y_i|. It tells how far each completion is from its place. It is zero exactly if the batch
      has the target's lengths. As a reward it has a blind spot: if all lengths of a batch are too short by the same
      factor, all rewards are equal, and the advantages are zero.

    Which prompt gets a long completion and which a short one is left to the generator, within a difficulty.

    Args:
        target ([`LengthTargets`], `dict` or `str`):
            The target: a form (`"lognormal:200,0.5"`), the path of a target that `trl-dpg lengths` has fitted, or a
            mapping from difficulties to these.
        difficulty_column (`str`, *optional*, defaults to `"difficulty"`):
            The dataset's column with the difficulty, for a target with more than one.
        measure (`str`, *optional*, defaults to `"all"`):
            `"all"`: tokens of the completion. `"reasoning"`: tokens of its thoughts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*):
            Counts tokens of reasoning. Needed with `measure="reasoning"`.
        check (`Callable` or `str`, *optional*):
            A TRL reward function, or its dotted path such as `"trl.rewards.accuracy_reward"`, that is above 0.5 for
            correct completions. Only these are matched. Their reward is then 1 plus that of the form, and at least
            0. All others have the reward 0, and those with the value `None` are left out.
        form (`str`, *optional*, defaults to `"potential"`):
            `"potential"` or `"distance"`.

    Raises:
        `ValueError`: If the target cannot be read, or an option is unknown.
    """

    __name__ = "length_distribution"  # the reward's name in TRL's logs

    def __init__(
        self,
        target: LengthTargets | LengthTarget | Mapping[str, Any] | str,
        difficulty_column: str = "difficulty",
        measure: str = "all",
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        check: Callable[..., list[float | None]] | str | None = None,
        form: str = "potential",
    ):
        if form not in ("potential", "distance"):
            raise ValueError(f"Unknown `form` {form!r}. Choose 'potential' or 'distance'.")
        self.target = LengthTargets.read(target)
        self.difficulty_column = difficulty_column
        self.form = form
        self._reader = LengthReader(measure, tokenizer, check)

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs,
    ) -> list[float | None]:
        """
        Score a batch. The trainer calls this on every rank, with the rank's completions.

        Args:
            prompts (`list`): This rank's prompts.
            completions (`list`): This rank's completions, texts or messages.
            completion_ids (`list[list[int]]`, *optional*): The generator's token ids, needed with `measure="all"`.
            log_metric (`Callable`, *optional*):
                TRL's function that logs scalars. `length_distribution/wasserstein` is the mean of |x_i - y_i|, the
                Wasserstein-1 distance of the batch to the target in log-length.
            kwargs: Columns of the dataset, among them that of the difficulty, for the check as well.

        Returns:
            `list[float | None]`: A reward for each of this rank's completions, in nats² (`"potential"`) or nats.
        """
        difficulties = self._difficulties(len(completions), kwargs)
        batch = self._reader.read(self.__name__, prompts, completions, completion_ids, difficulties, **kwargs)
        names = np.array([str(value) for value in batch.values])
        rewards = np.where(np.isnan(batch.correct), np.nan, 0.0)
        distances = []
        for name in dict.fromkeys(names.tolist()):
            target = self.target.of(name)  # on all ranks alike
            places = np.flatnonzero((names == name) & (batch.correct == 1.0))
            if len(places) == 0:
                continue
            log_lengths, wanted = np.log(batch.lengths[places]), np.log(target.spread(len(places)))
            quantiles = matched(log_lengths, wanted)
            distances.append(np.abs(np.sort(log_lengths) - wanted))
            found = potential(log_lengths, quantiles) if self.form == "potential" else -abs(log_lengths - quantiles)
            rewards[places] = found if self._reader.check is None else np.maximum(1.0 + found, 0.0)
        if log_metric is not None and distances:
            log_metric("length_distribution/wasserstein", float(np.concatenate(distances).mean()))
        return batch.returned(rewards)

    def _difficulties(self, number: int, columns: dict[str, Any]) -> list[Any]:
        if set(self.target) == {ALL}:
            return [ALL] * number
        if self.difficulty_column not in columns:
            raise ValueError(
                f"The target has lengths for {', '.join(map(repr, self.target))}, but the dataset has no column "
                f"{self.difficulty_column!r}. Name the column with the difficulty by `difficulty_column`, or give one "
                "target."
            )
        return columns[self.difficulty_column]


def matched(log_lengths: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """
    The monotone match: the quantile that belongs to each log-length.

    Args:
        log_lengths (`np.ndarray` of shape `[n]`): Logarithms of lengths, in any order.
        quantiles (`np.ndarray` of shape `[n]`): Logarithms of the target's quantiles, increasing.

    Returns:
        `np.ndarray` of shape `[n]`: Equal lengths have the mean of the quantiles at their ranks.
    """
    _, which, counts = np.unique(log_lengths, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    sums = np.concatenate([[0.0], np.cumsum(quantiles)])
    return ((sums[ends] - sums[ends - counts]) / counts)[which]


def potential(log_lengths: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """
    Minus the Kantorovich potential of the quadratic cost, `[n]`, shifted so that its largest value is 0.

    The displacement d = y - x is its slope. It is integrated from length to length by the trapezoidal rule.

    Args:
        log_lengths (`np.ndarray` of shape `[n]`): x, in any order.
        quantiles (`np.ndarray` of shape `[n]`): y, the quantile that belongs to each.
    """
    points, first, which = np.unique(log_lengths, return_index=True, return_inverse=True)
    slopes = (quantiles - log_lengths)[first]
    steps = 0.5 * (slopes[1:] + slopes[:-1]) * np.diff(points)
    heights = np.concatenate([[0.0], np.cumsum(steps)])
    return (heights - heights.max())[which]
