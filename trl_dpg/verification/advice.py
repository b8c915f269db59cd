"""What to change if the scores of a set-up cannot be trusted."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metagradients import InnerLoopConfig
from .measurements import GradientNoise


@dataclass
class Remedy:
    """
    A change of [`InnerLoopConfig`] that was tried: the changed fields, and the two central figures with them.

    `helps` is `True` if both pass.
    """

    changes: dict[str, Any]
    pearson: float
    metasmoothness: float
    helps: bool = False

    def describe(self) -> str:
        """The changes as text, with the names of fields in backticks."""
        return " ".join(f"`{name}` {short(value)}" for name, value in self.changes.items())


def advice(config: InnerLoopConfig, noise: GradientNoise, num_samples: int) -> str:
    """What to change for a smoother fine-tuning."""
    changes = [f"lower `learning_rate` (now {short(config.learning_rate)})"]
    if config.batch_size < min(num_samples, noise.noise_scale):
        changes.append(f"raise `batch_size` (now {config.batch_size})")
    if _lacks_eps_root(config, noise.mean_square):
        now = f"now {short(config.eps_root)}; the mean square of a step's gradient is {noise.mean_square:.0e}"
        changes.insert(0, f"raise `eps_root` to {short(fitting_eps_root(noise.mean_square))} ({now})")
    return ", or ".join(changes)


def slope_advice(slope: float) -> str:
    """What a slope costs that is far from 1."""
    if math.isnan(slope):
        return "all scores are zero, but the metric changes: check that it is differentiable in the student's weights"
    if slope <= 0:
        return "predictions have the wrong sign"
    times, wrong = (1 / slope, "large") if slope < 1 else (slope, "small")
    estimated = "overestimated" if slope < 1 else "underestimated"
    return (
        f"predicted changes are {times:.2f} x too {wrong}: ranks of samples, and so rewards, are unaffected; total "
        f"effects are {estimated}. For a slope of 1, lower `learning_rate`"
    )


def advice_without_change(config: InnerLoopConfig) -> str:
    """What to do if the metric changes in no direction."""
    return (
        "the metric does not change in any direction, so there is nothing to compare. Check that it depends on the "
        "trained weights of the student and is not rounded (e.g. to bfloat16), or raise `learning_rate` (now "
        f"{short(config.learning_rate)})"
    )


def remedies(config: InnerLoopConfig, noise: GradientNoise, num_samples: int) -> Iterator[dict[str, Any]]:
    """The changes to try, in this order, as fields of the configuration."""
    lower = float(config.learning_rate) / 10
    if _lacks_eps_root(config, noise.mean_square):
        fitting = fitting_eps_root(noise.mean_square)
        yield {"eps_root": fitting}
        yield {"eps_root": fitting, "learning_rate": lower}
    yield {"learning_rate": lower}
    yield {"learning_rate": lower / 10}
    larger = 4 * config.batch_size if num_samples % (4 * config.batch_size) == 0 else num_samples
    if config.batch_size < larger:
        yield {"batch_size": larger}


def _lacks_eps_root(config: InnerLoopConfig, mean_square: float) -> bool:
    return config.optimizer == "adamw" and float(config.eps_root) < mean_square / 10


def fitting_eps_root(mean_square: float) -> float:
    """The power of ten that is nearest to the mean square of a step's gradient."""
    return float(f"1e{round(math.log10(mean_square))}")


def short(value: float | str) -> str:
    """A number in short form, e.g. 1e-5, 0.5 or 128."""
    value = float(value)
    return np.format_float_scientific(value, trim="-", exp_digits=1) if 0 < value < 0.01 else f"{value:g}"
