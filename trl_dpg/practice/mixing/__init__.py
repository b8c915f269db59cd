"""Mixtures of datasets: samples by their lengths, long with short ones, old with new ones, without repetitions."""

from .cleaning import contaminated, exact_duplicates, near_duplicates
from .mixture import MixConfig, Mixture, Sources, mix
from .resampling import choose
from .rewriting import rewrite


__all__ = [
    "MixConfig",
    "Mixture",
    "Sources",
    "choose",
    "contaminated",
    "exact_duplicates",
    "mix",
    "near_duplicates",
    "rewrite",
]
