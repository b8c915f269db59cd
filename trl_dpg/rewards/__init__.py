from .embedding import EmbeddingSimilarityReward
from .language_id import LanguageIDReward
from .levenshtein import LevenshteinReward


__all__ = ["EmbeddingSimilarityReward", "LanguageIDReward", "LevenshteinReward"]
