"""What the forward sweep keeps of the inner loop for the reverse sweep."""

from collections.abc import Iterator

from ..metagradients import InnerLoopConfig


def num_moments(config: InnerLoopConfig) -> int:
    """σ: vectors `[P]` in the optimizer's state."""
    return 2 if config.optimizer == "adamw" else 1


def trajectory_bytes(
    config: InnerLoopConfig, theta_bytes: int, num_steps: int, length: int, num_ranks: int = 1
) -> int:
    """
    The most that is kept of T steps in stretches of k steps, on one rank of R.

    Of each step in the stretch at hand: θ, g and σ moments. Of each earlier stretch: θ and the moments at its start.
    After the stretch: θ and the moments, and after an earlier stretch also θ_T. With P numbers in a vector:

        P · max over stretches j of [(2 + σ) · (steps of j) + (1 + σ) · j + (1 + σ) + (1 if j is not the last)] / R

    Args:
        config (`InnerLoopConfig`): The inner loop.
        theta_bytes (`int`): Bytes of a vector of P numbers.
        num_steps (`int`): T.
        length (`int`): k.
        num_ranks (`int`, *optional*, defaults to 1): R, ranks that share the trajectory.
    """
    if config.attribution == "dataset":
        return (1 + num_moments(config)) * theta_bytes // num_ranks  # nothing is kept but the current state
    state = 1 + num_moments(config)
    stretches = list(_stretches(num_steps, length))
    held = max((state + 1) * steps + state * j + state + (j < len(stretches) - 1) for j, steps in enumerate(stretches))
    return held * theta_bytes // num_ranks


def _stretches(num_steps: int, length: int) -> Iterator[int]:
    for first in range(0, num_steps, length):
        yield min(length, num_steps - first)
