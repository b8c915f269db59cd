"""Targets that follow the lengths of samples, some of which may have been cut off."""

import numpy as np

from ...length_target import Empirical, LengthTarget, LogNormal, Quantiles
from .rows import DataError


FORMS = ("empirical", "lognormal", "quantiles")
LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""Levels of a target of quantiles."""
MIN_SAMPLES = 2


def fit(form: str, lengths: np.ndarray, truncated: np.ndarray | None = None) -> LengthTarget:
    """
    Fit a target.

    A sample that was cut off says only that its length is at least what is there. To drop such samples would make the
    target too short. So the log-normal's likelihood has the probability of a greater length for them. The cumulative
    distribution behind the other two forms is Kaplan and Meier's (Nonparametric Estimation from Incomplete
    Observations, 1958). What lies beyond the longest sample is given the longest sample's length.

    Args:
        form (`str`): `"empirical"`, `"lognormal"` or `"quantiles"`.
        lengths (`np.ndarray` of shape `[N]`): Lengths above 0.
        truncated (`np.ndarray` of shape `[N]`, *optional*): Which samples were cut off.

    Raises:
        `ValueError`: If the form is unknown, or if there are too few samples.
    """
    from scipy.stats import CensoredData, ecdf, norm  # takes a second to import

    if form not in FORMS:
        raise DataError(f"Unknown form {form!r} of a target. Choose one of {', '.join(FORMS)}.")
    cut = np.zeros(len(lengths), dtype=bool) if truncated is None else truncated
    whole = lengths[~cut]
    if len(whole) < MIN_SAMPLES:
        raise DataError(f"A target needs at least {MIN_SAMPLES} samples that were not cut off, got {len(whole)}.")
    if form == "lognormal":
        mean, sigma = norm.fit(CensoredData(np.log(whole), right=np.log(lengths[cut])))
        return LogNormal(float(np.exp(mean)), max(float(sigma), 1e-6))
    survival = ecdf(CensoredData(whole, right=lengths[cut])).sf
    steps = -np.diff(np.concatenate([[1.0], survival.probabilities]))
    steps[-1] += survival.probabilities[-1]
    found = steps > 0
    weights = (steps[found] * len(lengths)).round(9)
    empirical = Empirical(survival.quantiles[found].tolist(), weights.tolist())
    if form == "empirical":
        return empirical
    return Quantiles(list(LEVELS), empirical.quantile(np.array(LEVELS)).tolist())
