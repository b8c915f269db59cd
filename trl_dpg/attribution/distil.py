"""Distilled scores: exact scores of a sample of a dataset, learned from hidden states, for all of the dataset."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from ..metagradients.config import SettingsError
from .reliability import rank_correlation


FLOOR = 0.3
"""Smallest rank correlation on held-out samples with which scores are distilled."""
COVERAGE = 0.9
"""Share of the samples whose exact score is to lie within the half width of the distilled one."""
LEAST = 60
"""Samples that are needed at least."""
SHARES = (0.7, 0.85)
"""Where the samples to choose by end, and those to calibrate with. The rest is held out."""
FOLDS = 5
REGRESSORS = ("ridge", "boosting")
ALPHAS = np.logspace(0, 6, 13)
COMPONENTS = 64

Features = Mapping[tuple[int, str], np.ndarray]


@dataclass
class Distillation:
    """
    A regressor from the features of samples to their scores, and how well it does on samples that it has not seen.

    Attributes:
        num_blocks (`int`), pooling (`str`), regressor (`str`): What cross-validation chose, see [`fit`].
        candidates (`list[dict[str, Any]]`): What there was to choose from. `spearman` is the mean over the folds.
        num_scored (`int`), num_fitted (`int`), num_calibrated (`int`), num_held_out (`int`): Numbers of samples.
        spearman (`float`): Spearman's correlation of distilled and exact scores of the held-out samples.
        spearman_interval (`tuple[float, float]`): Its 95 % interval (Bonett and Wright, 2000).
        half_width (`float`): The exact score of a sample is within this of the distilled one, for the share `nominal`
            of new samples (split conformal prediction; Lei et al., arXiv 1604.04173). In units of the score.
        nominal (`float`), coverage (`float`): This share, and the share of held-out samples for which it is so.
    """

    num_blocks: int
    pooling: str
    regressor: str
    candidates: list[dict[str, Any]]
    num_scored: int
    num_fitted: int
    num_calibrated: int
    num_held_out: int
    spearman: float
    spearman_interval: tuple[float, float]
    half_width: float
    nominal: float
    coverage: float
    seed: int

    def check(self, floor: float, name: str | None = None) -> None:
        """
        Refuse a regressor that says too little about the ranking.

        Raises:
            `ValueError`: If the rank correlation on held-out samples is below `floor`.
        """
        if not self.spearman >= floor:
            raise SettingsError(
                f"The scores {'' if name is None else f'by {name!r} '}cannot be distilled: on {self.num_held_out} "
                f"held-out samples, distilled and exact scores have a rank correlation of {self.spearman:.2f}, below "
                f"the `floor` of {floor:g}. Score more samples (`num_samples`), read more blocks (`numbers`), or make "
                "the exact scores more reliable (docs/attribution.md). A lower `floor` accepts this."
            )


class Regressor:
    """
    A fitted [`Distillation`].

    Args:
        described (`Distillation`): What was chosen.
        features (`np.ndarray` of shape `[n, F]`), scores (`np.ndarray` of shape `[n]`): What it is fitted to.
        held_out (`np.ndarray`): The rows of the scored samples that were held out.
    """

    def __init__(self, described: Distillation, features: np.ndarray, scores: np.ndarray, held_out: np.ndarray):
        self.described = described
        self.features = features
        self.scores = scores
        self.held_out = held_out
        self.model = make_regressor(described.regressor, described.seed, *features.shape).fit(features, scores)

    def predict(self, features: Features, counts: np.ndarray) -> np.ndarray:
        """Distilled scores `[N]`, float32, of what [`FeatureReader.read`] returns. 0 for empty samples."""
        if not counts.any():
            return np.zeros(len(counts), dtype=np.float32)
        own = features[self.described.num_blocks, self.described.pooling]
        return np.where(counts > 0, self.model.predict(own), 0.0).astype(np.float32)


def make_regressor(name: str, seed: int, num_samples: int, num_features: int):
    """
    A regressor of scikit-learn on standardised features: `"ridge"`, or `"boosting"` of their principal components.

    Raises:
        `ImportError`: If scikit-learn is not installed.
    """
    try:
        from sklearn.compose import TransformedTargetRegressor
        from sklearn.decomposition import PCA
        from sklearn.ensemble import HistGradientBoostingRegressor
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("Distilled scores need scikit-learn: pip install 'trl-dpg[distill]'") from error
    steps: list[Any] = [StandardScaler()]
    if name == "ridge":
        steps += [RidgeCV(ALPHAS)]
    else:
        steps += [PCA(min(COMPONENTS, num_samples, num_features), random_state=seed)]
        steps += [
            HistGradientBoostingRegressor(learning_rate=0.06, max_iter=150, max_leaf_nodes=15, random_state=seed)
        ]
    return TransformedTargetRegressor(make_pipeline(*steps), transformer=StandardScaler())


def fit(
    features: Features, counts: np.ndarray, scores: np.ndarray, seed: int = 42, coverage: float = COVERAGE
) -> Regressor:
    """
    Choose a regressor by cross-validation, calibrate its half width, and test both on held-out samples.

    Samples without a token to learn from are left out. Of the others, 70 % are fitted to, 15 % calibrate the half
    width, and 15 % are held out. Of all combinations of blocks, pooling and regressor, those count as equal whose rank
    correlation in cross-validation is within a standard error of the best one's (Breiman et al., 1984). Of these, the
    one with the fewest blocks is chosen, which is the cheapest.

    Args:
        features (`Mapping`), counts (`np.ndarray` of shape `[N]`): What [`FeatureReader.read`] returns.
        scores (`np.ndarray` of shape `[N]`): Exact scores of the samples.
        seed (`int`, *optional*, defaults to `42`): Seed of the random choices.
        coverage (`float`, *optional*, defaults to `0.9`): For which share of new samples the half width is to hold.

    Raises:
        `ValueError`: If there are too few samples, or their scores are equal.
        `ImportError`: If scikit-learn is not installed.
    """
    usable = np.flatnonzero(counts > 0)
    check_number(len(usable), coverage)
    order = np.random.default_rng(seed).permutation(usable)
    chosen_by, calibrating, held_out = np.split(order, [round(share * len(order)) for share in SHARES])
    if any(np.ptp(scores[rows]) == 0 for rows in (chosen_by, held_out)):
        raise SettingsError(
            "All scores are equal, so there is nothing to distil. Does the student learn (`learning_rate`)?"
        )
    own = {key: values[chosen_by] for key, values in features.items()}
    candidates = cross_validate(own, scores[chosen_by], seed)
    chosen = choose(candidates)
    key = chosen["num_blocks"], chosen["pooling"]
    model = make_regressor(chosen["regressor"], seed, *own[key].shape).fit(own[key], scores[chosen_by])
    errors = np.sort(np.abs(model.predict(features[key][calibrating]) - scores[calibrating]))
    half_width = float(errors[math.ceil(coverage * (len(errors) + 1)) - 1])
    predicted, exact = model.predict(features[key][held_out]), scores[held_out]
    correlation = spearman(predicted, exact)
    described = Distillation(
        **{name: chosen[name] for name in ("num_blocks", "pooling", "regressor")},
        candidates=candidates,
        num_scored=len(scores),
        num_fitted=len(chosen_by),
        num_calibrated=len(calibrating),
        num_held_out=len(held_out),
        spearman=correlation,
        spearman_interval=interval(correlation, len(held_out)),
        half_width=half_width,
        nominal=coverage,
        coverage=float(np.mean(np.abs(predicted - exact) <= half_width)),
        seed=seed,
    )
    return Regressor(described, own[key], scores[chosen_by], held_out)


def check_number(number: int, coverage: float = COVERAGE) -> None:
    """
    Refuse too few samples to choose by, to calibrate with (so that the half width is finite) and to test on.

    Raises:
        `ValueError`: If there are too few samples with exact scores and a token to learn from.
    """

    def is_enough(number: int) -> bool:
        calibrating = round(SHARES[1] * number) - round(SHARES[0] * number)
        return math.ceil(coverage * (calibrating + 1)) <= calibrating

    least = next(enough for enough in count(max(number, LEAST)) if is_enough(enough))
    if number < least:
        raise SettingsError(
            f"Scores are distilled from at least {least} samples with a token to learn from, got {number}. Score more "
            "samples (`num_samples`)."
        )


def cross_validate(features: Features, scores: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Each regressor on each kind of features: Spearman's correlation, mean of the folds, and its standard error."""
    from sklearn.model_selection import KFold

    folds = list(KFold(FOLDS, shuffle=True, random_state=seed).split(scores))
    candidates = []
    for (num_blocks, pooling), values in sorted(features.items()):
        for name in REGRESSORS:
            found = []
            for fitted, left_out in folds:
                model = make_regressor(name, seed, len(fitted), values.shape[1]).fit(values[fitted], scores[fitted])
                found.append(spearman(model.predict(values[left_out]), scores[left_out]))
            described = {"num_blocks": num_blocks, "pooling": pooling, "regressor": name}
            error = float(np.std(found, ddof=1)) / math.sqrt(FOLDS)
            candidates.append(described | {"spearman": float(np.mean(found)), "standard_error": error})
    return candidates


def choose(candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of the candidates with the fewest blocks, among those within a standard error of the best of all."""
    best = max(candidates, key=lambda candidate: candidate["spearman"])
    as_good = [own for own in candidates if own["spearman"] >= best["spearman"] - best["standard_error"]]
    return min(as_good, key=lambda candidate: (candidate["num_blocks"], -candidate["spearman"]))


def spearman(predicted: np.ndarray, exact: np.ndarray) -> float:
    """Spearman's correlation. 0 if one side is constant, because it ranks nothing."""
    return rank_correlation(np.stack([predicted, exact])) or 0.0


def interval(correlation: float, number: int) -> tuple[float, float]:
    """The 95 % interval of Spearman's correlation of `number` pairs (Bonett and Wright, 2000)."""
    width = 1.96 * math.sqrt((1 + correlation**2 / 2) / max(number - 3, 1))
    middle = math.atanh(min(max(correlation, -0.999999), 0.999999))
    return math.tanh(middle - width), math.tanh(middle + width)
