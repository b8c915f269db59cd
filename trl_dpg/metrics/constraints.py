"""Limits that parts of a metric keep, and the multipliers that make a generator keep them."""

import math
from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True)
class Constraint:
    r"""
    A limit for a part Φ_j of a [`CombinedMetric`]: the student's fine-tuning may lower it by ε at most,
    Φ_j(θ_T) ≥ Φ_j(θ_0) - ε.

    The part has a multiplier λ_j ≥ 0, which is added to its weight. After each reward step, the multiplier takes a
    step of projected gradient ascent on the violation g_j, in units of ε:

        λ_j ← max(0, λ_j + step_size · g_j)        g_j = (Φ_j(θ_0) - Φ_j(θ_T)) / ε - 1, at most 1

    So it rises while the limit is exceeded, and falls while it is not. This is the primal-dual method for constrained
    policy optimisation (Tessler et al., arXiv 1805.11074). A part that stays where it is has g_j = -1. The bound of 1
    lets the multiplier rise no faster than it falls, whatever a single bad step does.

    The generator takes a while to follow, so a multiplier that only adds up the violations swings around the limit.
    `damping` adds a multiple of the last violation, the proportional term of a PI controller (Stooke et al., arXiv
    2007.03964). The weight of a step is then max(0, λ_j + damping · g_j), with λ_j and g_j after the step before.

    Args:
        eps (`float`):
            ε > 0, in the unit of the part: nats per token for language modelling.
        step_size (`float`, *optional*, defaults to `0.1`):
            Change of the multiplier in a step in which the part falls by 2 ε or more. A multiplier of 1 weighs the
            part like another one with weight 1. Where parts have other units, choose it in their proportion.
        damping (`float`, *optional*, defaults to `0.5`):
            Weight of the last violation. `0`: the multiplier alone.
        multiplier (`float`, *optional*, defaults to `0.0`):
            The multiplier at the start.

    Raises:
        `ValueError`: If `eps` or `step_size` is not positive, or if another value is negative or not finite.
    """

    eps: float
    step_size: float = 0.1
    damping: float = 0.5
    multiplier: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            positive = name in ("eps", "step_size")
            wrong = isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)
            if wrong or value < 0 or (positive and value == 0):
                least = "a positive number" if positive else "a number of at least 0"
                raise ValueError(f"A constraint's `{name}` must be {least}, got {value!r}.")

    def violation(self, change: float) -> float:
        """How far a change of the part is beyond the limit, in units of ε. At most 0 if the limit is kept."""
        return -change / self.eps - 1.0


@dataclass
class Multiplier:
    """
    The multiplier of a constraint, as it is between two reward steps.

    Attributes:
        value (`float`): λ.
        violation (`float`): g of the last step, at most 1; 0 before the first one.
    """

    value: float
    violation: float = 0.0

    def weight(self, constraint: Constraint) -> float:
        """What is added to the part's weight."""
        return max(0.0, self.value + constraint.damping * self.violation)

    def react(self, constraint: Constraint, change: float) -> "Multiplier":
        """The multiplier after a step in which the part changed by `change`."""
        violation = min(constraint.violation(change), 1.0)
        return Multiplier(max(0.0, self.value + constraint.step_size * violation), violation)
