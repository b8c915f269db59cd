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


def warn_of_truncation(
    top_p: float | None, top_k: int | None, min_p: float | None, repetition_penalty: float | None
) -> None:
    """
    Warn of settings that bias TRL's importance ratio. `None` switches a filter off.

    TRL multiplies a token's loss by its probability under the trained model, divided by that under vLLM. With a
    filter, vLLM gives the probability among the tokens that are left. The trainer gives that among all tokens.
    """
    set_ = [
        f"{name}={value}"
        for name, value, neutral in (
            ("top_p", top_p, (None, 1)),
            ("top_k", top_k, (None, 0)),
            ("min_p", min_p, (None, 0)),
            ("repetition_penalty", repetition_penalty, (None, 1)),
        )
        if value not in neutral
    ]
    if set_:
        from transformers.utils import logging  # here, because some commands do without it

        logging.get_logger(__name__).warning(
            f"use_vllm with {', '.join(set_)}: vLLM samples from a changed distribution and returns its "
            "probabilities, while the trainer computes those of the model itself. This biases TRL's importance ratio, "
            "and with it the update. Set top_p=1, top_k=0, min_p=0 and repetition_penalty=1; temperature is safe."
        )
