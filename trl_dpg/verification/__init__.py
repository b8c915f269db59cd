"""
Checks whether the scores of a set-up can be trusted: how well they predict the metric's change when the data weights
change. See [`verify`].
"""

from ..metagradients.fine_tuning import FineTuning
from ..student.precision import compute_dtype, in_precision
from .advice import Remedy
from .measurements import (
    NUM_GROUPS,
    STEP,
    Agreement,
    GradientNoise,
    gradient_noise,
    metasmoothness,
    pearson,
    predicted_and_actual,
    random_signs,
)
from .quantization import quantization_check, without_quantization
from .result import Check, Verification
from .verdict import NOISY, PASS, ROUGH, SMOOTH, WARN, verify


__all__ = [
    "NOISY",
    "NUM_GROUPS",
    "PASS",
    "ROUGH",
    "SMOOTH",
    "STEP",
    "WARN",
    "Agreement",
    "Check",
    "FineTuning",
    "GradientNoise",
    "Remedy",
    "Verification",
    "compute_dtype",
    "gradient_noise",
    "in_precision",
    "metasmoothness",
    "pearson",
    "predicted_and_actual",
    "quantization_check",
    "random_signs",
    "verify",
    "without_quantization",
]
