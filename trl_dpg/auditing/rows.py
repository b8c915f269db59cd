"""The rows behind an effect: exact scores of all rows by the whole panel, and what is left without the best ones."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..attribution import Attribution
from ..evaluation import interval
from ..metagradients import InnerLoopConfig
from ..metagradients.goals import MetricFunction
from .effects import Effect, LoadStudent, values_after


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
        removal (`Removal` or `None`): What is left without the best rows. Only of the strongest effects.
    """

    rows: list[int]
    scores: list[float]
    rank_correlation: float | None
    removal: Removal | None = None


def rows_behind(effect: Effect, attribution: Attribution) -> RowsBehind:
    """The rows in the order of their scores, in the direction of the effect."""
    towards = attribution.scores * np.sign(effect.mean)
    order = np.argsort(-towards, kind="stable")
    return RowsBehind(order.tolist(), towards[order].tolist(), attribution.rank_correlation)


def check_removal(
    load_student: LoadStudent,
    dataset: Dataset,
    control: Dataset,
    metrics: Mapping[str, MetricFunction],
    behind: Mapping[str, RowsBehind],
    config: InnerLoopConfig,
    num_removed: int,
    seeds: Sequence[int],
    bar: tqdm,
) -> None:
    """Measure what is left of the effects in `behind` without their best rows. The results go into `behind`."""
    checked = {name: metrics[name] for name in behind}
    random = np.random.default_rng(seeds[0])
    values: dict[str, list[dict[str, float]]] = {}

    def measure(what: str, rows: Dataset, seed: int, only: str | None = None) -> None:
        panel = checked if only is None else {only: checked[only]}
        values.setdefault(what, []).append(values_after(load_student, rows, panel, config, seed).metrics)
        bar.update()

    for seed in seeds:
        measure("whole", dataset, seed)
        measure("control", control.shuffle(seed=seed).select(range(len(dataset))), seed)
        measure("random", _without(dataset, random.permutation(len(dataset))[:num_removed]), seed)
        for name, own in behind.items():
            measure(f"top {name}", _without(dataset, np.array(own.rows[:num_removed])), seed, name)
    for name, own in behind.items():
        whole, theirs, without_random, without_top = (
            interval([one[name] for one in values[what]]) for what in ("whole", "control", "random", f"top {name}")
        )
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


def _without(dataset: Dataset, rows: np.ndarray) -> Dataset:
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), rows).tolist())
