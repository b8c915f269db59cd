"""The rows behind an effect: exact scores of all rows by the whole panel, and what is left without the best ones."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset
from scipy.stats import mannwhitneyu

from ..attribution import Attribution, Journal, attribute
from ..evaluation import interval
from ..metagradients import InnerLoopConfig
from ..metagradients.goals import MetricFunction
from ..student import Student
from .effects import Effect, Measure


SMOOTH = 1e-3
"""The least `eps_root` with which rows are scored. With smaller ones, AdamW's first step is close to a sign: a row
scores high if it turns coordinates of small gradients, and not if it pushes the metric like all others."""
MAX_CHECKED = 3
"""The strongest effects whose rows are removed for a check."""


@dataclass
class Removal:
    """
    Φ of fresh students on the whole dataset, the control, and the dataset without some rows: mean and half width.

    Attributes:
        num_removed (`int`): Number of rows that were removed.
        whole (`tuple`), control (`tuple`): Φ on the dataset, and on as many rows of the control.
        without_top (`tuple`): Φ on the dataset without its best rows.
        without_random (`tuple`): Φ on the dataset without as many random rows.
    """

    num_removed: int
    whole: tuple[float, float | None]
    control: tuple[float, float | None]
    without_top: tuple[float, float | None]
    without_random: tuple[float, float | None]

    def share_gone(self, values: tuple[float, float | None]) -> float | None:
        """The share of the effect that is gone with the rows. `None` if there is no effect on the whole dataset."""
        effect = self.whole[0] - self.control[0]
        return (self.whole[0] - values[0]) / effect if effect else None


@dataclass
class RowsBehind:
    """
    The rows of the dataset that drive an effect.

    Attributes:
        rows (`list[int]`): The rows by their scores in the direction of the effect, the strongest first, `[N]`.
        scores (`list[float]`): Their scores in this order: how much Φ moves in the direction of the effect, for each
            unit of the row's weight in training. `[N]`
        rank_correlation (`float` or `None`): Of the scores in two random orders, see [`~trl_dpg.Attribution`].
        above_control (`float`): How often a row of the dataset scores higher than one of the control. Close to 1, the
            whole dataset carries the effect; close to 0.5, few rows do.
        removal (`Removal` or `None`): What is left without the best rows. Only of the strongest effects.
    """

    rows: list[int]
    scores: list[float]
    rank_correlation: float | None
    above_control: float
    removal: Removal | None = None

    @property
    def all_equal(self) -> bool:
        """Whether all scores are equal, so that there is no ranking."""
        return self.scores[0] == self.scores[-1]


def scores_against_control(
    student: Student,
    rows: Dataset,
    others: Dataset,
    metrics: Mapping[str, MetricFunction],
    config: InnerLoopConfig,
    num_repeats: int,
    progress: bool,
    journal: Journal | None = None,
) -> dict[str, Attribution]:
    """
    Scores of N rows of the dataset and N others of the control by all metrics, in one attribution, see [`attribute`].

    Both are scored in common batches, one step each. So a score is taken half-way between the control and the dataset:
    twice the sum of the rows' scores minus those of the control is the effect of a step, by the midpoint rule.
    `eps_root` is at least `SMOOTH`. The step has the peak learning rate, and scores are always metagradients.
    """
    both = [*rows, *others]  # their columns may differ
    smooth = replace(config, eps_root=max(float(config.eps_root), SMOOTH), per_token=False, num_epochs=1)
    step = replace(smooth, attribution="metagradient", lr_scheduler_type="constant", warmup_steps=0)
    return attribute(student, both, metrics, step, config.batch_size, num_repeats, journal, progress)


def rows_behind(effect: Effect, attribution: Attribution) -> RowsBehind:
    """The rows of the dataset by their scores of [`scores_against_control`], in the direction of the effect."""
    towards, of_control = np.split(attribution.scores * np.sign(effect.mean), 2)
    order = np.argsort(-towards, kind="stable")
    above = mannwhitneyu(towards, of_control).statistic / len(towards) ** 2
    return RowsBehind(order.tolist(), towards[order].tolist(), attribution.rank_correlation, float(above))


def check_removal(
    measure: Measure,
    dataset: Dataset,
    control: Dataset,
    metrics: Mapping[str, MetricFunction],
    behind: Mapping[str, RowsBehind],
    num_removed: int,
    seeds: Sequence[int],
) -> None:
    """Measure what is left of the effects in `behind` without their best rows. The results go into `behind`."""
    checked = {name: metrics[name] for name in behind}
    random = np.random.default_rng(seeds[0])
    values: dict[str, list[dict[str, float]]] = {}

    def add(what: str, rows: Dataset, seed: int, panel: Mapping[str, MetricFunction] = checked) -> None:
        values.setdefault(what, []).append(measure(rows, panel, seed, what).metrics)

    for seed in seeds:
        add("the whole dataset", dataset, seed)
        add("the control", control.shuffle(seed=seed).select(range(len(dataset))), seed)
        drawn = random.permutation(len(dataset))[:num_removed]
        add(f"the dataset without {num_removed} random rows", _without(dataset, drawn), seed)
        for name, own in behind.items():
            left = _without(dataset, np.array(own.rows[:num_removed]))
            add(_without_best(name, num_removed), left, seed, {name: checked[name]})
    common = ("the whole dataset", "the control", f"the dataset without {num_removed} random rows")
    for name, own in behind.items():
        kinds = (*common, _without_best(name, num_removed))
        whole, theirs, without_random, without_top = (interval([one[name] for one in values[kind]]) for kind in kinds)
        own.removal = Removal(num_removed, whole, theirs, without_top, without_random)


def num_checks(num_effects: int, num_seeds: int) -> int:
    """The students of [`check_removal`]."""
    return num_seeds * (3 + num_effects)


def strongest(effects: Mapping[str, Effect]) -> list[str]:
    """The names of the strongest effects, by their size in half widths of their intervals."""
    names = sorted(effects, key=lambda name: -abs(effects[name].mean) / max(effects[name].half_width, 1e-300))
    return names[:MAX_CHECKED]


def mean_tokens(lengths: Sequence[int]) -> float:
    """The mean length of samples that are not empty."""
    return statistics.mean([length for length in lengths if length] or [0])


def _without_best(name: str, num_removed: int) -> str:
    return f"the dataset without its {num_removed} best rows for {name!r}"


def _without(dataset: Dataset, rows: np.ndarray) -> Dataset:
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), rows).tolist())
