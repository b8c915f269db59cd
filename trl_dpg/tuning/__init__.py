"""
Chooses the inner loop's learning rate and `eps_root`: the largest and the smallest with which the scores predict.

Both are found by a few fine-tunings on one batch, with the measurements of `verification/`. See [`tune`].
"""

from .reuse import Choice, read_figures, tune_together
from .search import MAX_REWARD_STEPS, Tuning, check_scores, tune
from .trials import AGREES, Trial


__all__ = [
    "AGREES",
    "MAX_REWARD_STEPS",
    "Choice",
    "Trial",
    "Tuning",
    "check_scores",
    "read_figures",
    "tune",
    "tune_together",
]
