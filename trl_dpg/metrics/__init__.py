from .base import Metric
from .combine import CombinedMetric
from .language_modeling import LanguageModelingMetric
from .weights import PATTERN_67, QRCodeMetric, WeightNormMetric, WeightPatternMetric


__all__ = [
    "PATTERN_67",
    "CombinedMetric",
    "LanguageModelingMetric",
    "Metric",
    "QRCodeMetric",
    "WeightNormMetric",
    "WeightPatternMetric",
]
