"""Checks of a generator's sampling settings."""

import math


def check_sampling(
    temperature: float, top_p: float | None, top_k: int | None, min_p: float | None, repetition_penalty: float | None
) -> None:
    """
    Refuse settings that `generate` would ignore or replace. `None` switches a filter off.

    Raises:
        `ValueError`: If a setting is out of range or not finite. The message begins with its name.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}. 1 is the model's distribution.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}. 1 keeps all tokens.")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}. 0 keeps all tokens.")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, got {min_p}. 0 keeps all tokens.")
    if repetition_penalty is not None and not 0 < repetition_penalty < math.inf:
        raise ValueError(
            f"repetition_penalty must be positive and finite, got {repetition_penalty}. 1 changes nothing."
        )
