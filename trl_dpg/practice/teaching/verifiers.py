"""Whether a teacher's answer is right."""

import threading
from collections.abc import Callable
from typing import Any

from ...metagradients.config import SettingsError


Verifier = Callable[[str, Any], bool]
"""From an answer (without the reasoning) and the right answer of its row, to whether it is right."""


def math(completion: str, answer: Any) -> bool:
    """
    Whether the expressions are the same in mathematics, by math-verify. In an answer, what is in a box counts first.

    Raises:
        `ValueError`: If there is no expression in the right answer.
        `ImportError`: If math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError as error:
        raise ImportError('The verifier "math" needs math-verify: pip install "trl-dpg[teacher]".') from error
    in_main_thread = threading.current_thread() is threading.main_thread()  # its time limit is a signal
    limit = 5 if in_main_thread else None
    right = parse(str(answer), parsing_timeout=limit) or parse(f"${answer}$", parsing_timeout=limit)
    if not right:
        raise SettingsError(f"The right answer {answer!r} is no mathematical expression. Use the verifier 'exact'.")
    return verify(right, parse(completion, parsing_timeout=limit), timeout_seconds=limit)


def exact(completion: str, answer: Any) -> bool:
    """Whether the texts are the same, apart from white space around them and from upper and lower case."""
    return completion.strip().casefold() == str(answer).strip().casefold()


VERIFIERS: dict[str, Verifier] = {"math": math, "exact": exact}
