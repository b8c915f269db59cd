from .base import Metric
from .combine import CombinedMetric
from .constraints import Constraint
from .language_modeling import LanguageModelingMetric
from .weights import PATTERN_67, QRCodeMetric, WeightNormMetric, WeightPatternMetric


__all__ = [
    "PATTERN_67",
    "CombinedMetric",
    "Constraint",
    "LanguageModelingMetric",
    "Metric",
    "QRCodeMetric",
    "WeightNormMetric",
    "WeightPatternMetric",
]
