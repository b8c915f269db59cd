"""TRL reward functions to use with Dataset Policy Gradients: the paper's baselines, and readable proxies."""

from .embedding import EmbeddingSimilarityReward
from .language_id import LanguageIDReward
from .length_distribution import LengthDistributionReward
from .length_penalties import AdaptiveLengthPenaltyReward, LengthBudgetReward, ShorterBetterReward
from .levenshtein import LevenshteinReward
from .target_language import TargetLanguageReward
from .text import ContainsReward, WordShareReward


__all__ = [
    "AdaptiveLengthPenaltyReward",
    "ContainsReward",
    "EmbeddingSimilarityReward",
    "LanguageIDReward",
    "LengthBudgetReward",
    "LengthDistributionReward",
    "LevenshteinReward",
    "ShorterBetterReward",
    "TargetLanguageReward",
    "WordShareReward",
]
